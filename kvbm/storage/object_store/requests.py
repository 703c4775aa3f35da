"""One request until it is answered: its time limit, its retries with full jitter, and the breaker behind them.

Everything here runs in the engine's thread, on its loop. Backoff: Brooker, "Exponential Backoff And Jitter", 2015.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from kvbm.errors import StorageError
from kvbm.storage.object_store.address import safe_text
from kvbm.storage.object_store.breaker import CircuitBreaker
from kvbm.storage.object_store.format import GarbageError

AnswerT = TypeVar("AnswerT")

_log = logging.getLogger("kvbm.storage.object_store")

_INSIST_S = 1.0  # between cancels of what does not end

# Asking again would not help; names, because obstore is imported only where a store is opened.
_FINAL = ("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError")


@dataclass
class ObjectCounters:
    """What an object store has done since it was opened.

    Attributes
    ----------
    num_reads, num_writes : int
        Blocks moved.
    read_nbytes, written_nbytes : int
        Bytes of those blocks, headers excluded.
    num_requests : int
        Requests that were sent, retries included.
    num_retries : int
        Requests that were sent again.
    num_misses : int
        Blocks that were asked for and not there.
    num_garbage : int
        Objects under a right key that were not the block.
    num_timeouts : int
        Requests that were given up when their time was over.
    num_late : int
        Blocks that a transfer gave up at its deadline.
    num_failures : int
        Requests that failed, time-outs included.
    num_breaker_opens : int
        Times that the store was given up for a while.
    last_error : str
        What the last failure said; empty while there is none. Without queries and credentials.
    """

    num_reads: int = 0
    num_writes: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    num_requests: int = 0
    num_retries: int = 0
    num_misses: int = 0
    num_garbage: int = 0
    num_timeouts: int = 0
    num_late: int = 0
    num_failures: int = 0
    num_breaker_opens: int = 0
    last_error: str = ""


@dataclass(frozen=True)
class RetryLimits:
    """How often, and how long, a request is tried.

    Attributes
    ----------
    timeout_s : float
        Of one attempt.
    max_attempts : int
    backoff_s, max_backoff_s : float
        The wait before attempt n + 1 is drawn from 0 to backoff_s * 2**(n - 1), at most max_backoff_s.
    draw : callable
        Gives a number in [0, 1).
    sleep : callable
        Waits for seconds, on the loop.
    """

    timeout_s: float = 5.0
    max_attempts: int = 3
    backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    draw: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Requests:
    """Sends requests, at most so many at a time.

    Parameters
    ----------
    limits : RetryLimits
    breaker : CircuitBreaker
    max_requests : int
    probe : callable
        Makes a request that any answer to shows the store to be back.
    name : str
        Of the store, for the log.
    """

    def __init__(
        self,
        limits: RetryLimits,
        breaker: CircuitBreaker,
        *,
        max_requests: int,
        probe: Callable[[], Awaitable[object]],
        name: str,
    ) -> None:
        self.counters = ObjectCounters()
        self._limits = limits
        self._breaker = breaker
        self._slots = asyncio.Semaphore(max_requests)
        self._probe = probe
        self._name = name
        self._probing: asyncio.Task[None] | None = None
        self._known: set[str] = set()  # kinds of failure that were announced

    async def send(
        self,
        verb: str,
        make: Callable[[], Awaitable[AnswerT]],
        *,
        timeout_s: float | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> AnswerT:
        """Make a request, again where that may help, until it is answered.

        Parameters
        ----------
        verb : str
            For the log.
        make : callable
            Makes the request anew.
        timeout_s : float, optional
            Of one attempt; that of the limits where it is not given.
        is_wanted : callable
            Looked at before each attempt; `asyncio.CancelledError` where it says no.

        Raises
        ------
        FileNotFoundError, GarbageError
            Answers too: it is not there, or is not what it should be.
        StorageError
            The breaker is open, or every attempt failed.
        """
        limits, counters = self._limits, self.counters
        attempt = 0
        while True:
            try:
                async with self._slots:
                    if not is_wanted():
                        raise asyncio.CancelledError
                    if not self._breaker.is_available:
                        raise StorageError(f"{self._name} is not available: {counters.last_error or 'it is probed'}")
                    attempt += 1
                    counters.num_requests += 1
                    with TimeLimit(timeout_s or limits.timeout_s):
                        answer = await make()
            except (FileNotFoundError, GarbageError) as error:
                if verb == "put":  # then it is the bucket that is missing
                    self._fail(verb, error)
                    raise StorageError(counters.last_error) from None
                self._breaker.succeed()
                raise
            except StorageError:
                raise
            except Exception as error:
                self._fail(verb, error)
                is_final = type(error).__name__ in _FINAL
                if is_final or attempt >= limits.max_attempts or not self._breaker.is_available:
                    raise StorageError(f"{verb} failed {attempt} times: {counters.last_error}") from None
            else:
                self._breaker.succeed()
                return answer
            counters.num_retries += 1
            await limits.sleep(limits.draw() * min(limits.max_backoff_s, limits.backoff_s * 2 ** (attempt - 1)))

    def _fail(self, verb: str, error: Exception) -> None:
        counters = self.counters
        counters.num_failures += 1
        is_late = isinstance(error, TimeLimitReached)
        counters.num_timeouts += is_late
        counters.last_error = safe_text(error)
        kind = type(error).__name__
        level = logging.DEBUG if kind in self._known else logging.WARNING
        self._known.add(kind)
        _log.log(level, "object %s failed store=%s error=%s", verb, self._name, counters.last_error)
        if self._breaker.fail():
            counters.num_breaker_opens += 1
            _log.warning("object store given up store=%s error=%s", self._name, counters.last_error)
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        """Ask once after each cool-down, until there is an answer."""
        breaker = self._breaker
        while not breaker.is_available:
            await self._limits.sleep(breaker.cool_down_s)
            breaker.begin_probe()
            self.counters.num_requests += 1
            try:
                with TimeLimit(self._limits.timeout_s):
                    await self._probe()
                is_answered = True
            except FileNotFoundError:
                is_answered = True
            except Exception as error:
                is_answered = False
                self.counters.last_error = safe_text(error)
            if is_answered:
                self._known.clear()
                _log.warning("object store is back store=%s", self._name)
            breaker.end_probe(is_answered)


class TimeLimitReached(TimeoutError):
    """A request had no answer when its time was over."""


class TimeLimit:
    """Cancels what its body waits for when its time is over; `asyncio.timeout` is not in Python 3.10."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_over = False

    def __enter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None, "requests are made in tasks"
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def _end(self) -> None:
        self._is_over = True
        self._task.cancel()
        # Once more if need be: a limit inside this one, over in the same moment, takes the first for its own.
        self._timer = asyncio.get_running_loop().call_later(_INSIST_S, self._end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._is_over and kind is asyncio.CancelledError:
            raise TimeLimitReached(f"no answer within {self._seconds:g} s") from None
