"""Clears slots of an engine's memory that a load has filled with bytes that nobody vouches for.

The engine computes those blocks again, token after token, and until then its kernels read the rest of a block and give
it no weight. But no weight times infinity is no number: bad bytes that happen to be one would spoil what is good.
"""

from __future__ import annotations

import logging

import numpy as np

from kvbm.jobs import CopyJob, JobResult, Outcome
from kvbm.storage.base import Storage

_log = logging.getLogger("kvbm.engines")


def clear_lost(memory: Storage, job: CopyJob, result: JobResult) -> None:
    """Fill the blocks of a load that went wrong with zeros, before anybody hears of it.

    Parameters
    ----------
    memory : Storage
        The engine's.
    job : CopyJob
        Into that memory.
    result : JobResult

    Notes
    -----
    Waits until they are there. What was not begun in time has changed nothing, and is left as it is.
    """
    is_lost = result.outcomes > Outcome.LATE
    if not is_lost.any():
        return
    slots = job.destination_ids[is_lost]
    try:
        memory.write(slots, np.zeros((len(slots), memory.layout.block_nbytes), dtype=np.uint8))
    except Exception as error:  # a lost device; the engine is lost as well
        _log.error("bad blocks were not cleared job_id=%d num_blocks=%d error=%r", job.job_id, len(slots), error)
