"""Host memory bound to a layout: our own mapping, pinned where there is a GPU, or buffers that somebody else owns.

Our own is touched once by several threads when it is made, because an untouched page costs up to 12 us at the worst
moment, the first copy. Huge pages are asked for and used where the kernel allows. How a block is cut into pieces is
planned once, so that a copy of one small block costs little more than its checks.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.copyplan import AddressArray, CopyPlan, plan_copy
from kvbm.errors import LayoutError, PoolClosed, StorageError
from kvbm.gpu import Gpu, PinnedMemory
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.storage.base import Storage, StorageCapabilities
from kvbm.types import IdArray

_log = logging.getLogger("kvbm.storage")
_PAGE_NBYTES = 4096


class HostStorage(Storage):
    """Blocks in host memory.

    Parameters
    ----------
    layout : BlockLayout
    buffers : sequence of buffers, optional
        Writable, contiguous, one for each buffer of the layout; kept alive. None maps memory of our own.
    is_read_only : bool
        Buffers are given that others write and this storage only reads; they may be read-only.
    use_huge_pages : bool
        Ask the kernel for huge pages; what came of it is in `has_huge_pages`.
    num_threads : int
        Threads that touch the memory first.
    gpu : Gpu, optional
        Pin our own memory for this device; it is usable at once, and pinned in the background.
    backend : Backend, optional

    Attributes
    ----------
    pinned : PinnedMemory or None
        Our own memory where it is, or is being, pinned.

    Raises
    ------
    StorageError
        The memory cannot be had.
    LayoutError
        Buffers of wrong number or size, or read-only ones where they are to be written.
    """

    capabilities = StorageCapabilities(is_addressable=True)

    def __init__(
        self,
        layout: BlockLayout,
        *,
        buffers: Sequence[Any] | None = None,
        is_read_only: bool = False,
        use_huge_pages: bool = True,
        num_threads: int = 2,
        gpu: Gpu | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(layout)
        self._is_read_only = is_read_only
        self._copy_blocks = (backend or default_backend()).copy_blocks
        self.has_huge_pages = False
        self.pinned: PinnedMemory | None = None
        self._buffer_step = 0  # bytes from one buffer to the next in pinned memory
        if buffers is None and gpu is not None:
            self.buffers = self._pin(gpu, use_huge_pages, num_threads)
        elif buffers is None:
            self.buffers = [self._map(use_huge_pages) for _ in range(layout.num_buffers)]
            touch_pages(self.buffers, num_threads)
        else:
            self.buffers = [_as_bytes(buffer, i, is_read_only) for i, buffer in enumerate(buffers)]
        addresses = [buffer.ctypes.data for buffer in self.buffers]
        self._bound: BoundLayout | None = layout.bind(addresses, [buffer.nbytes for buffer in self.buffers])
        self._block_nbytes = layout.block_nbytes
        self._block_stride = np.uint64(layout.strides.block)
        self._block_plan: CopyPlan | None = self._plan_block()  # block 0 to address 0

    @property
    def bound(self) -> BoundLayout:
        """The layout with the addresses of the buffers."""
        if self._bound is None:
            raise StorageError(f"{type(self).__name__} is closed")
        return self._bound

    def wait_pinned(self, block_ids: IdArray) -> bool:
        """Wait until the memory of these blocks is pinned as far as it will be; return whether all of it is.

        Parameters
        ----------
        block_ids : (num_blocks,) int32

        Notes
        -----
        Blocks while their slices are being pinned. Always False for memory that is not our own.
        """
        pinned, layout = self.pinned, self.layout
        if pinned is None or not len(block_ids):
            return False
        in_last_buffer = int(block_ids.max()) * layout.strides.block
        in_last_buffer += layout.extent_nbytes - (layout.num_blocks - 1) * layout.strides.block
        return pinned.wait_for((layout.num_buffers - 1) * self._buffer_step + min(in_last_buffer, layout.buffer_nbytes))

    def open_buffer(self, index: int) -> npt.NDArray[np.uint8]:
        """Give a buffer's bytes: (buffer_nbytes,) uint8; raises once the storage is closed."""
        if self._is_closed:
            raise PoolClosed(f"{type(self).__name__} is closed")
        return self.buffers[index]

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Copy blocks out: (num_blocks, block_nbytes) uint8, host."""
        ids = self._begin(block_ids)
        data = np.empty((len(ids), self._block_nbytes), dtype=np.uint8)
        if len(ids):
            memory = self.buffers  # stays while bytes move, also where another thread closes
            plan, own, dense = self._addresses(ids, data)
            self._copy_blocks(own, dense, plan.source_pieces, plan.destination_pieces, plan.piece_nbytes)
            del memory
        return data

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Copy blocks in: (num_blocks, block_nbytes) uint8, host."""
        if self._is_read_only:
            raise StorageError(f"{type(self).__name__} is read-only: whoever owns its memory writes it")
        ids = self._begin(block_ids)
        data = self._checked_data(ids, data)
        self.has_checksum[ids] = False
        if len(ids):
            memory = self.buffers  # as in `read`
            plan, own, dense = self._addresses(ids, data)
            self._copy_blocks(dense, own, plan.destination_pieces, plan.source_pieces, plan.piece_nbytes)
            del memory

    def close(self, timeout: float | None = None) -> None:
        """Let go of the memory; arrays taken from it keep it alive."""
        super().close(timeout)
        self._bound = None
        self._block_plan = None
        self.buffers = []
        if self.pinned is not None:
            self.pinned.close()
            self.pinned = None

    def _addresses(self, ids: IdArray, data: npt.NDArray[np.uint8]) -> tuple[CopyPlan, AddressArray, AddressArray]:
        """Give the plan of a block, and what each block adds to it here and in a dense array, each (num_blocks,)."""
        if self._block_plan is None:
            raise StorageError(f"{type(self).__name__} is closed")
        start, step = data.ctypes.data, self._block_nbytes
        dense = np.arange(start, start + len(ids) * step, step, dtype=np.uint64)
        return self._block_plan, ids.astype(np.uint64) * self._block_stride, dense

    def _plan_block(self) -> CopyPlan:
        """Plan the copy of block 0 to an array without gaps, tokens and heads in this layout's own order.

        The order is the same on both sides, so the plan also holds the other way round.
        """
        layout = self.layout
        head, token = layout.head_nbytes, layout.inner_dim * layout.itemsize
        is_head_major = layout.region_order == ("head", "token")
        region = layout.region_nbytes
        dense = BlockLayout.custom(
            num_blocks=1,
            num_layers=layout.num_layers,
            outer_dim=layout.outer_dim,
            block_size=layout.block_size,
            inner_dim=layout.inner_dim,
            dtype=layout.dtype,
            num_heads=layout.num_heads,
            strides={
                "block": layout.block_nbytes,
                "layer": layout.outer_dim * region,
                "outer": region,
                "token": head if is_head_major else token,
                "head": head * layout.block_size if is_head_major else head,
            },
        )
        first = np.zeros(1, dtype=np.int32)
        return plan_copy(self.bound, dense.bind([0]), first, first)

    def _pin(self, gpu: Gpu, use_huge_pages: bool, num_threads: int) -> list[npt.NDArray[np.uint8]]:
        nbytes = self.layout.buffer_nbytes
        self._buffer_step = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
        total = (self.layout.num_buffers - 1) * self._buffer_step + nbytes
        self.pinned = PinnedMemory(
            gpu,
            total,
            num_threads=num_threads,
            use_huge_pages=use_huge_pages,
        )
        self.has_huge_pages = self.pinned.has_huge_pages
        starts = range(0, total, self._buffer_step)
        return [self.pinned.memory[start : start + nbytes] for start in starts]

    def _map(self, use_huge_pages: bool) -> npt.NDArray[np.uint8]:
        nbytes = self.layout.buffer_nbytes
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise StorageError(f"cannot map {nbytes} bytes of host memory: {error}") from error
        if use_huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
                self.has_huge_pages = True
            except OSError as error:
                _log.info("huge pages refused nbytes=%d reason=%s", nbytes, error)
        return np.frombuffer(memory, dtype=np.uint8)


def touch_pages(buffers: Sequence[npt.NDArray[np.uint8]], num_threads: int) -> None:
    """Write a zero to every page, the buffers cut among threads.

    Parameters
    ----------
    buffers : sequence of (nbytes,) uint8, host
        Fresh memory: the first byte of each page is lost.
    num_threads : int
        Wanted; no more than there are cores.

    Notes
    -----
    Blocks until all is touched.
    """
    num_threads = max(1, min(num_threads, os.cpu_count() or 1))

    def touch(part: int) -> None:
        for buffer in buffers:
            pages = buffer[::_PAGE_NBYTES]
            pages[len(pages) * part // num_threads : len(pages) * (part + 1) // num_threads] = 0

    threads = [threading.Thread(target=touch, args=(part,)) for part in range(1, num_threads)]
    for thread in threads:
        thread.start()
    touch(0)
    for thread in threads:
        thread.join()


def _as_bytes(buffer: Any, index: int, is_read_only: bool) -> npt.NDArray[np.uint8]:
    view = memoryview(buffer)
    if (view.readonly and not is_read_only) or not view.c_contiguous:
        raise LayoutError(f"buffer {index} must be writable and contiguous")
    return np.frombuffer(view.cast("B"), dtype=np.uint8)
