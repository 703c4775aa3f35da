"""Copies out of storages without addresses: into the destination's own memory, or through the staging ring.

Memory that only we hand out (`keeps_checksums`) is read into directly and compared there, before anybody hears of it:
its blocks are the job's until it answers, so a read that cannot be called back is waited for. Memory that an engine may
take back at any moment gets its blocks from the ring, by a short copy; reads that outlive the job keep their slots.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from kvbm.executor.copy_down import TIME_IS_OVER, write_rows
from kvbm.executor.means import CopyMeans, Outcomes, judge
from kvbm.executor.reasons import Reasons, text_of
from kvbm.executor.rows import rows_of
from kvbm.jobs import CopyJob, Outcome, Transfer
from kvbm.landing import wait_until_landed
from kvbm.storage.base import Storage
from kvbm.types import IdArray, Places

_DIRECT_NBYTES = 16 << 20  # of one read into memory: what has landed is compared while the rest is on its way
_DIRECT_AHEAD = 4
_CHUNK_NBYTES = 4 << 20  # of one read into the ring
_CHUNKS_AHEAD = 4

Mask = npt.NDArray[np.bool_]


def copy_up(means: CopyMeans, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
    """Read blocks of a storage without addresses.

    Parameters
    ----------
    means : CopyMeans
    job : CopyJob
    deadline : float, optional
        Moment of the clock from which on no block is begun.

    Returns
    -------
    outcomes : (num_blocks,) uint8
    reason : str
    """
    source, destination = means.storage(job.source), means.storage(job.destination)
    if destination.keeps_checksums and destination.capabilities.is_addressable:
        memory = rows_of(destination, source)
        if memory is not None:
            return _read_directly(means, job, memory, deadline)
    return _read_through_ring(means, job, deadline)


# -- into memory -----------------------------------------------------------------------------------------------


def _read_directly(
    means: CopyMeans, job: CopyJob, memory: npt.NDArray[np.uint8], deadline: float | None
) -> tuple[Outcomes, str]:
    source, destination = means.storage(job.source), means.storage(job.destination)
    num_blocks = len(job.hashes)
    outcomes = np.full(num_blocks, Outcome.LATE, dtype=np.uint8)
    reasons = Reasons()
    chunk = max(1, _DIRECT_NBYTES // source.layout.block_nbytes)
    reading: deque[tuple[slice, Transfer[Mask]]] = deque()
    start = 0
    try:
        while start < num_blocks or reading:
            if start < num_blocks and len(reading) < _DIRECT_AHEAD and not means.is_over(deadline):
                part = slice(start, min(start + chunk, num_blocks))
                start = part.stop
                ids, to_ids, names = job.source_ids[part], job.destination_ids[part], job.hashes[part]
                try:
                    reading.append((part, source.submit_read(ids, memory, to_ids, hashes=names)))
                except Exception as error:  # no byte has moved
                    outcomes[part] = means.lost(job)
                    reasons.add(text_of(error))
                else:
                    destination.has_checksum[to_ids] = False
                continue
            if not reading or not means.wait(reading[0][1], deadline):
                reasons.add(TIME_IS_OVER)
                break
            part, transfer = reading[0]
            wait_until_landed(transfer)
            reading.popleft()
            try:
                outcomes[part], reason = _compare(means, job, part, transfer)
                reasons.add(reason)
            except Exception as error:
                outcomes[part] = means.lost(job)
                reasons.add(text_of(error))
    finally:  # the blocks are somebody else's once this has answered
        for _, transfer in reading:
            transfer.cancel()
        for _, transfer in reading:
            wait_until_landed(transfer)
    return outcomes, str(reasons)


def _compare(means: CopyMeans, job: CopyJob, part: slice, transfer: Transfer[Mask]) -> tuple[Outcomes, str]:
    """Compare blocks that were read with the checksums that the source keeps."""
    source, destination = means.storage(job.source), means.storage(job.destination)
    from_ids, to_ids, names = job.source_ids[part], job.destination_ids[part], job.hashes[part]
    is_read, (expected, has_checksum) = transfer.result(), _checksums_of(transfer, source, from_ids)
    outcomes = np.full(len(from_ids), means.lost(job), dtype=np.uint8)
    if not means.verifies:
        outcomes[is_read] = Outcome.OK
        return outcomes, _reason_of(outcomes, is_read)
    places = np.flatnonzero(is_read & has_checksum)
    checksums = means.compute_checksums(job, destination, to_ids[places], names[places])
    good = checksums == expected[places]
    destination.checksums[to_ids[places[good]]] = checksums[good]
    destination.has_checksum[to_ids[places[good]]] = True
    outcomes[places] = judge(good)
    if not good.all():  # the planner holds the source until it hears of this, so its slot cannot be another's yet
        means.disown(source, from_ids[places[~good]], names[places[~good]])
    return outcomes, _reason_of(outcomes, is_read)


def _checksums_of(
    transfer: Transfer[Mask], source: Storage, ids: IdArray
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Give the checksums that came with a read, where the storage keeps none by id; which of them there are."""
    if source.capabilities.is_keyed and hasattr(transfer, "checksums"):
        return transfer.checksums, transfer.has_checksum  # type: ignore[attr-defined]
    return source.checksums[ids], source.has_checksum[ids]


def _reason_of(outcomes: Outcomes, is_read: Mask) -> str:
    if (outcomes == Outcome.CORRUPT).any():
        return "checksum mismatch"
    if not is_read.all():
        return "read error"
    return "" if (outcomes == Outcome.OK).all() else "nothing was kept there"


# -- through the ring ------------------------------------------------------------------------------------------


def _read_through_ring(means: CopyMeans, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
    """Read chunks into the ring, some ahead; copy each from there, or write it where there are no addresses."""
    staging, source = means.staging, means.storage(job.source)
    num_blocks = len(job.hashes)
    outcomes = np.full(num_blocks, Outcome.LATE, dtype=np.uint8)
    reasons = Reasons()
    reading: deque[tuple[slice, IdArray, Transfer[Mask]]] = deque()
    chunk = max(1, min(_CHUNK_NBYTES // source.layout.block_nbytes, staging.num_slots // 2))
    num_ahead = min(_CHUNKS_AHEAD, max(2, staging.num_slots // chunk))
    start = 0
    try:
        while start < num_blocks or reading:
            if start < num_blocks and len(reading) < num_ahead and not means.is_over(deadline):
                wanted = min(chunk, num_blocks - start)
                slots = staging.take(wanted, means.clock() if reading else deadline, is_urgent=job.is_urgent)
                if len(slots):
                    part = slice(start, start + len(slots))
                    start = part.stop
                    ids, names = job.source_ids[part], job.hashes[part]
                    try:
                        reading.append((part, slots, source.submit_read(ids, staging.memory, slots, hashes=names)))
                    except Exception as error:  # no byte has moved
                        staging.give(slots)
                        outcomes[part] = means.lost(job)
                        reasons.add(text_of(error))
                    continue
            # Without one the time is over, or the ring is full of I/O that does not end.
            if not reading or not means.wait(reading[0][2], deadline):
                reasons.add(TIME_IS_OVER)
                break
            part, slots, transfer = reading.popleft()
            try:
                outcomes[part], reason = _land(means, job, part, slots, transfer)
                reasons.add(reason)
            except Exception as error:
                outcomes[part] = means.lost(job)
                reasons.add(text_of(error))
            finally:
                staging.give(slots)
    finally:  # after an interrupt too: what is left to itself gives its slots back when it ends
        for _, slots, transfer in reading:
            transfer.add_landed_callback(lambda _, slots=slots: staging.give(slots))  # type: ignore[misc]
    return outcomes, str(reasons)


def _land(
    means: CopyMeans, job: CopyJob, part: slice, slots: IdArray, transfer: Transfer[Mask]
) -> tuple[Outcomes, str]:
    """Bring blocks that were read from the ring to their destination."""
    staging, source, destination = means.staging, means.storage(job.source), means.storage(job.destination)
    from_ids, to_ids, names = job.source_ids[part], job.destination_ids[part], job.hashes[part]
    is_read, (checksums, has_checksum) = transfer.result(), _checksums_of(transfer, source, from_ids)
    outcomes = np.full(len(slots), means.lost(job), dtype=np.uint8)
    is_whole = is_read & has_checksum if means.verifies else is_read
    staging.storage.checksums[slots], staging.storage.has_checksum[slots] = checksums, has_checksum
    if means.verifies and source.capabilities.is_keyed and (is_bare := is_read & ~has_checksum).any():
        means.disown(source, from_ids[is_bare], names[is_bare])  # it would be met again and again
    places: Places = np.flatnonzero(is_whole)
    reason = ""
    if destination.capabilities.is_addressable:
        origin, target = (staging.storage, slots[places]), (destination, to_ids[places])
        good = means.copy(job, origin, target, places + part.start)
        outcomes[places] = judge(good)
    else:
        checksums = means.compute_checksums(job, staging.storage, slots[places], names[places])
        good = ~np.bool_(means.verifies) | (checksums == staging.storage.checksums[slots[places]])
        outcomes[places[~good]] = Outcome.CORRUPT
        kept = checksums[good] if means.verifies else None
        written = places[good]
        rows, places_in_job = slots[written], written + part.start
        outcomes[written], reason = write_rows(means, job, staging.memory, rows, places_in_job, checksums=kept)
    if not good.all():  # the planner holds the source until it hears of this, so its slot cannot be another's yet
        means.disown(source, from_ids[places[~good]], names[places[~good]])
    return outcomes, reason or _reason_of(outcomes, is_read)
