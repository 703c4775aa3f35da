"""Channels that travel with an engine's steps: jobs go out with the next orders, results come back with a report.

All ranks get the same jobs, so a job that the planner sends to each of them is in the orders once. Where rank 0 owns
one copy for all, the planner sees one executor: what touches the engine's memory is answered by every rank, and the
worst counts, anything else by rank 0. Nothing here is ever waited for: an engine that makes no steps moves no bytes.
Called from the scheduler's thread; safe from any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from kvbm.errors import PoolClosed
from kvbm.jobs import CopyJob, InventoryJob, Job, JobResult, Outcome
from kvbm.jobs.channel import Receive
from kvbm.types import Tier

_log = logging.getLogger("kvbm.engines")

_WORTH_S = (
    30.0  # that an engine without requests goes on for a job's answer, or the job's own time where that is longer
)


class StepChannels:
    """The channels to all ranks of an engine.

    Parameters
    ----------
    num_ranks : int
    is_shared : bool
        Rank 0 owns the tiers of all.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    channels : list of StepChannel
        For the planner: one for each rank, or one for all of them.
    """

    def __init__(self, num_ranks: int, *, is_shared: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_ranks = num_ranks
        self._is_shared = is_shared
        self.channels = [StepChannel(self, rank) for rank in range(1 if is_shared else num_ranks)]
        self._clock = clock
        self._lock = threading.Lock()
        self._outgoing: dict[int, Job] = {}
        self._open: dict[int, set[int]] = {}  # job -> ranks that have not answered
        self._parts: dict[int, list[JobResult]] = {}  # of jobs that several ranks answer as one
        self._until: dict[int, float] = {}  # job -> moment until which steps are made for its answer
        self._inventories: dict[tuple[int, Tier], JobResult] = {}
        self.is_closed = False

    def know(self, rank: int, tier: Tier, inventory: JobResult) -> None:
        """Keep what a rank said of a tier when it was opened: the question for it is answered with that."""
        self._inventories[rank, tier] = inventory

    def take_jobs(self) -> list[Job]:
        """Give what was sent since the last call, in order."""
        with self._lock:
            jobs = list(self._outgoing.values())
            self._outgoing.clear()
        return jobs

    @property
    def has_jobs(self) -> bool:
        """Whether steps are worth making: jobs wait for the next orders, or for answers that are still likely.

        A disk that hangs must not keep an idle engine stepping, nor from going to sleep. What it answers after all
        comes with the engine's next step.
        """
        with self._lock:
            if self._outgoing or not self._open:
                return bool(self._outgoing)
            now = self._clock()
            return any(now < until for until in self._until.values())

    @property
    def has_open_jobs(self) -> bool:
        """Whether a job was sent and has not been answered by all, however long ago."""
        return bool(self._open)

    def receive(self, rank: int, results: Iterable[JobResult]) -> None:
        """Hand over what a rank has answered."""
        channel = self.channels[0 if self._is_shared else rank]
        for result in results:
            with self._lock:
                ranks = self._open.get(result.job_id)
                is_known = ranks is not None and rank in ranks
                is_last = False
                if ranks is not None:
                    ranks.discard(rank)
                    is_last = not ranks
                    if is_last:
                        del self._open[result.job_id], self._until[result.job_id]
                whole = self._add(result, is_last) if self._is_shared and is_known else result
            if not is_known:
                _log.warning("answer to no open job rank=%d job_id=%d", rank, result.job_id)
            elif whole is not None:
                channel.answer(whole)

    def _add(self, result: JobResult, is_last: bool) -> JobResult | None:
        """Keep a rank's answer, under the lock; with the last one give the answer of all."""
        self._parts.setdefault(result.job_id, []).append(result)
        return _join(self._parts.pop(result.job_id)) if is_last else None

    # -- for the channels --------------------------------------------------------------------------------------

    def put(self, rank: int, job: Job) -> None:
        """Note a job of one rank, or answer it at once."""
        if isinstance(job, InventoryJob) and (known := self._inventories.pop((rank, job.tier), None)) is not None:
            self.channels[rank].answer(msgspec.structs.replace(known, job_id=job.job_id))
            return
        with self._lock:
            if self.is_closed:
                raise PoolClosed("the engine is closing: it makes no more steps")
            ranks = self._open.get(job.job_id)
            if ranks is None:
                is_for_all = (
                    self._is_shared and isinstance(job, CopyJob) and Tier.DEVICE in (job.source, job.destination)
                )
                self._open[job.job_id] = set(range(self._num_ranks)) if is_for_all else {rank}
                timeout_s = job.timeout_s if isinstance(job, CopyJob) else None
                self._until[job.job_id] = self._clock() + max(_WORTH_S, timeout_s or 0.0)
                self._outgoing[job.job_id] = job
            else:
                ranks.add(rank)

    def knows(self, rank: int, job_id: int) -> bool:
        """Whether a rank has been sent a job and has not answered."""
        with self._lock:
            return job_id in self._open if self._is_shared else rank in self._open.get(job_id, ())


class StepChannel:
    """One rank of an engine, as the planner sees it; see `JobChannel`.

    Parameters
    ----------
    group : StepChannels
    rank : int
    """

    def __init__(self, group: StepChannels, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._receive: Receive | None = None

    def open(self, receive: Receive, lost: Callable[[str], None]) -> None:
        """Say where results go; an engine that loses a worker ends as a whole."""
        self._receive = receive

    def send(self, job: Job) -> None:
        """Put a job into the next orders."""
        self._group.put(self._rank, job)

    def answer(self, result: JobResult) -> None:
        """Hand a result over."""
        assert self._receive is not None, "a channel is opened before it is used"
        self._receive(result)

    def revoke(self, job_id: int) -> bool:
        """Nothing: all ranks must get the same jobs, and another may have its orders already."""
        return False

    def knows(self, job_id: int) -> bool:
        """Whether a job was sent and is not answered."""
        return self._group.knows(self._rank, job_id)

    def run_here(self, job_id: int) -> bool:
        """Nothing: the bytes lie with the workers."""
        return False

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs; return whether all were answered: there may be no further step to answer in."""
        self._group.is_closed = True
        return not self._group.has_open_jobs


def _join(parts: list[JobResult]) -> JobResult:
    """Put the answers of several ranks together: a block is as good as the worst of them says."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if len({len(part.outcomes) for part in parts}) > 1:  # not of this version: nobody can say which block is meant
        counts = [len(part.outcomes) for part in parts]
        outcomes = np.full(max(counts), Outcome.FAILED, dtype=np.uint8)
        return JobResult(job_id=first.job_id, outcomes=outcomes, reason=f"ranks answered for {counts} blocks")
    return JobResult(
        job_id=first.job_id,
        outcomes=np.maximum.reduce([part.outcomes for part in parts]),
        nbytes=sum(part.nbytes for part in parts),
        seconds=max(part.seconds for part in parts),
        reason=next((part.reason for part in parts if part.reason), ""),
        is_away=any(part.is_away for part in parts),
    )
