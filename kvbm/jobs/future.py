"""Transfer: the future that a caller holds while bytes move.

It ends exactly once: done, failed, cancelled or timed out. It ends *for its waiter* at the deadline; the bytes may move
on ("draining") until the mover says that they have landed. Its one lock is held for bookkeeping only, never while a
callback runs.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from kvbm.errors import TransferCancelled, TransferTimeout
from kvbm.jobs.aside import standing_aside

ResultT = TypeVar("ResultT")

_log = logging.getLogger("kvbm.jobs")
_LONGEST_TIMER_S = 3600.0


class TransferState(str, enum.Enum):
    """How far a transfer is."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


class Transfer(Generic[ResultT]):
    """A result that comes later; also awaitable.

    Parameters
    ----------
    deadline_s : float, optional
        Seconds from now after which waiting ends in `TransferTimeout`; None waits for ever.
    clock : callable
        Gives seconds; monotonic.
    on_deadline : callable, optional
        Called once, by whoever looks first after the deadline, instead of ending in `TransferTimeout`: it ends the
        transfer with what there is, or knows that somebody is about to.
    on_wait : callable, optional
        Called once, by the first who waits for as long as it takes: it may do what is waited for.
    """

    def __init__(
        self,
        *,
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_deadline: Callable[[], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_deadline = on_deadline
        self._on_wait = on_wait
        self._deadline = None if deadline_s is None else clock() + deadline_s
        self._lock = threading.Lock()  # entered as such: an interrupt cannot come between taking and giving it back
        self._condition: threading.Condition | None = None  # made by the first who waits
        self._state = TransferState.PENDING
        self._result: ResultT | None = None
        self._error: BaseException | None = None
        self._has_landed = False
        self._is_expiring = False  # somebody has begun to end it because of its deadline
        self._callbacks: list[Callable[[Transfer[ResultT]], None]] = []  # until it has ended
        self._landed_callbacks: list[Callable[[Transfer[ResultT]], None]] = []  # until its bytes have landed too

    @classmethod
    def completed(cls, result: ResultT) -> Transfer[ResultT]:
        """Make a transfer that is done already."""
        transfer = cls()
        transfer.set_result(result)
        return transfer

    # -- for the caller ----------------------------------------------------------------------------------------

    @property
    def state(self) -> TransferState:
        """How far the transfer is, its deadline looked at."""
        self._look_at_deadline()
        return self._state

    @property
    def is_draining(self) -> bool:
        """Whether it has ended for its waiter while its bytes may still move."""
        return self.state is not TransferState.PENDING and not self._has_landed

    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.state is not TransferState.PENDING

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.state is TransferState.CANCELLED

    def cancel(self) -> bool:
        """End it for its waiter; False when it had ended already."""
        return self._end(TransferState.CANCELLED, error=TransferCancelled("the transfer was cancelled"))

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it has ended or `timeout` seconds are over; return whether it has ended."""
        on_wait, self._on_wait = self._on_wait, None if timeout is None else self._on_wait
        if timeout is None and on_wait is not None:
            on_wait()
        if self.done():
            return True
        if timeout is not None and timeout <= 0:
            return False
        with standing_aside():
            return self._wait_until(None if timeout is None else self._clock() + timeout)

    def _wait_until(self, give_up: float | None) -> bool:
        while not self.done():
            with self._lock:
                if self._state is not TransferState.PENDING:
                    continue
                now = self._clock()
                if give_up is not None and now >= give_up:
                    return False
                deadline = None if self._is_expiring else self._deadline
                limits = [limit - now for limit in (give_up, deadline) if limit is not None]
                if self._condition is None:
                    self._condition = threading.Condition(self._lock)
                self._condition.wait(min(*limits, threading.TIMEOUT_MAX) if limits else None)
        return True

    def result(self, timeout: float | None = None) -> ResultT:
        """Wait for the result.

        Raises
        ------
        TransferTimeout
            Its deadline passed, or `timeout` seconds did (it then goes on, and may be waited for again).
        TransferCancelled
        Exception
            What made it fail.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._result  # type: ignore[return-value]  # done without an error: set_result gave it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and give the error, None when it is done; raises as `result` when `timeout` passes."""
        if not self.wait(timeout):
            raise TransferTimeout(f"the transfer did not end within {timeout} s; it goes on")
        return self._error

    def add_done_callback(self, callback: Callable[[Transfer[ResultT]], None]) -> None:
        """Call back with this transfer once it has ended: at once, or in the thread that ends it."""
        with self._lock:
            if self._state is TransferState.PENDING:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def add_landed_callback(self, callback: Callable[[Transfer[ResultT]], None]) -> None:
        """Call back with this transfer once it has ended and no byte of it moves any more: what it used is free.

        Parameters
        ----------
        callback : callable
            Takes this transfer; called once, at once where that is so already, else in the thread that says the last of
            the two. When one call says both, what was given to `add_done_callback` is called before it.

        Notes
        -----
        Does not block. A transfer whose deadline is over ends when somebody looks at it, as for `add_done_callback`.
        """
        with self._lock:
            if self._state is TransferState.PENDING or not self._has_landed:
                self._landed_callbacks.append(callback)
                return
        self._call(callback)

    def __await__(self) -> Generator[Any, None, ResultT]:
        import asyncio  # here, because it would be a third of the time that importing kvbm takes

        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle | None = None

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def wake_loop(_: Transfer[ResultT]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(wake)

        def look() -> None:
            nonlocal timer
            self._look_at_deadline()
            timer = look_later()  # the loop's clock may run ahead of ours

        def look_later() -> asyncio.TimerHandle | None:
            if self._deadline is None or self._state is not TransferState.PENDING:
                return None
            return loop.call_later(min(max(1e-3, self._deadline - self._clock()), _LONGEST_TIMER_S), look)

        self.add_done_callback(wake_loop)
        timer = look_later()
        try:
            yield from ended
        finally:
            if timer is not None:
                timer.cancel()
        return self.result(0)

    def __repr__(self) -> str:
        return f"Transfer({self.state.value}{', draining' if self.is_draining else ''})"

    # -- for whoever moves the bytes ---------------------------------------------------------------------------

    def set_result(self, result: ResultT, *, has_landed: bool = True) -> bool:
        """End it with a result; unless said otherwise the bytes have landed. False when it had ended before."""
        return self._end(TransferState.DONE, result=result, has_landed=has_landed)

    def set_exception(self, error: BaseException, *, has_landed: bool = True) -> bool:
        """End it with an error; unless said otherwise the bytes have stopped. False when it had ended before."""
        return self._end(TransferState.FAILED, error=error, has_landed=has_landed)

    def set_landed(self) -> None:
        """Say that no byte of it moves any more; may be said again."""
        with self._lock:
            self._has_landed = True
            callbacks = self._take_landed_callbacks()
        for callback in callbacks:
            self._call(callback)

    # -- private -----------------------------------------------------------------------------------------------

    def _look_at_deadline(self) -> None:
        if self._state is not TransferState.PENDING or self._deadline is None or self._clock() < self._deadline:
            return
        with self._lock:
            if self._is_expiring:  # another thread, or on_deadline itself, looks too
                return
            self._is_expiring = True
        on_deadline = self._on_deadline
        if on_deadline is not None:
            try:
                on_deadline()
                return
            except Exception:
                _log.exception("what a transfer does at its deadline failed: %r", on_deadline)
            except BaseException:  # ctrl-C: the next who looks does it
                self._is_expiring = False
                raise
        self._end(TransferState.TIMED_OUT, error=TransferTimeout("the transfer did not end before its deadline"))

    def _end(
        self,
        state: TransferState,
        *,
        result: ResultT | None = None,
        error: BaseException | None = None,
        has_landed: bool = False,
    ) -> bool:
        callbacks: list[Callable[[Transfer[ResultT]], None]] = []
        with self._lock:
            self._has_landed |= has_landed
            is_first = self._state is TransferState.PENDING
            if is_first:
                self._result, self._error = result, error
                self._state = state
                # They may know us: whoever forgets a transfer forgets its blocks at once.
                self._on_deadline = self._on_wait = None
                callbacks, self._callbacks = self._callbacks, callbacks
                if self._condition is not None:
                    self._condition.notify_all()
            callbacks += self._take_landed_callbacks()
        for callback in callbacks:
            self._call(callback)
        return is_first

    def _take_landed_callbacks(self) -> list[Callable[[Transfer[ResultT]], None]]:
        """Take out those to call now, under the lock."""
        taken: list[Callable[[Transfer[ResultT]], None]] = []
        if self._landed_callbacks and self._has_landed and self._state is not TransferState.PENDING:
            taken, self._landed_callbacks = self._landed_callbacks, taken
        return taken

    def _call(self, callback: Callable[[Transfer[ResultT]], None]) -> None:
        try:
            callback(self)
        except Exception:
            _log.exception("a callback of a transfer failed: %r", callback)
