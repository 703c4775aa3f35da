"""Copies into storages without addresses: straight from memory where blocks lie in one piece, else through the ring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.executor.means import CopyMeans, Outcomes
from kvbm.executor.reasons import Reasons, text_of
from kvbm.executor.rows import rows_of
from kvbm.jobs import CopyJob, Outcome
from kvbm.landing import wait_until_landed
from kvbm.types import IdArray, Places

TIME_IS_OVER = "its time was over"


def copy_down(means: CopyMeans, job: CopyJob, deadline: float | None) -> tuple[Outcomes, str]:
    """Write blocks of memory to a storage without addresses.

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
    memory = rows_of(source, destination)
    if memory is not None:
        checksums = _known_checksums(means, job)
        return write_rows(means, job, memory, job.source_ids, np.arange(len(job.hashes)), checksums=checksums)
    staging = means.staging
    outcomes = np.full(len(job.hashes), Outcome.LATE, dtype=np.uint8)
    reasons = Reasons()
    start = 0
    while start < len(job.hashes) and not means.is_over(deadline):
        slots = staging.take(len(job.hashes) - start, deadline, is_urgent=job.is_urgent)
        if not len(slots):
            break
        part = slice(start, start + len(slots))
        try:
            good = means.copy(job, (source, job.source_ids[part]), (staging.storage, slots), part)
            places = np.flatnonzero(good)
            outcomes[part][~good] = Outcome.CORRUPT
            kept = staging.storage.checksums[slots[places]] if means.verifies else None
            written, reason = write_rows(means, job, staging.memory, slots[places], places + start, checksums=kept)
            outcomes[part][places] = written
            reasons.add(reason if good.all() else "checksum mismatch")
        except Exception as error:
            outcomes[part] = Outcome.FAILED
            reasons.add(text_of(error))
        finally:
            staging.give(slots)
        start = part.stop
    if start < len(job.hashes):
        reasons.add(TIME_IS_OVER)
    return outcomes, str(reasons)


def write_rows(
    means: CopyMeans,
    job: CopyJob,
    memory: npt.NDArray[np.uint8],
    rows: IdArray,
    places: Places,
    *,
    checksums: npt.NDArray[np.uint64] | None,
) -> tuple[Outcomes, str]:
    """Write rows of memory to the destination and wait until no byte moves; `places` are theirs in the job."""
    destination = means.storage(job.destination)
    transfer = destination.submit_write(
        job.destination_ids[places], memory, rows, hashes=job.hashes[places], checksums=checksums
    )
    try:
        is_written = transfer.result()
    finally:  # its waiter may hear of the end while the storage still looks at the rows
        wait_until_landed(transfer)
    _record(means, job, places[is_written], None if checksums is None else checksums[is_written])
    outcomes = np.where(is_written, Outcome.OK, Outcome.FAILED).astype(np.uint8)
    return outcomes, "" if is_written.all() else "write error"


def _record(means: CopyMeans, job: CopyJob, places: Places, checksums: npt.NDArray[np.uint64] | None) -> None:
    means.storage(job.destination).record(
        job.destination_ids[places],
        hashes=job.hashes[places],
        checksums=checksums,
        parents=None if job.parents is None else job.parents[places],
        priorities=None if job.priorities is None else job.priorities[places],
    )


def _known_checksums(means: CopyMeans, job: CopyJob) -> npt.NDArray[np.uint64] | None:
    """Take along the checksums that the source keeps; compute those that it lacks."""
    if not means.verifies:
        return None
    source = means.storage(job.source)
    checksums: npt.NDArray[np.uint64] = source.checksums[job.source_ids]
    lacking = np.flatnonzero(~source.has_checksum[job.source_ids] | (not source.keeps_checksums))
    if len(lacking):
        checksums[lacking] = means.compute_checksums(job, source, job.source_ids[lacking], job.hashes[lacking])
    return checksums
