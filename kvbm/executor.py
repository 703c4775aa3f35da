"""Executor: runs jobs on the storages of one rank and answers for every block. Bytes only; it decides nothing.

Three kinds of copy: between memories (one call of the copy engine), up from a storage without addresses (through the
staging ring, in chunks, the next ones being read while this one is copied), and down into one (straight from memory
where blocks lie in one piece, else through the ring). I/O that cannot be called back lands in the ring only; a slot
goes back when its I/O has ended. An answer about a destination is given when no byte moves towards it any more.
Safe from any thread, as long as two jobs name different destination slots.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.errors import ConfigError
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, Job, JobResult, Outcome, ProbeJob, TouchedJob, Transfer
from kvbm.jobs.messages import answer_all
from kvbm.landing import wait_until_landed
from kvbm.layout import BlockLayout
from kvbm.reasons import Reasons, text_of
from kvbm.rows import rows_of
from kvbm.storage.base import Storage
from kvbm.storage.staging import StagingRing
from kvbm.transfer import TransferEngine
from kvbm.types import HashArray, IdArray, Places, Tier

_log = logging.getLogger("kvbm.executor")

_CHUNK_NBYTES = 4 << 20  # of one read into the ring: what has landed is copied while the rest is on its way
_CHUNKS_AHEAD = 4
_STAGING_BLOCKS, _STAGING_NBYTES = 16, 32 << 20
_PAGE_NBYTES = 4096
_TIME_IS_OVER = "its time was over"

Outcomes = npt.NDArray[np.uint8]


class Executor:
    """Moves bytes between the tiers of one rank.

    Parameters
    ----------
    storages : dict of Tier to Storage
        Stay the caller's; the executor closes only what it made.
    copy_threads : int
        Threads that share one copy; 0 takes the machine's cores, at most 4. Offloads use half of them.
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
        staging_blocks: int = 0,
        small_nbytes: int = 1 << 20,
        verifies: bool = True,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        backend = backend or default_backend()
        self._storages = dict(storages)
        self._verifies = verifies
        self._small_nbytes = small_nbytes
        self._clock = clock
        # Copies run in the thread that executes the job, so nothing is small or large to the engines.
        self._urgent = TransferEngine(num_threads=copy_threads, small_nbytes=sys.maxsize, backend=backend)
        half = max(1, self._urgent.num_threads // 2)
        self._background = TransferEngine(num_threads=half, small_nbytes=sys.maxsize, backend=backend)
        remote = [storage for storage in storages.values() if not storage.capabilities.is_addressable]
        self._staging: StagingRing | None = None
        if remote:
            num_slots = staging_blocks or _num_slots_of(remote[0].layout)
            self._staging = StagingRing(remote[0].layout, num_slots, backend=backend, clock=clock)

    def is_small(self, job: Job) -> bool:
        """Whether a job is a copy between memories of at most `small_nbytes`."""
        if not (isinstance(job, CopyJob) and self.is_bounded(job)):
            return False
        return len(job.source_ids) * self._storages[job.source].layout.block_nbytes <= self._small_nbytes

    def is_bounded(self, job: Job) -> bool:
        """Whether a job is a copy between memories, which cannot hang."""
        if not isinstance(job, CopyJob):
            return False
        storages = self._storages.get(job.source), self._storages.get(job.destination)
        return all(storage is not None and storage.capabilities.is_addressable for storage in storages)

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
            nbytes = num_good * self._storage(job.destination).layout.block_nbytes if num_good else 0
            if (outcomes == Outcome.CORRUPT).any():
                self._complain(job, outcomes)
            is_away = not all(self._is_there(tier) for tier in (job.source, job.destination))
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
            return msgspec.structs.replace(answer, is_away=not self._is_there(job.tier))

    def _complain(self, job: CopyJob, outcomes: Outcomes) -> None:
        (places,) = (outcomes == Outcome.CORRUPT).nonzero()
        block_id, name = job.source_ids[places[0]], job.hashes[places[0]].tobytes().hex()
        text = "checksum mismatch tier=%s block_id=%d hash=%s num_blocks=%d"
        _log.warning(text, job.source.value, block_id, name, len(places))

    def _is_there(self, tier: Tier) -> bool:
        return tier not in self._storages or self._storages[tier].is_available

    def close(self) -> None:
        """Let go of what the executor made; the caller has seen to it that no job runs."""
        self._urgent.close()
        self._background.close()
        if self._staging is not None:
            self._staging.storage.close()

    # -- copies ------------------------------------------------------------------------------------------------

    def _copy(self, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
        if self._is_over(deadline):
            return np.full(len(job.hashes), Outcome.LATE, dtype=np.uint8), "its time was over before it began"
        try:
            source, destination = self._storage(job.source), self._storage(job.destination)
            if not source.capabilities.is_addressable:
                return self._copy_up(job, deadline)
            if not destination.capabilities.is_addressable:
                return self._copy_down(job, deadline)
            good = self._move(job, (source, job.source_ids), (destination, job.destination_ids), slice(None))
            return _judge(good), "" if good.all() else "checksum mismatch"
        except Exception as error:
            _log.error(
                "copy failed job_id=%d source=%s destination=%s num_blocks=%d error=%r",
                job.job_id, job.source.value, job.destination.value, len(job.hashes), error,
            )  # fmt: skip
            return np.full(len(job.hashes), self._lost(job), dtype=np.uint8), text_of(error)

    def _lost(self, job: CopyJob) -> Outcome:
        """Tell what blocks are that did not come: those of a storage that cannot be reached may be good."""
        return Outcome.FAILED if self._is_there(job.source) else Outcome.LATE

    def _is_over(self, deadline: float | None) -> bool:
        return deadline is not None and self._clock() >= deadline

    def _move(
        self, job: CopyJob, source: tuple[Storage, IdArray], destination: tuple[Storage, IdArray], part: slice | Places
    ) -> npt.NDArray[np.bool_]:
        """Copy between memories; tell where the source matched its checksum."""
        engine = self._urgent if job.is_urgent else self._background
        names = job.hashes[part] if self._verifies else None
        return engine.copy(source[0], destination[0], source[1], destination[1], hashes=names).result().good

    def _copy_up(self, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
        """Read chunks into the ring, some ahead; copy each from there, or write it where there are no addresses."""
        staging = self._ring()
        num_blocks = len(job.hashes)
        outcomes = np.full(num_blocks, Outcome.LATE, dtype=np.uint8)
        reasons = Reasons()
        reading: deque[tuple[slice, IdArray, Transfer[npt.NDArray[np.bool_]]]] = deque()
        chunk = max(1, min(_CHUNK_NBYTES // self._storage(job.source).layout.block_nbytes, staging.num_slots // 2))
        num_ahead = min(_CHUNKS_AHEAD, max(2, staging.num_slots // chunk))
        start = 0
        while start < num_blocks or reading:
            if start < num_blocks and len(reading) < num_ahead and not self._is_over(deadline):
                wanted = min(chunk, num_blocks - start)
                slots = staging.take(wanted, self._clock() if reading else deadline, is_urgent=job.is_urgent)
                if len(slots):
                    part = slice(start, start + len(slots))
                    start = part.stop
                    try:
                        reading.append((part, slots, self._read(job, part, slots)))
                    except Exception as error:  # no byte has moved
                        staging.give(slots)
                        outcomes[part] = self._lost(job)
                        reasons.add(text_of(error))
                    continue
            if not reading:  # the time is over, or the ring is full of I/O that does not end
                break
            part, slots, transfer = reading.popleft()
            if not self._wait(transfer, deadline):
                self._abandon((slots, transfer), *((s, t) for _, s, t in reading))
                break
            try:
                outcomes[part], reason = self._land(job, part, slots, transfer.result())
                reasons.add(reason)
            except Exception as error:
                outcomes[part] = self._lost(job)
                reasons.add(text_of(error))
            finally:
                staging.give(slots)
        else:
            return outcomes, str(reasons)
        reasons.add(_TIME_IS_OVER)
        return outcomes, str(reasons)

    def _read(self, job: CopyJob, part: slice, slots: IdArray) -> Transfer[npt.NDArray[np.bool_]]:
        source = self._storage(job.source)
        return source.submit_read(job.source_ids[part], self._ring().memory, slots, hashes=job.hashes[part])

    def _wait(self, transfer: Transfer[npt.NDArray[np.bool_]], deadline: float | None) -> bool:
        return transfer.wait(None if deadline is None else max(0.0, deadline - self._clock()))

    def _abandon(self, *reads: tuple[IdArray, Transfer[npt.NDArray[np.bool_]]]) -> None:
        """Leave reads to themselves; their slots come back when they end."""
        staging = self._ring()
        for slots, transfer in reads:
            transfer.add_done_callback(lambda _, slots=slots: staging.give(slots))  # type: ignore[misc]

    def _land(self, job: CopyJob, part: slice, slots: IdArray, is_read: npt.NDArray[np.bool_]) -> tuple[Outcomes, str]:
        """Bring blocks that were read from the ring to their destination."""
        staging, source, destination = self._ring(), self._storage(job.source), self._storage(job.destination)
        reason = ""
        from_ids, to_ids = job.source_ids[part], job.destination_ids[part]
        outcomes = np.full(len(slots), self._lost(job), dtype=np.uint8)
        is_whole = is_read & source.has_checksum[from_ids] if self._verifies else is_read
        staging.storage.checksums[slots] = source.checksums[from_ids]
        staging.storage.has_checksum[slots] = source.has_checksum[from_ids]
        places = np.flatnonzero(is_whole)
        if destination.capabilities.is_addressable:
            good = self._move(job, (staging.storage, slots[places]), (destination, to_ids[places]), places + part.start)
            outcomes[places] = _judge(good)
            places = places[~good]
        else:
            checksums = self._urgent.compute_checksums(staging.storage, slots[places], job.hashes[part][places])
            good = ~np.bool_(self._verifies) | (checksums == staging.storage.checksums[slots[places]])
            outcomes[places[~good]] = Outcome.CORRUPT
            written = places[good]
            outcomes[written], reason = self._write(
                job, staging.memory, slots[written], written + part.start, checksums[good] if self._verifies else None
            )
            places = places[~good]
        if len(places):  # the planner holds the source until it hears of this, so its slot cannot be another's yet
            self._disown(source, from_ids[places], job.hashes[part][places])
        if reason:
            return outcomes, reason
        if (outcomes == Outcome.CORRUPT).any():
            return outcomes, "checksum mismatch"
        return outcomes, "" if is_whole.all() else "read error" if not is_read.all() else "nothing was kept there"

    def _disown(self, source: Storage, block_ids: IdArray, hashes: HashArray) -> None:
        try:
            source.disown(block_ids, hashes)
        except Exception as error:  # the good blocks of the job are as good as ever
            _log.warning("bad blocks stay known source=%r num_blocks=%d error=%r", source, len(hashes), error)

    def _copy_down(self, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
        source, destination = self._storage(job.source), self._storage(job.destination)
        memory = rows_of(source, destination)
        if memory is not None:
            return self._write(job, memory, job.source_ids, np.arange(len(job.hashes)), self._known_checksums(job))
        staging = self._ring()
        outcomes = np.full(len(job.hashes), Outcome.LATE, dtype=np.uint8)
        reasons = Reasons()
        start = 0
        while start < len(job.hashes) and not self._is_over(deadline):
            slots = staging.take(len(job.hashes) - start, deadline, is_urgent=job.is_urgent)
            if not len(slots):
                break
            part = slice(start, start + len(slots))
            try:
                good = self._move(job, (source, job.source_ids[part]), (staging.storage, slots), part)
                places = np.flatnonzero(good)
                outcomes[part][~good] = Outcome.CORRUPT
                checksums = staging.storage.checksums[slots[places]] if self._verifies else None
                written, reason = self._write(job, staging.memory, slots[places], places + start, checksums)
                outcomes[part][places] = written
                reasons.add(reason if good.all() else "checksum mismatch")
            except Exception as error:
                outcomes[part] = Outcome.FAILED
                reasons.add(text_of(error))
            finally:
                staging.give(slots)
            start = part.stop
        if start < len(job.hashes):
            reasons.add(_TIME_IS_OVER)
        return outcomes, str(reasons)

    def _write(
        self,
        job: CopyJob,
        memory: npt.NDArray[np.uint8],
        rows: IdArray,
        places: Places,
        checksums: npt.NDArray[np.uint64] | None,
    ) -> tuple[Outcomes, str]:
        """Write rows of memory to the destination and wait until no byte moves; `places` are theirs in the job."""
        destination = self._storage(job.destination)
        transfer = destination.submit_write(
            job.destination_ids[places], memory, rows, hashes=job.hashes[places], checksums=checksums
        )
        try:
            is_written = transfer.result()
        finally:  # its waiter may hear of the end while the storage still looks at the rows
            wait_until_landed(transfer)
        self._record(job, places[is_written], None if checksums is None else checksums[is_written])
        outcomes = np.where(is_written, Outcome.OK, Outcome.FAILED).astype(np.uint8)
        return outcomes, "" if is_written.all() else "write error"

    def _record(self, job: CopyJob, places: Places, checksums: npt.NDArray[np.uint64] | None) -> None:
        self._storage(job.destination).record(
            job.destination_ids[places],
            hashes=job.hashes[places],
            checksums=checksums,
            parents=None if job.parents is None else job.parents[places],
            priorities=None if job.priorities is None else job.priorities[places],
        )

    def _known_checksums(self, job: CopyJob) -> npt.NDArray[np.uint64] | None:
        """Take along the checksums that the source keeps; compute those that it lacks."""
        if not self._verifies:
            return None
        source = self._storage(job.source)
        checksums: npt.NDArray[np.uint64] = source.checksums[job.source_ids]
        lacking = np.flatnonzero(~source.has_checksum[job.source_ids] | (not source.keeps_checksums))
        if len(lacking):
            ids, names = job.source_ids[lacking], job.hashes[lacking]
            checksums[lacking] = self._background.compute_checksums(source, ids, names)
        return checksums

    # -- books -------------------------------------------------------------------------------------------------

    def _keep_books(self, job: ForgetJob | TouchedJob | ProbeJob | InventoryJob) -> JobResult:
        storage = self._storage(job.tier)
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

    def _storage(self, tier: Tier) -> Storage:
        try:
            return self._storages[tier]
        except KeyError:
            known = ", ".join(known.value for known in self._storages)
            raise ConfigError(f"this executor has no tier {tier.value!r}, it has {known}") from None

    def _ring(self) -> StagingRing:
        assert self._staging is not None, "made with every storage that has no addresses"
        return self._staging


def _num_slots_of(layout: BlockLayout) -> int:
    """Give the slots that fill the bytes of the ring, each from one page to another."""
    slot_nbytes = -(-layout.block_nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    return max(_STAGING_BLOCKS, _STAGING_NBYTES // slot_nbytes)


def _judge(good: npt.NDArray[np.bool_]) -> Outcomes:
    return np.where(good, Outcome.OK, Outcome.CORRUPT).astype(np.uint8)
