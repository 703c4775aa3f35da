"""The contract of a storage: read and write batches of blocks, keep a checksum a slot, and say what it can do.

Bytes cross in logical order (layer, outer, region), gaps left out. A storage does not lock: two calls may run at once
as long as they name different blocks, and a call ends when its transfer has landed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvbm.errors import BlockIdError, PoolClosed, StorageError
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.types import HashArray, IdArray, id_array

StorageT = TypeVar("StorageT", bound="Storage")

_log = logging.getLogger("kvbm.storage")


@dataclass(frozen=True)
class StorageCapabilities:
    """What a storage can do."""

    is_addressable: bool = False  # its bytes have addresses: `bound` is there
    is_device: bool = False  # it is, or stands in for, GPU memory
    is_gpu: bool = False  # it is GPU memory: the processor cannot read at its addresses, streams move its bytes
    is_persistent: bool = False  # it outlives the process
    is_keyed: bool = False  # it finds bytes by sequence hash; a block id is only a row of what is known of it


class Storage(ABC):
    """Bytes of num_blocks blocks.

    Parameters
    ----------
    layout : BlockLayout

    Attributes
    ----------
    layout : BlockLayout
    slot_nbytes : int
        Bytes that one block occupies, block_nbytes or more; they count where a device wears.
    checksums : (num_blocks,) uint64
        What `transfer` computed when it wrote a slot; nobody fills them where `keeps_checksums` is False.
    has_checksum : (num_blocks,) bool
        Where `checksums` holds; writing a slot in any other way clears it.
    """

    capabilities = StorageCapabilities()
    keeps_checksums = True  # `checksums` is worth filling: False where others write the memory behind our back

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.slot_nbytes = layout.block_nbytes
        self.checksums = np.zeros(layout.num_blocks, dtype=np.uint64)
        self.has_checksum = np.zeros(layout.num_blocks, dtype=np.bool_)
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        """Slots."""
        return self.layout.num_blocks

    @property
    def is_available(self) -> bool:
        """Whether the storage can be reached; when not, what it holds may still be good."""
        return True

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

    def submit_read(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, hashes: HashArray | None = None
    ) -> Transfer[npt.NDArray[np.bool_]]:
        """Begin to copy blocks out, into rows of the caller's memory.

        Parameters
        ----------
        block_ids : (num_blocks,) int32
        memory : (num_rows, row_nbytes) uint8, host
            Writable, each row contiguous, row_nbytes at least block_nbytes. Block ``block_ids[i]`` comes to
            ``memory[rows[i], :block_nbytes]``; what follows in that row may be overwritten, other rows are not touched.
        rows : (num_blocks,) int32
            All different.
        hashes : (num_blocks, 2) uint64, optional
            Sequence hashes of the blocks; a keyed storage needs them, and brings `checksums` with the bytes.

        Returns
        -------
        Transfer
            Of a (num_blocks,) bool mask, False where a block could not be read: its row then holds anything. I/O
            trouble is never an exception. The rows belong to the call until the transfer has landed.

        Raises
        ------
        BlockIdError
            An id lies outside the storage. No byte has moved.
        StorageError
            Memory or rows are not as above. No byte has moved.
        PoolClosed
            The storage is closed.

        Notes
        -----
        This default calls `read` in the caller's thread; a storage whose I/O takes long returns at once instead, and
        may wait for room while too many bytes are queued.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=True)
        nbytes = self.layout.block_nbytes

        def move(some: slice) -> None:
            memory[places[some], :nbytes] = self.read(ids[some])

        return Transfer.completed(_move_each(len(ids), move))

    def submit_write(
        self,
        block_ids: IdArray,
        memory: npt.NDArray[np.uint8],
        rows: IdArray,
        *,
        hashes: HashArray | None = None,
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> Transfer[npt.NDArray[np.bool_]]:
        """Begin to copy blocks in, from rows of the caller's memory.

        Parameters
        ----------
        block_ids : (num_blocks,) int32
            All different.
        memory : (num_rows, row_nbytes) uint8, host
            As in `submit_read`, may be read-only; its rows must not change before the transfer has landed.
        rows : (num_blocks,) int32
        hashes, checksums : (num_blocks, 2) uint64 and (num_blocks,) uint64, optional
            A keyed storage needs the hashes, and keeps both beside the bytes.

        Returns
        -------
        Transfer
            Of a (num_blocks,) bool mask, False where a block could not be written: that slot then holds anything.

        Raises
        ------
        BlockIdError
            An id lies outside the storage, or is given twice. No byte has moved.
        StorageError
            Memory or rows are not as above. No byte has moved.
        PoolClosed
            The storage is closed.

        Notes
        -----
        Forgets the slots' checksums at once. This default calls `write` in the caller's thread.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=False)
        nbytes = self.layout.block_nbytes

        def move(some: slice) -> None:
            self.write(ids[some], memory[places[some], :nbytes])

        return Transfer.completed(_move_each(len(ids), move))

    # -- books: what a storage that outlives the process records with the bytes; nothing in others ------------

    def record(
        self,
        block_ids: IdArray,
        *,
        hashes: HashArray,
        checksums: npt.NDArray[np.uint64] | None,
        parents: HashArray | None = None,
        priorities: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Note what slots hold whose bytes were just written.

        Parameters
        ----------
        block_ids : (num_blocks,) int32
        hashes, parents : (num_blocks, 2) uint64
        checksums : (num_blocks,) uint64, optional
            None: they are not kept.
        priorities : (num_blocks,) uint8
        """
        if checksums is not None:
            self.checksums[block_ids] = checksums
            self.has_checksum[block_ids] = True

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which slots hold whole blocks of these hashes, as far as the storage knows: (num_blocks,) bool."""
        return np.array(self.has_checksum[block_ids])

    def forget(self, hashes: HashArray, block_ids: IdArray | None = None) -> None:  # noqa: B027
        """Make sure that no restart finds these blocks, in these slots or, None, wherever they lie.

        Raises
        ------
        OSError
            That failed.
        """

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:  # noqa: B027  (memory forgets by itself)
        """Note that what was read from these slots did not match its checksum; nobody else uses them."""

    def clear(self) -> None:  # noqa: B027
        """Make sure that no restart finds any block that was written before; raises `OSError` where that failed."""

    def touch(  # noqa: B027  (memory has no record of recency)
        self, block_ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]
    ) -> None:
        """Note that blocks were used, oldest first, and their priorities, where the slots still hold these hashes."""

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        """Give ids, hashes, parents and priorities of what was found at opening, oldest first; here nothing."""
        nothing = np.empty((0, 2), dtype=np.uint64)
        return np.empty(0, dtype=np.int32), nothing, nothing, np.empty(0, dtype=np.uint8)

    # -- places ------------------------------------------------------------------------------------------------

    def address(self, block: int, layer: int, outer: int) -> int:
        """Give the address of one layer's K or V of a block."""
        return self.bound.address(block, layer, outer)

    def close(self, timeout: float | None = None) -> None:
        """Let go of memory and files; may be called again. Arrays taken from it stay valid.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for I/O that is under way; None waits for as long as it takes. Without meaning where no I/O
            outlives its call.

        Raises
        ------
        TransferTimeout
            I/O is still under way; nothing new is taken, and closing again waits for it again.
        """
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

    def _begin_submit(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, is_read: bool
    ) -> tuple[IdArray, npt.NDArray[np.int64]]:
        """Check everything that `submit_read` and `submit_write` promise to refuse, and copy ids and rows."""
        ids = self._begin(block_ids)
        if not is_read and len(np.unique(ids)) != len(ids):
            raise BlockIdError("a block id is given twice in one write")
        nbytes = self.layout.block_nbytes
        is_right = memory.dtype == np.uint8 and memory.ndim == 2 and memory.shape[1] >= nbytes
        if not is_right or not _has_dense_rows(memory):
            raise StorageError(
                f"memory must be a (num_rows, {nbytes} or more) uint8 array with contiguous rows, got {memory.shape} "
                f"{memory.dtype}, strides {memory.strides}"
            )
        if is_read and not memory.flags.writeable:
            raise StorageError("memory to read into must be writable")
        given: npt.NDArray[Any] = np.asarray(rows)
        if given.shape != ids.shape or (given.dtype.kind not in "iu" and len(given)):
            raise StorageError(f"rows must be {len(ids)} integers, one for each block, got {given.shape} {given.dtype}")
        places: npt.NDArray[np.int64] = given.astype(np.int64)  # a copy: the caller may reuse its arrays
        wrong = (places < 0) | (places >= len(memory))
        if wrong.any():
            raise StorageError(f"row {places[wrong][0]} is outside 0..{len(memory) - 1}")
        if is_read and len(np.unique(places)) != len(places):
            raise StorageError("a row is given twice in one read")
        if not is_read:
            self.has_checksum[ids] = False
        return ids, places


def _has_dense_rows(memory: npt.NDArray[np.uint8]) -> bool:
    """Whether each row is contiguous and rows do not overlap; strides of axes without a second index mean nothing."""
    num_rows, row_nbytes = memory.shape
    row_stride, stride = memory.strides
    return not memory.size or ((row_nbytes == 1 or stride == 1) and (num_rows == 1 or row_stride >= row_nbytes))


def _move_each(num_blocks: int, move: Callable[[slice], None]) -> npt.NDArray[np.bool_]:
    """Move a batch at once; where that fails, block by block, to learn which ones are good."""
    good = np.ones(num_blocks, dtype=np.bool_)
    try:
        if num_blocks:
            move(slice(0, num_blocks))
    except OSError as error:
        _log.debug("batch failed num_blocks=%d error=%s", num_blocks, error)
        for i in range(num_blocks):
            try:
                move(slice(i, i + 1))
            except OSError:
                good[i] = False
    return good
