"""Copy plans: two layouts and pairs of blocks become pieces to copy. Arithmetic only; nothing is moved here.

All blocks of a plan are cut alike: block i, piece j goes from ``source_blocks[i] + source_pieces[j]`` to
``destination_blocks[i] + destination_pieces[j]``. Pieces stand in the source's logical order (layer, outer, region).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvbm.errors import LayoutError
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.types import IdArray, id_array

AddressArray = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CopyPlan:
    """What to copy, cut into the longest pieces that are contiguous on both sides.

    Attributes
    ----------
    kind : {"runs", "strided", "permute"}
        "strided": the pieces of a block lie at one pitch on each side, as a 2-D copy takes them. "permute": the order
        of tokens and heads differs, so pieces are as short as a head.
    source_blocks, destination_blocks : (num_blocks,) uint64
        Bytes to add for each block.
    source_pieces, destination_pieces : (num_pieces,) uint64
        Addresses of the pieces of block 0.
    piece_nbytes : int
    """

    kind: Literal["runs", "strided", "permute"]
    source_blocks: AddressArray
    destination_blocks: AddressArray
    source_pieces: AddressArray
    destination_pieces: AddressArray
    piece_nbytes: int

    @property
    def num_blocks(self) -> int:
        """Blocks to copy."""
        return len(self.source_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return self.num_blocks * len(self.source_pieces) * self.piece_nbytes

    def runs(self) -> tuple[AddressArray, AddressArray, AddressArray]:
        """Give the maximal contiguous runs: source and destination addresses and sizes, each (num_runs,) uint64.

        Pieces that follow each other on both sides are one run, also across adjacent blocks.
        """
        sources = (self.source_blocks[:, None] + self.source_pieces).reshape(-1)
        destinations = (self.destination_blocks[:, None] + self.destination_pieces).reshape(-1)
        if not len(sources):
            return sources, destinations, sources.copy()
        nbytes = np.uint64(self.piece_nbytes)
        continues = (sources[1:] == sources[:-1] + nbytes) & (destinations[1:] == destinations[:-1] + nbytes)
        starts = np.flatnonzero(np.concatenate([[True], ~continues]))
        sizes = np.diff(np.append(starts, len(sources))).astype(np.uint64) * nbytes
        return sources[starts], destinations[starts], sizes


def plan_copy(source: BoundLayout, destination: BoundLayout, source_ids: IdArray, destination_ids: IdArray) -> CopyPlan:
    """Plan the copy of blocks from one layout to another.

    Parameters
    ----------
    source, destination : BoundLayout
        Same layers, outer dim, tokens, elements and heads; any strides.
    source_ids, destination_ids : (num_blocks,) int32
        Copied pairwise; no destination twice.

    Raises
    ------
    LayoutError
        The layouts hold different blocks, or an id is outside its layout or given twice as a destination.
    """
    pieces = _pieces(source, destination)
    from_ids = _checked_ids("source", source_ids, source.layout)
    to_ids = _checked_ids("destination", destination_ids, destination.layout)
    if len(from_ids) != len(to_ids):
        raise LayoutError(f"{len(from_ids)} source blocks for {len(to_ids)} destination blocks, give pairs")
    if len(to_ids) > 1:
        ordered = np.sort(to_ids)
        is_again = ordered[1:] == ordered[:-1]
        if is_again.any():
            raise LayoutError(f"destination block {ordered[1:][is_again][0]} is given twice")
    return CopyPlan(
        kind=pieces.kind,
        source_blocks=from_ids * np.uint64(source.layout.strides.block),
        destination_blocks=to_ids * np.uint64(destination.layout.strides.block),
        source_pieces=pieces.source,
        destination_pieces=pieces.destination,
        piece_nbytes=pieces.nbytes,
    )


@dataclass(frozen=True)
class _Pieces:
    """How any block is cut for two layouts: what does not depend on which blocks are copied."""

    kind: Literal["runs", "strided", "permute"]
    source: AddressArray  # address of each piece of block 0
    destination: AddressArray
    nbytes: int


@functools.lru_cache(maxsize=32)
def _pieces(source: BoundLayout, destination: BoundLayout) -> _Pieces:
    _check_same_block(source.layout, destination.layout)
    axes, nbytes = _cut(source.layout, destination.layout)
    from_pieces, to_pieces = _piece_addresses(source, axes), _piece_addresses(destination, axes)
    for addresses in (from_pieces, to_pieces):
        addresses.flags.writeable = False
    is_permute = _orders_differ(source.layout, destination.layout)
    is_strided = len(from_pieces) > 1 and _has_one_pitch(from_pieces) and _has_one_pitch(to_pieces)
    kind: Literal["runs", "strided", "permute"] = "permute" if is_permute else "strided" if is_strided else "runs"
    return _Pieces(kind, from_pieces, to_pieces, nbytes)


def _check_same_block(source: BlockLayout, destination: BlockLayout) -> None:
    for axis in ("num_layers", "outer_dim", "block_size", "inner_dim", "itemsize"):
        here, there = getattr(source, axis), getattr(destination, axis)
        if here != there:
            raise LayoutError(f"{axis} is {here} in the source and {there} in the destination: not the same block")
    heads = source.num_heads, destination.num_heads
    if heads[0] != heads[1] and not (_is_token_dense(source) and _is_token_dense(destination)):
        raise LayoutError(f"num_heads is {heads[0]} in the source and {heads[1]} in the destination: cannot permute")


def _is_token_dense(layout: BlockLayout) -> bool:
    """Whether a token's heads lie side by side, so that their number does not matter to a copy."""
    return layout.num_heads == 1 or layout.strides.head == layout.head_nbytes


def _checked_ids(side: str, ids: IdArray, layout: BlockLayout) -> AddressArray:
    batch = id_array(ids)
    if len(batch) and (batch.min() < 0 or batch.max() >= layout.num_blocks):
        wrong = (batch < 0) | (batch >= layout.num_blocks)
        raise LayoutError(f"{side} block {batch[wrong][0]} is outside 0..{layout.num_blocks - 1}")
    return batch.astype(np.uint64)


def _orders_differ(source: BlockLayout, destination: BlockLayout) -> bool:
    if source.num_heads != destination.num_heads:
        return False
    return source.region_order != destination.region_order


def _cut(source: BlockLayout, destination: BlockLayout) -> tuple[list[tuple[str, int]], int]:
    """Give the axes that pieces run over, outermost first, and the size of a piece."""
    if source.num_heads != destination.num_heads:
        piece_nbytes = source.inner_dim * source.itemsize
        axes = [("layer", source.num_layers), ("outer", source.outer_dim), ("token", source.block_size)]
    else:
        piece_nbytes = source.head_nbytes
        sizes = {"token": source.block_size, "head": source.num_heads}
        region = [(axis, sizes[axis]) for axis in source.region_order]
        axes = [("layer", source.num_layers), ("outer", source.outer_dim), *region]
    axes = [axis for axis in axes if axis[1] > 1]
    while axes:
        axis, size = axes[-1]
        if not all(_stride(layout, axis) == piece_nbytes for layout in (source, destination)):
            break
        piece_nbytes *= size
        axes.pop()
    return axes, piece_nbytes


def _stride(layout: BlockLayout, axis: str) -> int:
    stride: int = getattr(layout.strides, axis)
    return stride


def _piece_addresses(bound: BoundLayout, axes: Sequence[tuple[str, int]]) -> AddressArray:
    pieces: AddressArray = np.zeros((), dtype=np.uint64)
    for axis, size in axes:
        steps = np.arange(size, dtype=np.uint64) * np.uint64(_stride(bound.layout, axis))
        if axis == "layer" and bound.layout.has_layer_buffers:
            steps += np.array(bound.addresses, dtype=np.uint64) - np.uint64(bound.addresses[0])
        pieces = np.add.outer(pieces, steps)
    pieces += np.uint64(bound.addresses[0])
    return pieces.ravel()


def _has_one_pitch(pieces: AddressArray) -> bool:
    pitches = np.diff(pieces.astype(np.int64))
    return bool((pitches == pitches[0]).all() and pitches[0] > 0)
