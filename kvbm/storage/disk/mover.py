"""Moving blocks between a data file and memory: which runs one call can take, and what to do when it takes less.

A mover knows nothing of queues. Its methods may run in many threads at once, on different pieces.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.jobs import Transfer
from kvbm.storage.disk.calls import DIRECT_NBYTES, OsCalls, aligned_empty
from kvbm.storage.disk.slab import Slab
from kvbm.types import IdArray

_PIECE_NBYTES = 4 << 20  # one call moves at most this, so that threads share a large batch
_PIECE_BLOCKS = 512  # and at most this many buffers; the kernel takes 1024
_MAX_STUCK = 8  # calls in a row that move less than a page


class Batch:
    """Blocks that were submitted together, in order of their slots."""

    def __init__(self, is_read: bool, ids: IdArray, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> None:
        order = np.argsort(ids, kind="stable")
        self.is_read = is_read
        self.slots = ids[order].tolist()
        self.rows = rows[order].tolist()
        self.memory = memory
        self.order = order  # where each block stands in the answer
        self.is_good = [False] * len(order)
        self.is_straight = True  # bytes move between disk and memory without a stop
        self.move_nbytes = 0  # of each block
        self.error: OSError | None = None  # the first
        self.num_pieces_left = 0
        self.transfer: Transfer[npt.NDArray[np.bool_]] = Transfer()

    def mask(self) -> npt.NDArray[np.bool_]:
        """Give what is good, in the order of submission."""
        good = np.zeros(len(self.order), dtype=np.bool_)
        good[self.order] = self.is_good
        return good


@dataclass
class Piece:
    """Blocks first..last-1 of a batch, whose slots are adjacent."""

    batch: Batch
    first: int
    last: int
    nbytes: int
    num_calls: int = 0
    failures: list[tuple[int, OSError]] = field(default_factory=list)  # place in the batch, and why


class BlockMover:
    """Moves pieces.

    Parameters
    ----------
    files : Slab
    block_nbytes, slot_nbytes : int
    os_calls : OsCalls
    """

    def __init__(self, files: Slab, *, block_nbytes: int, slot_nbytes: int, os_calls: OsCalls) -> None:
        self._files = files
        self._is_direct = files.io_mode == "direct"
        self._block_nbytes = block_nbytes
        self._slot_nbytes = slot_nbytes
        self._os = os_calls
        self._own = threading.local()  # each thread's bounce buffer

    def cut(self, batch: Batch) -> list[Piece]:
        """Decide how the blocks move, and join adjacent slots."""
        row_nbytes, slot_nbytes = batch.memory.shape[1], self._slot_nbytes
        has_whole_slots = row_nbytes >= slot_nbytes
        batch.move_nbytes = slot_nbytes
        if self._is_direct:
            addresses = batch.memory.ctypes.data + np.array(batch.rows, dtype=np.int64) * batch.memory.strides[0]
            batch.is_straight = has_whole_slots and not (addresses % DIRECT_NBYTES).any()
        elif not has_whole_slots:
            batch.move_nbytes = self._block_nbytes
        can_join = batch.move_nbytes == slot_nbytes
        max_blocks = min(_PIECE_BLOCKS, max(1, _PIECE_NBYTES // slot_nbytes)) if can_join else 1
        pieces: list[Piece] = []
        first, slots = 0, batch.slots
        for i in range(1, len(slots) + 1):
            if i == len(slots) or slots[i] != slots[i - 1] + 1 or i - first == max_blocks:
                pieces.append(Piece(batch, first, i, (i - first) * slot_nbytes))
                first = i
        return pieces

    def move(self, piece: Piece) -> None:
        """Move a run; where a call fails, the rest block by block, to learn which ones are good."""
        first, error = self._move_run(piece, piece.first, piece.last)
        if error is None:
            return
        if piece.last - piece.first == 1:
            piece.failures.append((first, error))
            return
        for i in range(first, piece.last):
            _, error = self._move_run(piece, i, i + 1)
            if error is not None:
                piece.failures.append((i, error))

    def _move_run(self, piece: Piece, first: int, last: int) -> tuple[int, OSError | None]:
        """Move blocks whose slots are adjacent; give the first that did not move, and why."""
        batch, block_nbytes = piece.batch, self._block_nbytes
        memory = batch.memory
        if batch.is_straight:
            bounce = None
            buffers: list[Any] = _buffers(memory, batch.rows[first:last], batch.move_nbytes)
        else:
            bounce = self._bounce()[: last - first]
            if not batch.is_read:
                bounce[:, :block_nbytes] = memory[batch.rows[first:last], :block_nbytes]
                bounce[:, block_nbytes:] = 0
            buffers = [bounce.reshape(-1)]
        call: Callable[..., int] = self._os.preadv if batch.is_read else self._os.pwritev
        num_moved, error = self._move_all(piece, call, buffers, batch.slots[first] * self._slot_nbytes)
        end = last if error is None else first + num_moved // batch.move_nbytes
        if bounce is not None and batch.is_read:
            for i in range(first, end):
                memory[batch.rows[i], :block_nbytes] = bounce[i - first, :block_nbytes]
        for i in range(first, end):
            batch.is_good[i] = True
        return end, error

    def _move_all(
        self, piece: Piece, call: Callable[..., int], buffers: Sequence[Any], offset: int
    ) -> tuple[int, OSError | None]:
        """Call until every byte has moved; give the number of bytes that did, and what ended it."""
        total = sum(buffer.nbytes for buffer in buffers)
        num_moved, num_stuck = 0, 0
        ended: OSError | None = None
        while num_moved < total and ended is None:
            piece.num_calls += 1
            try:
                count = call(self._files.fd, _after(buffers, num_moved), offset + num_moved)
            except InterruptedError:
                continue
            except OSError as error:
                ended = error
                break
            if self._is_direct and num_moved + count < total:
                count -= count % DIRECT_NBYTES  # direct I/O goes on from a whole page
            num_moved += count
            num_stuck = 0 if count else num_stuck + 1
            if num_stuck > _MAX_STUCK or (not count and not self._is_direct):
                ended = OSError(errno.EIO, f"ended {total - num_moved} of {total} bytes short at {offset + num_moved}")
        return num_moved, ended

    def _bounce(self) -> npt.NDArray[np.uint8]:
        """Give this thread's aligned buffer, a row a slot."""
        if not hasattr(self._own, "bounce"):
            num_rows = min(_PIECE_BLOCKS, max(1, _PIECE_NBYTES // self._slot_nbytes))
            self._own.bounce = aligned_empty(num_rows, self._slot_nbytes)
        bounce: npt.NDArray[np.uint8] = self._own.bounce
        return bounce


def _buffers(memory: npt.NDArray[np.uint8], rows: list[int], nbytes: int) -> list[Any]:
    """Give the bytes of rows, neighbours joined where nothing lies between them."""
    if nbytes != memory.shape[1] or nbytes != memory.strides[0]:
        return [memory[row, :nbytes] for row in rows]
    buffers: list[Any] = []
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            buffers.append(memory[rows[first] : rows[i - 1] + 1].reshape(-1))
            first = i
    return buffers


def _after(buffers: Sequence[Any], num_moved: int) -> Sequence[Any]:
    """Give what is left of buffers after their first bytes."""
    if not num_moved:
        return buffers
    rest = list(buffers)
    while num_moved >= rest[0].nbytes:
        num_moved -= rest[0].nbytes
        del rest[0]
    rest[0] = rest[0][num_moved:]
    return rest
