"""Executor: runs jobs on the storages of one rank and answers for every block. Bytes only; it decides nothing.

Three kinds of copy: between memories (one call of the copy engine), up from a storage without addresses (`copy_up`) and
down into one (`copy_down`). An answer about a destination is given when no byte moves towards it any more.
Safe from any thread, as long as two jobs name different destination slots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from kvbm._backend import Backend, default_backend
from kvbm.executor.copy_down import TIME_IS_OVER, copy_down
from kvbm.executor.copy_up import copy_up
from kvbm.executor.means import CopyMeans, Outcomes, judge
from kvbm.executor.reasons import text_of
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, Job, JobResult, Outcome, ProbeJob, TouchedJob
from kvbm.jobs.messages import answer_all
from kvbm.storage.base import Storage
from kvbm.types import Tier

_log = logging.getLogger("kvbm.executor")


class Executor:
    """Moves bytes between the tiers of one rank.

    Parameters
    ----------
    storages : dict of Tier to Storage
        Stay the caller's; the executor closes only what it made.
    copy_threads : int
        Threads that share one copy; 0 takes the machine's cores, at most 4. Offloads use half of them.
    copy_thread_blocks : int
        Thread blocks of a GPU's copy kernel at most; 0 takes a few.
    staging_blocks : int
        Slots of the ring that blocks pass through on their way to or from storages without addresses; 0 takes 32 MiB,
        at least 16 slots.
    small_nbytes : int
        Copies between memories up to this size count as small (`is_small`).
    verifies : bool
        Compute checksums on the way down and compare them on the way up.
    backend : Backend, optional
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        storages: Mapping[Tier, Storage],
        *,
        copy_threads: int = 0,
        copy_thread_blocks: int = 0,
        staging_blocks: int = 0,
        small_nbytes: int = 1 << 20,
        verifies: bool = True,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._small_nbytes = small_nbytes
        self._clock = clock
        self._means = CopyMeans(
            storages,
            copy_threads=copy_threads,
            copy_thread_blocks=copy_thread_blocks,
            staging_blocks=staging_blocks,
            verifies=verifies,
            backend=backend or default_backend(),
            clock=clock,
        )

    def is_small(self, job: Job) -> bool:
        """Whether a job is a copy between memories of at most `small_nbytes`."""
        if not (isinstance(job, CopyJob) and self.is_bounded(job)):
            return False
        return len(job.source_ids) * self._means.storage(job.source).layout.block_nbytes <= self._small_nbytes

    def is_bounded(self, job: Job) -> bool:
        """Whether a job is a copy between memories, which cannot hang."""
        if not isinstance(job, CopyJob):
            return False
        return self._means.is_addressable(job.source) and self._means.is_addressable(job.destination)

    def execute(self, job: Job, deadline: float | None = None) -> JobResult:
        """Run a job.

        Parameters
        ----------
        job : Job
        deadline : float, optional
            Moment of the clock from which on no block is begun any more; the rest of the job is `Outcome.LATE`.

        Notes
        -----
        Blocks for as long as bytes move towards the job's destination. Trouble is an answer, never an exception.
        """
        began = self._clock()
        if isinstance(job, CopyJob):
            outcomes, reason = self._copy(job, deadline)
            num_good = int((outcomes == Outcome.OK).sum())
            nbytes = num_good * self._means.storage(job.destination).layout.block_nbytes if num_good else 0
            if (outcomes == Outcome.CORRUPT).any():
                _complain(job, outcomes)
            is_away = not all(self._means.is_there(tier) for tier in (job.source, job.destination))
            return JobResult(
                job_id=job.job_id,
                outcomes=outcomes,
                nbytes=nbytes,
                seconds=self._clock() - began,
                reason=reason,
                is_away=is_away,
            )
        try:
            return self._keep_books(job)
        except Exception as error:
            _log.error("%s failed job_id=%d tier=%s error=%r", type(job).__name__, job.job_id, job.tier.value, error)
            answer = answer_all(job, Outcome.FAILED, text_of(error))
            return msgspec.structs.replace(answer, is_away=not self._means.is_there(job.tier))

    def close(self) -> None:
        """Let go of what the executor made; the caller has seen to it that no job runs."""
        self._means.close()

    def _copy(self, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
        means = self._means
        if means.is_over(deadline):
            return np.full(len(job.hashes), Outcome.LATE, dtype=np.uint8), f"{TIME_IS_OVER} before it began"
        try:
            source, destination = means.storage(job.source), means.storage(job.destination)
            if not source.capabilities.is_addressable:
                return copy_up(means, job, deadline)
            if not destination.capabilities.is_addressable:
                return copy_down(means, job, deadline)
            good = means.copy(job, (source, job.source_ids), (destination, job.destination_ids), slice(None))
            return judge(good), "" if good.all() else "checksum mismatch"
        except Exception as error:
            _log.error(
                "copy failed job_id=%d source=%s destination=%s num_blocks=%d error=%r",
                job.job_id, job.source.value, job.destination.value, len(job.hashes), error,
            )  # fmt: skip
            return np.full(len(job.hashes), means.lost(job), dtype=np.uint8), text_of(error)

    def _keep_books(self, job: ForgetJob | TouchedJob | ProbeJob | InventoryJob) -> JobResult:
        storage = self._means.storage(job.tier)
        if isinstance(job, InventoryJob):
            ids, hashes, parents, priorities = storage.inventory()
            none = np.empty(0, dtype=np.uint8)
            return JobResult(
                job_id=job.job_id, outcomes=none, ids=ids, hashes=hashes, parents=parents, priorities=priorities
            )
        is_done = np.ones(len(job.hashes), dtype=np.bool_)
        if isinstance(job, ProbeJob):
            is_done = storage.holds(job.ids, job.hashes)
        elif isinstance(job, ForgetJob):
            storage.clear() if job.is_all else storage.forget(job.hashes, job.ids)
        else:
            storage.touch(job.ids, job.hashes, job.priorities)
        outcomes = np.where(is_done, Outcome.OK, Outcome.FAILED).astype(np.uint8)
        return JobResult(job_id=job.job_id, outcomes=outcomes)


def _complain(job: CopyJob, outcomes: Outcomes) -> None:
    (places,) = (outcomes == Outcome.CORRUPT).nonzero()
    block_id, name = job.source_ids[places[0]], job.hashes[places[0]].tobytes().hex()
    text = "checksum mismatch tier=%s block_id=%d hash=%s num_blocks=%d"
    _log.warning(text, job.source.value, block_id, name, len(places))
