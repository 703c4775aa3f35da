"""The memory of a storage as rows that I/O takes as they are, without a copy between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.storage.base import Storage


def rows_of(source: Storage, destination: Storage) -> npt.NDArray[np.uint8] | None:
    """Give the source's memory as a row a block, where a block lies there as the destination keeps it.

    Parameters
    ----------
    source, destination : Storage

    Returns
    -------
    (num_blocks, row_nbytes) uint8, host, or None
        row_nbytes is at least block_nbytes. None where the bytes of a block must be gathered or brought to another
        order first, or the source has no memory of its own.
    """
    layout = source.layout
    if not layout.is_dense or layout.region_order != destination.layout.region_order:
        return None
    buffers: list[npt.NDArray[np.uint8]] | None = getattr(source, "buffers", None)
    if not buffers:  # addresses are all it has
        return None
    stride = layout.strides.block
    # The last block may end with the buffer, without the gap that others have behind them.
    nbytes = stride if buffers[0].size >= layout.num_blocks * stride else layout.block_nbytes
    return np.lib.stride_tricks.as_strided(buffers[0], shape=(layout.num_blocks, nbytes), strides=(stride, 1))
