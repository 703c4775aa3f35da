"""Blocks that were submitted together, their transfer, and the two rules that keep bytes where they belong.

Into rows: bytes arrive in buffers of the client's, and go into a row by a short copy under the batch's gate, which
looks whether the transfer is over; ending it passes the same gate, so no row changes afterwards. Out of rows: the
client reads rows themselves, so each is lent as a view of its own, and a block ends only when its views are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.jobs import Transfer
from kvbm.types import HASH_NBYTES, HashArray, IdArray

MaskTransfer = Transfer[npt.NDArray[np.bool_]]


class Batch:
    """Blocks that move in one direction.

    Parameters
    ----------
    is_read : bool
    ids : (num_blocks,) int32
    memory : (num_rows, row_nbytes) uint8
    rows : (num_blocks,) int64
    hashes : (num_blocks, 2) uint64
    checksums : (num_blocks,) uint64, optional
        Of a write.
    """

    def __init__(
        self,
        is_read: bool,
        ids: IdArray,
        memory: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int64],
        *,
        hashes: HashArray,
        checksums: npt.NDArray[np.uint64] | None,
    ) -> None:
        self.is_read = is_read
        self.ids = ids.tolist()
        self.memory = memory
        self.rows = rows.tolist()
        self.checksums = None if checksums is None else checksums.tolist()
        self.is_good = np.zeros(len(self.rows), dtype=np.bool_)
        self.read_checksums = np.zeros(len(self.rows), dtype=np.uint64)  # of a read
        self.has_checksum = np.zeros(len(self.rows), dtype=np.bool_)
        self.is_over = False  # no byte goes into a row any more, no block is begun any more
        self.num_begun = 0
        self.num_left = len(self.rows)  # not ended yet
        self.running: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.is_given_up = False  # its tasks were told to end
        self.transfer = ObjectTransfer(self)
        self._gate = threading.Lock()
        self._names = hashes.tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def hash_of(self, i: int) -> bytes:
        """Give the 16 bytes that name a block."""
        return self._names[i * HASH_NBYTES : (i + 1) * HASH_NBYTES]

    def put_bytes(self, i: int, start: int, data: Any) -> bool:
        """Copy bytes into a row, from `start` on; False, and nothing moves, when the transfer is over."""
        piece = np.frombuffer(data, dtype=np.uint8)
        with self._gate:
            if not self.is_over:
                self.memory[self.rows[i], start : start + len(piece)] = piece
            return not self.is_over

    def settle(
        self, i: int, checksums: npt.NDArray[np.uint64], has_checksum: npt.NDArray[np.bool_], value: int | None
    ) -> bool:
        """Call a block that was read good, and keep its checksum; False when the transfer is over."""
        with self._gate:
            if not self.is_over:
                checksums[self.ids[i]] = self.read_checksums[i] = value or 0
                has_checksum[self.ids[i]] = self.has_checksum[i] = value is not None
                self.is_good[i] = True
            return not self.is_over

    def end(self) -> None:
        """Let no byte into a row from here on, and begin no block; waits for a copy that is under way."""
        with self._gate:
            self.is_over = True


class ObjectTransfer(MaskTransfer):
    """A transfer whose rows do not change any more once it was cancelled.

    Attributes
    ----------
    checksums, has_checksum : (num_blocks,) uint64 and (num_blocks,) bool
        Of a read: what came with the bytes of each block. Unlike those that the storage keeps by id, they are this
        read's own: two reads of one id may find an object, and what replaced it meanwhile.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.checksums, self.has_checksum = batch.read_checksums, batch.has_checksum
        self._batch = weakref.ref(batch)  # whoever keeps a transfer does not keep the memory

    def cancel(self) -> bool:
        """End it for its waiter; False when it had ended already. What waits is not begun, no row is written to."""
        batch = self._batch()
        if batch is not None and not self.done():
            batch.end()
            if batch.is_read:
                self.set_landed()
        return super().cancel()


class Lease:
    """A row that is lent to a client, and the moment when it has let go of it.

    Parameters
    ----------
    loop : asyncio loop
        Its thread lends; the client may let go in any thread.
    row : (block_nbytes,) uint8
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, row: npt.NDArray[np.uint8]) -> None:
        self._loop = loop
        self._row = row
        self._views: dict[int, weakref.ref[Any]] = {}  # by id: arrays have no hash, so neither have these
        self._is_free = asyncio.Event()
        self._is_awaited = False

    def lend(self) -> npt.NDArray[np.uint8]:
        """Give a view; it must go straight to the client, for whoever keeps it keeps the lease open."""
        view: npt.NDArray[np.uint8] = self._row.view()
        ref = weakref.ref(view, self._on_gone)
        self._views[id(ref)] = ref
        return view

    async def ended(self) -> None:
        """Wait until nobody has a view."""
        while self._views:
            self._is_free.clear()
            self._is_awaited = True  # before it looks again: whoever lets go meanwhile looks at this afterwards
            if self._views:
                await self._is_free.wait()

    def _on_gone(self, ref: weakref.ref[Any]) -> None:
        """See that a view is gone, in whichever thread; as a rule before anybody waits, and then the loop sleeps on."""
        self._views.pop(id(ref), None)
        if self._is_awaited and not self._views:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._is_free.set)
