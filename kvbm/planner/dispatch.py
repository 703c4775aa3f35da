"""Jobs on their way: who was sent what, who has answered, who is dead. Owns the planner's lock.

A job is opened under the lock and sent after it is free. Whatever happens to the thread that sends, each job that was
opened is answered: what could not be handed over is answered here, as late. Told of every settled job: `changed`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from kvbm.errors import PluginError
from kvbm.jobs import Job, JobChannel, JobResult, Outcome
from kvbm.jobs.messages import answer_all
from kvbm.planner.ledger import After, Ledger, OpenJob

_log = logging.getLogger("kvbm.planner")

Settle = Callable[[OpenJob], Iterable[After]]
Unsent = deque[tuple[int, Job]]  # of each job opened, the ranks that it was not handed to


class Dispatcher:
    """Sends jobs to every rank and brings their answers to whoever opened them.

    Parameters
    ----------
    channels : sequence of JobChannel
        One for each rank.
    clock : callable
        Gives seconds; monotonic.
    settling : callable
        Told of each job that is about to be settled, under the lock.
    losing : callable
        Told of a rank that is dead, under the lock.
    settled : callable
        Told after each answer, without the lock.
    """

    def __init__(
        self,
        channels: Sequence[JobChannel],
        *,
        clock: Callable[[], float],
        settling: Callable[[OpenJob], None],
        losing: Callable[[int, str], None],
        settled: Callable[[], None],
    ) -> None:
        self.ledger = Ledger()
        self._channels = tuple(channels)
        self._clock = clock
        self._settling = settling
        self._losing = losing
        self._settled = settled
        self._lock: Any = threading.RLock()  # for it tells its owner; nobody ever holds it twice
        self.changed = threading.Condition(self._lock)
        self._own = threading.local()

    def start(self) -> None:
        """Listen to the channels."""
        for rank, channel in enumerate(self._channels):
            channel.open(partial(self._receive, rank), partial(self._lose, rank))

    def locked(self) -> AbstractContextManager[Any]:
        """Give the lock, to be entered; raise `PluginError` where this thread has it already."""
        if self._lock._is_owned():
            raise PluginError("a policy, or a finaliser inside it, must not call back into the manager")
        return self._lock  # type: ignore[no-any-return]

    def open(self, job: Job, settle: Settle, timeout_s: float, unsent: Unsent) -> None:
        """Note a job, under the lock, and what of it is to be sent."""
        ranks = range(len(self._channels))
        self.ledger.open(job, ranks, settle, now=self._clock(), timeout_s=timeout_s)
        unsent.extend((rank, job) for rank in ranks)

    def send(self, unsent: Unsent) -> None:
        """Hand jobs over, without the lock."""
        if not unsent:
            return
        try:
            while unsent:
                rank, job = unsent[0]  # it stays there until it was handed over
                try:
                    self._channels[rank].send(job)
                except Exception as error:  # it was not taken: its sources are as good as ever
                    self._receive(rank, answer_all(job, Outcome.LATE, str(error)))
                unsent.popleft()
        except BaseException:  # ctrl-C: perhaps in the middle of handing one over
            self._give_up_first(unsent)
            self.give_up(unsent)
            raise

    def _give_up_first(self, unsent: Unsent) -> None:
        """Answer a job that may have been handed over, unless its channel will."""
        if unsent:
            rank, job = unsent[0]
            channel = self._channels[rank]
            if channel.revoke(job.job_id) or channel.knows(job.job_id):
                unsent.popleft()

    def give_up(self, unsent: Unsent) -> None:
        """Answer what was opened and will not be sent."""
        while unsent:
            rank, job = unsent.popleft()
            self._receive(rank, answer_all(job, Outcome.LATE, "its sender was interrupted"))

    def revoke(self, jobs: Iterable[Job]) -> None:
        """Take jobs back whose time is over and that no executor has begun, without the lock."""
        for job in jobs:
            for channel in self._channels:
                channel.revoke(job.job_id)

    def run_here(self, job: Job) -> None:
        """Run a job in this thread that no executor has begun and that cannot hang, without the lock."""
        for channel in self._channels:
            channel.run_here(job.job_id)

    @property
    def is_answering(self) -> bool:
        """Whether this thread is in a callback of something that it has just settled."""
        return getattr(self._own, "is_answering", False)

    def close(self, timeout_s: float | None) -> bool:
        """Close every channel; return whether all ended in time."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        are_ended = [
            channel.close(None if give_up is None else max(0.0, give_up - time.monotonic()))
            for channel in self._channels
        ]
        return all(are_ended)

    # -- private -----------------------------------------------------------------------------------------------

    def _receive(self, rank: int, result: JobResult) -> None:
        with self.locked():
            entry = self.ledger.answer(rank, result)
            ends = [] if entry is None else self._settle(entry)
            self.changed.notify_all()
        self._finish(ends)

    def _lose(self, rank: int, reason: str) -> None:
        with self.locked():
            self._losing(rank, reason)
            ends = [end for entry in self.ledger.lose(rank, reason) for end in self._settle(entry)]
            self.changed.notify_all()
        self._finish(ends)

    def _settle(self, entry: OpenJob) -> list[After]:
        try:
            self._settling(entry)
            return list(entry.settle(entry))
        except Exception:  # a plugged policy, as a rule; the guards of the job give back what it held
            _log.exception("job could not be settled job_id=%d", entry.job.job_id)
            return []

    def _finish(self, ends: Iterable[After]) -> None:
        was_answering, self._own.is_answering = self.is_answering, True
        try:
            run_all(ends)
        finally:
            self._own.is_answering = was_answering
        self._settled()


def run_all(calls: Iterable[After]) -> None:
    """Call each, also when one before it raises; then raise the first error."""
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:  # ctrl-C: those behind it have their waiters too
            first = first or error
    if first is not None:
        raise first
