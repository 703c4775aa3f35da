"""Cuts copies where an engine allocated its memory piece by piece: CUDA takes no plain copy across a border.

Neither a run that happens to continue in the next allocation, nor a pitch that leads there. Kernels do not mind; and
where host memory was registered piece by piece the native side cuts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]
Part = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]


def lies_in_one(blocks: Addresses, pieces: Addresses, starts: Addresses) -> bool:
    """Tell whether all pieces of all blocks lie in one segment.

    Parameters
    ----------
    blocks, pieces : (num_blocks,) and (num_pieces,) uint64
        Piece j of block i lies at blocks[i] + pieces[j].
    starts : (num_segments,) uint64
        First address of each segment, ascending; none or one is one.
    """
    return len(starts) < 2 or bool(np.ptp(_segments(blocks, pieces, starts)) == 0)


def parts_in_one(
    source: tuple[Addresses, Addresses, Addresses], destination: tuple[Addresses, Addresses, Addresses]
) -> Iterator[Part]:
    """Give the blocks and the pieces of each part of a copy that lies in one segment on either side.

    Parameters
    ----------
    source, destination : tuple of blocks, pieces and starts
        As for `lies_in_one`.

    Yields
    ------
    blocks, pieces : (n,) intp
        Indices, ascending; every pair of a block and a piece is in one part.
    """
    where = _segments(*source) * (len(destination[2]) + 1) + _segments(*destination)
    columns, column_of = np.unique(where, axis=1, return_inverse=True)
    for i in range(columns.shape[1]):
        (pieces,) = (column_of.ravel() == i).nonzero()
        for segment in np.unique(columns[:, i]):
            yield (columns[:, i] == segment).nonzero()[0], pieces


def _segments(blocks: Addresses, pieces: Addresses, starts: Addresses) -> npt.NDArray[np.intp]:
    """Give the segment of each piece of each block: (num_blocks, num_pieces)."""
    places = np.add.outer(blocks, pieces)
    return np.searchsorted(starts, places.ravel(), side="right").reshape(places.shape)
