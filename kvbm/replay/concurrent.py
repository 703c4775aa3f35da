"""Sends the requests of a trace through a manager from several threads at once.

Requests start in the order given, a session's next one only after its previous one has ended, and only when the blocks
it will hold fit into the top tier beside those of the requests that run. So no request ever waits for another one that
waits: the only thing they wait for is offloads under way, which end by themselves. One condition guards the schedule;
it is never held while a request runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.replay.report import Baseline, ReplayReport
from kvbm.replay.request import hashes_of, serve
from kvbm.replay.run import FLUSH_TIMEOUT_S, ROOM_TIMEOUT_S, OnServed
from kvbm.replay.traces import TraceRequest
from kvbm.types import HashArray

_PROGRESS_S = 0.1
_LOOK_AHEAD = 256  # requests read to find one whose session is free

Wait = Callable[[threading.Condition, float | None], object]


def replay_concurrently(
    manager: BlockManager,
    requests: Iterable[TraceRequest],
    *,
    concurrency: int = 8,
    speed: float | None = None,
    report: ReplayReport | None = None,
    on_progress: Callable[[ReplayReport], None] | None = None,
    on_served: OnServed | None = None,
    now: Callable[[], float] = time.monotonic,
    wait: Wait = threading.Condition.wait,
) -> ReplayReport:
    """Replay requests from several threads.

    Parameters
    ----------
    manager : BlockManager
    requests : iterable of TraceRequest
        In order of time; read as they are needed.
    concurrency : int
        Threads, and so requests at once.
    speed : float, optional
        Each request waits for its time, with time running so many times faster. None: as fast as it goes, but each
        request keeps its blocks until they are offloaded, as it would while its answer is generated.
    report : ReplayReport, optional
        Filled as the replay goes; its `seconds` is the time from the first request to the last.
    on_progress : callable, optional
        Called with the report now and then, in the caller's thread.
    on_served : callable, optional
        Told of each request that has ended, in any thread: which of those given, its hashes, and what came of it.
    now, wait : callable
        The clock, in seconds, and how to wait for a condition for so many of them.

    Returns
    -------
    ReplayReport

    Raises
    ------
    ConfigError
        No thread, or time that stands still.
    TransferTimeout
        What is under way at the end does not end within two minutes.

    Notes
    -----
    What a thread raises ends the replay and is raised here, when every thread has ended.
    """
    if concurrency < 1:
        raise ConfigError(f"a concurrency of {concurrency} is impossible, give 1 or more")
    if speed is not None and not speed > 0:
        raise ConfigError(f"a speed of {speed} is impossible, give more than 0")
    report = ReplayReport() if report is None else report
    baseline = Baseline(manager)
    schedule = _Schedule(manager, requests, speed=speed, now=now, wait=wait)
    flush_timeout_s = FLUSH_TIMEOUT_S if speed is None else None
    began, seconds_before = time.perf_counter(), report.seconds

    def work() -> None:
        try:
            while (task := schedule.start()) is not None:
                try:
                    served = serve(manager, task.hashes, timeout_s=ROOM_TIMEOUT_S, flush_timeout_s=flush_timeout_s)
                finally:
                    schedule.end(task)
                if report.add(served, until=seconds_before + time.perf_counter() - began):
                    report.take_point(manager)
                if on_served is not None:
                    on_served(task.index, task.hashes, served)
        except BaseException as error:
            schedule.stop(error)

    threads = [threading.Thread(target=work, name=f"kvbm-replay-{i}", daemon=True) for i in range(concurrency)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_PROGRESS_S)
                if on_progress is not None:
                    on_progress(report)
        schedule.raise_error()
        manager.flush(FLUSH_TIMEOUT_S)
    except BaseException:
        report.is_partial = True
        raise
    finally:
        schedule.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        report.take_point(manager)
        baseline.conclude(report)
    return report


@dataclass(frozen=True, eq=False)
class _Task:
    """A request that may run once its session is free, its time has come and its blocks fit."""

    index: int  # in the order given
    hashes: HashArray
    session: str
    due_at: float
    num_blocks: int  # that it will hold


class _Schedule:
    """Says which request is next; see the module.

    Parameters
    ----------
    manager, requests, speed, now, wait
        See `replay_concurrently`.
    """

    def __init__(
        self,
        manager: BlockManager,
        requests: Iterable[TraceRequest],
        *,
        speed: float | None,
        now: Callable[[], float],
        wait: Wait,
    ) -> None:
        self._manager = manager
        self._requests: Iterator[TraceRequest] | None = iter(requests)
        self._speed = speed
        self._now = now
        self._wait = wait
        self._changed = threading.Condition(threading.Lock())
        self._began_at: float | None = None  # when time 0 of the trace is
        self._waiting: list[_Task] = []  # in order
        self._sessions: set[str] = set()  # that have a request running
        self._num_blocks = 0  # of the requests that run
        self._num_read = 0  # requests
        self._is_over = False
        self._error: BaseException | None = None

    def start(self) -> _Task | None:
        """Give the next request, when it may run; None when there is none."""
        with self._changed:
            while not self._is_over:
                self._read()
                if not self._waiting and self._requests is None:
                    break
                task = next((task for task in self._waiting if task.session not in self._sessions), None)
                remaining_s = None if task is None else task.due_at - self._now()
                if task is not None and remaining_s is not None and remaining_s > 0:
                    self._wait(self._changed, remaining_s)
                elif task is not None and self._fits(task):
                    self._waiting.remove(task)
                    self._num_blocks += task.num_blocks
                    if task.session:
                        self._sessions.add(task.session)
                    return task
                else:
                    self._wait(self._changed, None)
            self._changed.notify_all()
        return None

    def end(self, task: _Task) -> None:
        """Make room for others."""
        with self._changed:
            self._num_blocks -= task.num_blocks
            self._sessions.discard(task.session)
            self._changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Start no further request; remember why."""
        with self._changed:
            self._is_over = True
            self._error = self._error or error
            self._changed.notify_all()

    def raise_error(self) -> None:
        """Raise what a thread ended with."""
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        """Read ahead until there is a request whose session is free, or enough wait."""
        while self._requests is not None and len(self._waiting) < _LOOK_AHEAD:
            if any(task.session not in self._sessions for task in self._waiting):
                return
            request = next(self._requests, None)
            if request is None:
                self._requests = None
            else:
                hashes = hashes_of(self._manager, request)
                num_held = len(hashes) if len(hashes) <= self._manager.top.total_blocks else 0  # it will be refused
                self._waiting.append(_Task(self._num_read, hashes, request.session, self._due_at(request), num_held))
                self._num_read += 1

    def _due_at(self, request: TraceRequest) -> float:
        if self._speed is None:
            return self._now()
        if self._began_at is None:
            self._began_at = self._now() - request.time_s / self._speed
        return self._began_at + request.time_s / self._speed

    def _fits(self, task: _Task) -> bool:
        """Whether it may run beside those that do; alone it always may."""
        return self._num_blocks + task.num_blocks <= self._manager.top.total_blocks
