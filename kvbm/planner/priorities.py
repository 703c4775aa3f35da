"""Priorities go with the blocks: a tier sets its own only where they are not what blocks have by default."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.pool import BlockPool
from kvbm.types import DEFAULT_PRIORITY, HashArray


def carry_priorities(pool: BlockPool, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
    """Give blocks that were just stored in a pool the priorities that they had where they came from.

    Parameters
    ----------
    pool : BlockPool
    hashes : (num_blocks, 2) uint64
    priorities : (num_blocks,) uint8
    """
    is_special = priorities != DEFAULT_PRIORITY
    if not np.count_nonzero(is_special):
        return
    for priority in np.unique(priorities[is_special]).tolist():
        pool.set_priority(hashes[priorities == priority], priority)
