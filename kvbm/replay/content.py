"""What a block must hold: bytes derived from its hash, so that a wrong byte anywhere can be seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def content_of(hashes: HashArray, block_nbytes: int) -> npt.NDArray[np.uint8]:
    """Make the bytes of blocks.

    Parameters
    ----------
    hashes : (num_blocks, 2) uint64, host
    block_nbytes : int

    Returns
    -------
    (num_blocks, block_nbytes) uint8, host
        Each 8-byte lane mixes both words of the hash with its own position.
    """
    lanes = np.arange(-(-block_nbytes // 8), dtype=np.uint64) * _STEP
    words = (hashes[:, :1] ^ lanes) * _MIX
    words ^= words >> np.uint64(29)
    words += hashes[:, 1:]
    data: npt.NDArray[np.uint8] = words.view(np.uint8).reshape(len(hashes), 8 * len(lanes))[:, :block_nbytes]
    return data
