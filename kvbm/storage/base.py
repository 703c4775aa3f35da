"""The contract of a storage: read and write batches of blocks, keep a checksum a slot, and say what it can do.

Bytes cross in logical order (layer, outer, region), gaps left out. A storage does not lock: two calls may run at once
as long as they name different blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvbm.errors import BlockIdError, PoolClosed, StorageError
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.types import IdArray, id_array

StorageT = TypeVar("StorageT", bound="Storage")


@dataclass(frozen=True)
class StorageCapabilities:
    """What a storage can do."""

    is_addressable: bool = False  # its bytes have addresses: `bound` is there
    is_device: bool = False  # it is, or stands in for, GPU memory
    is_persistent: bool = False  # it outlives the process


class Storage(ABC):
    """Bytes of num_blocks blocks.

    Parameters
    ----------
    layout : BlockLayout

    Attributes
    ----------
    layout : BlockLayout
    checksums : (num_blocks,) uint64
        What `transfer` computed when it wrote a slot.
    has_checksum : (num_blocks,) bool
        Where `checksums` holds; writing a slot in any other way clears it.
    """

    capabilities = StorageCapabilities()

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.checksums = np.zeros(layout.num_blocks, dtype=np.uint64)
        self.has_checksum = np.zeros(layout.num_blocks, dtype=np.bool_)
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        """Slots."""
        return self.layout.num_blocks

    @property
    def bound(self) -> BoundLayout:
        """The layout with its addresses; raises `StorageError` where there are none."""
        raise StorageError(f"{type(self).__name__} has no addresses: use read and write")

    @abstractmethod
    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Copy blocks out: (num_blocks, block_nbytes) uint8, host."""

    @abstractmethod
    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Copy blocks in: (num_blocks, block_nbytes) uint8, host; all ids are checked before a byte moves."""

    def address(self, block: int, layer: int, outer: int) -> int:
        """Give the address of one layer's K or V of a block."""
        return self.bound.address(block, layer, outer)

    def close(self) -> None:
        """Let go of the memory; may be called twice. Arrays taken from it stay valid."""
        self._is_closed = True

    def __enter__(self: StorageT) -> StorageT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"{type(self).__name__}({self.num_blocks} blocks of {self.layout.block_nbytes} bytes{state})"

    def _begin(self, block_ids: IdArray) -> IdArray:
        """Check that the storage is open and the ids are distinct and inside it."""
        if self._is_closed:
            raise PoolClosed(f"{type(self).__name__} is closed")
        batch = id_array(block_ids)
        wrong = (batch < 0) | (batch >= self.num_blocks)
        if wrong.any():
            raise BlockIdError(f"block id {batch[wrong][0]} is outside 0..{self.num_blocks - 1}")
        return batch.astype(np.int32)

    def _checked_data(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        shape = (len(block_ids), self.layout.block_nbytes)
        if data.dtype != np.uint8 or data.shape != shape:
            raise StorageError(f"data must be a {shape} uint8 array, got {data.shape} {data.dtype}")
        if len(np.unique(block_ids)) != len(block_ids):
            raise BlockIdError("a block id is given twice in one write")
        return np.ascontiguousarray(data)
