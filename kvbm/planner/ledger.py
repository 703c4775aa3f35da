"""Open jobs: who still has to answer, and what those who have said.

A job is settled when every rank has answered or is known dead; a block is good when all ranks say so. Until then its
sources and targets stay held, whatever became of its waiter. The planner's lock guards it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvbm.jobs import Job, JobResult, Outcome
from kvbm.jobs.messages import num_blocks_of

_log = logging.getLogger("kvbm.planner")
_OK = int(Outcome.OK)  # comparing an array with a plain number is three times as fast

After = Callable[[], None]  # to be called once the planner's lock is free


@dataclass
class OpenJob:
    """One job that was sent."""

    job: Job
    settle: Callable[[OpenJob], Iterable[After]]  # called under the planner's lock, once
    waiting: set[int]  # ranks
    outcomes: npt.NDArray[np.uint8]
    sent_at: float
    due_at: float
    is_draining: bool = False  # its time is over
    is_too_late: bool = False  # it is settled after the pools were closed: let go of what it holds
    seconds: float = 0.0
    reasons: dict[str, None] = field(default_factory=dict)
    results: dict[int, JobResult] = field(default_factory=dict)  # by rank

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Blocks that are good on every rank: (num_blocks,) bool."""
        return np.equal(self.outcomes, _OK)

    @property
    def is_whole(self) -> bool:
        """Whether every block is good on every rank."""
        return not np.count_nonzero(self.outcomes)

    @property
    def nbytes(self) -> int:
        """Bytes of the good blocks, on all ranks."""
        num_good = int(self.ok.sum())
        moved = ((result.nbytes, int(np.equal(result.outcomes, Outcome.OK).sum())) for result in self.results.values())
        return sum(nbytes * num_good // num_blocks for nbytes, num_blocks in moved if num_blocks)

    @property
    def reason(self) -> str:
        """Why blocks failed."""
        return ", ".join(self.reasons)

    @property
    def losses(self) -> list[tuple[str, int]]:
        """Blocks that did not arrive, by outcome in lower case."""
        if self.is_whole:
            return []
        lost = (Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT)
        counts = ((outcome.name.lower(), int((self.outcomes == outcome).sum())) for outcome in lost)
        return [(outcome, num_blocks) for outcome, num_blocks in counts if num_blocks]

    @property
    def label(self) -> str:
        """The worst outcome among the blocks, in lower case."""
        worst = Outcome.OK if self.is_whole else Outcome(int(self.outcomes.max()))
        return worst.name.lower()


class Ledger:
    """Jobs by number."""

    def __init__(self) -> None:
        self._open: dict[int, OpenJob] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._open)

    def next_id(self) -> int:
        """Give a number for a job; safe without the lock."""
        return next(self._ids)

    def open(
        self,
        job: Job,
        ranks: Iterable[int],
        settle: Callable[[OpenJob], Iterable[After]],
        *,
        now: float,
        timeout_s: float,
    ) -> OpenJob:
        """Note a job that is about to be sent to these ranks."""
        outcomes = np.zeros(num_blocks_of(job), dtype=np.uint8)
        entry = OpenJob(job, settle, set(ranks), outcomes, now, now + timeout_s)
        self._open[job.job_id] = entry
        return entry

    def answer(self, rank: int, result: JobResult) -> OpenJob | None:
        """Note a rank's answer; give the job when it was the last."""
        entry = self._open.get(result.job_id)
        if entry is None or rank not in entry.waiting:
            _log.warning("answer to no open job rank=%d job_id=%d", rank, result.job_id)
            return None
        if len(result.outcomes) != len(entry.outcomes):
            entry.reasons[f"rank {rank} answered for {len(result.outcomes)} of {len(entry.outcomes)} blocks"] = None
            entry.outcomes[:] = np.maximum(entry.outcomes, Outcome.FAILED)
        elif np.count_nonzero(result.outcomes):
            np.maximum(entry.outcomes, result.outcomes, out=entry.outcomes)
        if result.reason:
            entry.reasons[result.reason] = None
        entry.seconds = max(entry.seconds, result.seconds)
        entry.results[rank] = result
        return self._answered(entry, rank)

    def lose(self, rank: int, reason: str) -> list[OpenJob]:
        """Note that a rank is dead; give the jobs that waited for nobody else."""
        settled = []
        for entry in list(self._open.values()):
            if rank in entry.waiting:
                entry.outcomes[:] = np.maximum(entry.outcomes, Outcome.FAILED)
                entry.reasons[f"executor {rank} is lost: {reason}"] = None
                if self._answered(entry, rank) is not None:
                    settled.append(entry)
        return settled

    def overdue(self, now: float) -> list[OpenJob]:
        """Give the jobs whose time ended since the last call."""
        late = [entry for entry in self._open.values() if not entry.is_draining and now >= entry.due_at]
        for entry in late:
            entry.is_draining = True
        return late

    def next_due_at(self) -> float | None:
        """When the next open job's time is over; None without one."""
        return min((entry.due_at for entry in self._open.values() if not entry.is_draining), default=None)

    def _answered(self, entry: OpenJob, rank: int) -> OpenJob | None:
        entry.waiting.discard(rank)
        if entry.waiting:
            return None
        del self._open[entry.job.job_id]
        return entry
