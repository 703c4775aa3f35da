"""How jobs reach the half that moves bytes: the contract of a channel, and the channel within one process.

`LocalChannel` runs each route of tiers on a thread of its own, so a slow disk never holds up host memory, and urgent
jobs before others. Small urgent ones run in the caller's thread, because a hand-over between threads costs about
70 us. A job that raises is answered as failed: a result always comes. Whoever takes a result may wait for a `Transfer`
there, also for one that needs the same route: another thread works meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvbm.errors import PoolClosed
from kvbm.jobs.aside import answering_for
from kvbm.jobs.messages import CopyJob, InventoryJob, Job, JobResult, Outcome, answer_all

_log = logging.getLogger("kvbm.jobs")
_BACKGROUND_NICENESS = 10
_IO_THREADS = 2  # of a route to or from a storage without addresses: one job moves while the other begins or ends

Execute = Callable[[Job, "float | None"], JobResult]
Receive = Callable[[JobResult], None]


class JobChannel(Protocol):
    """One rank's executor, as bookkeeping sees it.

    Every job sent is answered once through the `receive` given to `open`, in any order and any thread, also before
    `send` returns; or else `lost` is called, once, and nothing after it. It says that the executor is dead or quiet:
    no byte of its jobs moves any more. A `send` that raises has not taken the job.
    """

    def open(self, receive: Receive, lost: Callable[[str], None]) -> None:
        """Say where results go, and whom to tell that the executor is dead."""

    def send(self, job: Job) -> None:
        """Hand a job over; never waits for the work."""

    def revoke(self, job_id: int) -> bool:
        """Answer a job as late at once if it was not begun; return whether that was so, as far as this side knows."""

    def knows(self, job_id: int) -> bool:
        """Whether a job was taken and is not answered, as far as this side knows; True is always right."""

    def run_here(self, job_id: int) -> bool:
        """Run a job in this thread that was not begun and that cannot hang; return whether it was done.

        Whoever waits for a copy between memories makes it rather than be woken twice; False is always right.
        """

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs; wait for those sent; return whether they all ended in time."""


class LocalChannel:
    """An executor in this process.

    Parameters
    ----------
    execute : callable
        Takes a job and the moment (of `clock`) at which its time is over, or None; gives its result.
    is_small : callable, optional
        Whether an urgent job is small enough for the thread that sends it; None: no job is.
    is_bounded : callable, optional
        Whether a job cannot hang, so that whoever waits for it may run it; None: no job is.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        execute: Execute,
        *,
        is_small: Callable[[Job], bool] | None = None,
        is_bounded: Callable[[Job], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._execute = execute
        self._is_small = is_small
        self._is_bounded = is_bounded
        self._clock = clock
        self._receive: Receive | None = None
        self._lock = threading.Condition(threading.Lock())  # guards what follows; never held while a job runs
        self._lanes: dict[tuple[str, bool], _Lane] = {}
        self._callers: list[int] = []  # threads that run a job of their own, by ident
        self._is_closed = False

    def open(self, receive: Receive, lost: Callable[[str], None]) -> None:
        """Say where results go; an executor in this process is never lost."""
        self._receive = receive

    def send(self, job: Job) -> None:
        """Run a small urgent job here, queue any other for its route's thread."""
        deadline = None
        if isinstance(job, CopyJob) and job.timeout_s is not None:
            deadline = self._clock() + job.timeout_s
        is_small = self._is_small is not None and isinstance(job, CopyJob) and job.is_alone and self._is_small(job)
        caller = threading.get_ident()
        with self._lock:
            if self._is_closed:
                raise PoolClosed("the channel to the executor is closed")
            if not is_small:
                name = _lane_of(job)
                is_urgent = isinstance(job, CopyJob) and job.is_urgent
                lane = self._lanes.get((name, is_urgent))
                if lane is None:
                    num_threads = _IO_THREADS if isinstance(job, CopyJob) and not self._is_one_copy(job) else 1
                    lane = self._lanes[name, is_urgent] = _Lane(
                        name, self._run, is_urgent=is_urgent, num_threads=num_threads
                    )
                lane.put(job, deadline)  # under the lock: a lane that was told to finish takes nothing more
                return
            self._callers.append(caller)
        self._run_as_caller(job, deadline)

    def _is_one_copy(self, job: Job) -> bool:
        return self._is_bounded is None or self._is_bounded(job)

    def _run_as_caller(self, job: Job, deadline: float | None) -> None:
        try:
            self._run(job, deadline)
        finally:
            with self._lock:
                self._callers.remove(threading.get_ident())
                self._lock.notify_all()

    def knows(self, job_id: int) -> bool:
        """Whether a job waits or runs."""
        with self._lock:
            lanes = list(self._lanes.values())
        return any(lane.knows(job_id) for lane in lanes)

    def run_here(self, job_id: int) -> bool:
        """Run a job in this thread that no thread has begun and that cannot hang; return whether it was done."""
        if self._is_bounded is None:
            return False
        with self._lock:
            found = [entry for lane in self._lanes.values() for entry in lane.take_back(job_id, self._is_bounded)]
            self._callers.extend(threading.get_ident() for _ in found)
        for job, deadline in found:
            self._run_as_caller(job, deadline)
        return bool(found)

    def revoke(self, job_id: int) -> bool:
        """Answer a job as late at once if no thread has begun it; return whether that was so."""
        with self._lock:
            lanes = list(self._lanes.values())
        revoked = [job for lane in lanes for job, _ in lane.take_back(job_id)]
        self._answer_late(revoked, "its time was over before it began")
        return bool(revoked)

    def abandon(self) -> None:
        """Answer as late what no thread has begun; nobody wants it any more."""
        with self._lock:
            self._is_closed = True
            lanes = list(self._lanes.values())
        self._answer_late([job for lane in lanes for job, _ in lane.take_back(None)], "it was abandoned")

    def _answer_late(self, jobs: list[Job], reason: str) -> None:
        assert self._receive is not None, "a channel is opened before it is used"
        for job in jobs:
            self._receive(answer_all(job, Outcome.LATE, reason))

    def close(self, timeout_s: float | None = None) -> bool:
        """Run what was sent and end the threads; return whether they ended in time."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.finish()
        are_ended = [lane.join(give_up) for lane in lanes]  # every one is given its time
        me = threading.get_ident()  # a callback of a small job closes: it cannot wait for itself
        with self._lock:
            is_idle = self._lock.wait_for(lambda: all(caller == me for caller in self._callers), remaining_s(give_up))
        return all(are_ended) and is_idle

    def _run(self, job: Job, deadline: float | None, crew: _Lane | None = None) -> None:
        assert self._receive is not None, "a channel is opened before it is used"
        try:
            result = self._execute(job, deadline)
        except BaseException as error:  # executors answer; one that raises is a defect, and the waiter must hear of it
            _log.exception("job failed job_id=%d kind=%s", job.job_id, type(job).__name__)
            is_defect = isinstance(error, Exception)
            outcome = Outcome.FAILED if is_defect else Outcome.LATE  # after ctrl-C the source may be as good as ever
            with answering_for(crew):
                self._receive(answer_all(job, outcome, repr(error)))
            if not is_defect:
                raise
        else:
            with answering_for(crew):
                self._receive(result)


class _Lane:
    """Threads and what waits for them, urgent jobs first; the second thread starts when a second job waits.

    One that waits while it hands over a result is counted as gone, and another may start in its place.
    """

    def __init__(
        self, name: str, run: Callable[[Job, float | None, _Lane], None], *, is_urgent: bool, num_threads: int
    ) -> None:
        self._run = run
        self._is_urgent = is_urgent
        self._urgent: deque[tuple[Job, float | None]] = deque()
        self._others: deque[tuple[Job, float | None]] = deque()
        self._lock = threading.Lock()  # entered as such: an interrupt cannot come between taking and giving it back
        self._has_work = threading.Condition(self._lock)
        self._is_finishing = False
        self._name = f"kvbm-{name}"
        self._num_threads = num_threads
        self._num_idle = 0  # threads that wait for a job, or have yet to begin
        self._num_present = 0  # threads that work or are idle
        self._running: set[int] = set()
        self._threads: list[threading.Thread] = []
        with self._lock:
            self._start_thread()

    def put(self, job: Job, deadline: float | None) -> None:
        with self._lock:
            (self._urgent if isinstance(job, CopyJob) and job.is_urgent else self._others).append((job, deadline))
            self._grow()
            self._has_work.notify()

    def leave(self) -> None:
        """Count this thread, which is about to wait, as gone."""
        with self._lock:
            self._num_present -= 1
            self._grow()

    def come_back(self) -> None:
        """Count it again; whoever is one too many then leaves at its next look."""
        with self._lock:
            self._num_present += 1

    def _grow(self) -> None:
        """Start a thread where jobs wait for one, under the lock."""
        if len(self._urgent) + len(self._others) > self._num_idle and self._num_present < self._num_threads:
            with contextlib.suppress(RuntimeError):  # those that there are do with that
                self._start_thread()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        thread.start()
        self._num_present += 1
        self._num_idle += 1
        self._threads = [*(known for known in self._threads if known.is_alive()), thread]

    def take_back(
        self, job_id: int | None, is_wanted: Callable[[Job], bool] = lambda job: True
    ) -> list[tuple[Job, float | None]]:
        """Take out a job that waits, or all of them, with their deadlines."""
        with self._lock:
            taken: list[tuple[Job, float | None]] = []
            for waiting in (self._urgent, self._others):
                kept: list[tuple[Job, float | None]] = []
                for entry in waiting:
                    is_meant = job_id is None or entry[0].job_id == job_id
                    (taken if is_meant and is_wanted(entry[0]) else kept).append(entry)
                if len(kept) < len(waiting):
                    waiting.clear()
                    waiting.extend(kept)
            return taken

    def knows(self, job_id: int) -> bool:
        with self._lock:
            return job_id in self._running or any(job.job_id == job_id for job, _ in (*self._urgent, *self._others))

    def finish(self) -> None:
        with self._lock:
            self._is_finishing = True
            self._has_work.notify_all()

    def join(self, give_up: float | None) -> bool:
        # A callback may close the manager from one of them, which cannot wait for itself.
        me = threading.current_thread()
        while others := [thread for thread in self._threads if thread is not me and thread.is_alive()]:
            for thread in others:
                thread.join(remaining_s(give_up))
            if remaining_s(give_up) == 0 and any(thread.is_alive() for thread in others):
                return False
        return True  # also those that began meanwhile, in the place of others

    def _work(self) -> None:
        if not self._is_urgent:
            _let_others_go_first()
        while True:
            with self._lock:
                is_one_too_many = self._num_present > self._num_threads  # it stood in for one that is back
                while not (self._urgent or self._others or self._is_finishing or is_one_too_many):
                    self._has_work.wait()
                self._num_idle -= 1
                if is_one_too_many or not (self._urgent or self._others):
                    self._num_present -= 1
                    return
                job, deadline = (self._urgent or self._others).popleft()
                self._running.add(job.job_id)
            try:
                self._run(job, deadline, self)
            except BaseException:  # the jobs behind it still want their answers
                _log.exception("a result could not be taken job_id=%d", job.job_id)
            self._running.discard(job.job_id)
            del job
            with self._lock:
                self._num_idle += 1


def _let_others_go_first() -> None:
    """Lower this thread's claim to the processor, and that of threads it starts: nobody waits for what they copy."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone can do that for one thread
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)


def remaining_s(give_up: float | None) -> float | None:
    """Give the seconds until a moment of the monotonic clock, as threads may wait them; None for ever."""
    return None if give_up is None else min(max(0.0, give_up - time.monotonic()), threading.TIMEOUT_MAX)


def _lane_of(job: Job) -> str:
    if isinstance(job, CopyJob):
        return f"{job.source.value}-{job.destination.value}"
    # A listing may take long, and what is asked or forgotten meanwhile does not wait for it.
    return f"{job.tier.value}-{'listing' if isinstance(job, InventoryJob) else 'index'}"
