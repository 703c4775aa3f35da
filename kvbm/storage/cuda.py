"""GPU memory bound to a layout: our own, or regions that an engine owns and describes by their strides.

The processor cannot read it: `kvbm.transfer.GpuTransferEngine` moves its bytes, and `read` and `write` here, which
wait. An engine writes into it at any time, so no checksum is kept. Every copy waits for what was queued by then on the
attached streams, at first the legacy default stream: a block is never copied before the work that fills it, nor
overwritten before the work that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.copyplan import AddressArray, plan_copy
from kvbm.errors import LayoutError, PoolClosed, StorageError
from kvbm.gpu import DeviceMemory, Gpu, Region, find_gpu, region_of
from kvbm.gpu.segments import parts_in_one
from kvbm.gpu.streams import make_wait, stream_handle
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.storage.base import Storage, StorageCapabilities
from kvbm.types import IdArray

BUFFER_ALIGNMENT = 256  # of each buffer of our own
_Part = tuple[AddressArray, AddressArray]  # what each block adds, and the address of each piece


class CudaStorage(Storage):
    """Blocks in GPU memory.

    Parameters
    ----------
    layout : BlockLayout
    gpu : Gpu, optional
        None takes what `find_gpu` gives.
    buffers : sequence of arrays, optional
        One for each buffer of the layout, on this device: torch tensors, CuPy arrays, anything that `region_of` takes;
        kept alive, never copied. The layout says where blocks lie in them. None allocates memory of our own.
    streams : sequence of objects
        What `attach_streams` takes.

    Attributes
    ----------
    gpu : Gpu
    streams : tuple
        Streams whose work every copy waits for.
    owners : list
        What keeps the memory alive; whoever moves bytes holds it.

    Raises
    ------
    StorageError
        There is no GPU, or not enough memory on it.
    LayoutError
        Buffers of wrong number, size, kind or device, or read-only ones.
    """

    capabilities = StorageCapabilities(is_addressable=True, is_device=True, is_gpu=True)
    keeps_checksums = False

    def __init__(
        self,
        layout: BlockLayout,
        *,
        gpu: Gpu | None = None,
        buffers: Sequence[Any] | None = None,
        streams: Sequence[Any] = (None,),
    ) -> None:
        super().__init__(layout)
        found = gpu if gpu is not None else find_gpu()
        if found is None:
            raise StorageError("there is no GPU for this storage: use DeviceStorage, or see kvbm info for the reason")
        self.gpu = found
        self.owners: list[Any]
        if buffers is None:
            step = -(-layout.buffer_nbytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
            memory = DeviceMemory(found, (layout.num_buffers - 1) * step + layout.buffer_nbytes)
            self.owners = [memory]
            starts = [memory.address + i * step for i in range(layout.num_buffers)]
            sizes = [layout.buffer_nbytes] * layout.num_buffers
        else:
            regions = [self._adopt(buffer, i) for i, buffer in enumerate(buffers)]
            self.owners = [region.owner for region in regions]
            starts = [region.address for region in regions]
            sizes = [region.extent_nbytes for region in regions]
        # Somebody else may have allocated each of them on its own.
        self.segment_starts: AddressArray = np.array(sorted(starts) if buffers is not None else [], dtype=np.uint64)
        ends = {start + size for start, size in zip(starts, sizes, strict=True)}
        self.has_adjacent_segments = buffers is not None and not ends.isdisjoint(starts)
        self._bound: BoundLayout | None = self._bind(starts, sizes)
        self._stream = found.device.create_stream()
        self.streams: tuple[Any, ...] = ()
        self.attach_streams(*streams)

    @property
    def bound(self) -> BoundLayout:
        """The layout with the addresses of the buffers, on the device; raises `StorageError` once it is closed."""
        if self._bound is None:
            raise StorageError(f"{type(self).__name__} is closed")
        return self._bound

    def attach_streams(self, *streams: Any) -> None:
        """Name the streams on which others read and write this memory, instead of those named before.

        Parameters
        ----------
        *streams : object
            As for `kvbm.gpu.stream_handle`; None is the legacy default stream. With none at all the caller orders
            everything by ``wait_for=``.

        Raises
        ------
        ConfigError
            One is no stream; nothing changed.
        """
        for stream in streams:
            stream_handle(stream)
        self.streams = streams

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Copy blocks out: (num_blocks, block_nbytes) uint8, host; waits until they are here."""
        ids = self._begin(block_ids)
        data = np.empty((len(ids), self.layout.block_nbytes), dtype=np.uint8)
        self._move(ids, data, is_read=True)
        return data

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Copy blocks in: (num_blocks, block_nbytes) uint8, host; waits until they are there."""
        ids = self._begin(block_ids)
        data = self._checked_data(ids, data)
        self.has_checksum[ids] = False
        self._move(ids, data, is_read=False)

    def read_strided(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Copy a part of this memory out, after the work on the attached streams: (nbytes,) uint8, host; waits.

        Parameters
        ----------
        address : int
            Of the first element.
        shape, strides : tuple of int
            Elements, and bytes; the last axis is contiguous.
        """
        offsets, run_nbytes = _runs_of(shape, strides)
        data = np.empty((len(offsets), run_nbytes), dtype=np.uint8)
        self._move_runs(address, offsets, data, is_read=True)
        return data.reshape(-1)

    def write_strided(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], data: npt.NDArray[np.uint8]
    ) -> None:
        """Copy bytes, (nbytes,) uint8 on the host, to a part of this memory; as `read_strided`."""
        offsets, run_nbytes = _runs_of(shape, strides)
        self._move_runs(address, offsets, data.reshape(len(offsets), run_nbytes), is_read=False)

    def check_open(self) -> None:
        """Raise `PoolClosed` once the storage is closed."""
        if self._is_closed:
            raise PoolClosed(f"{type(self).__name__} is closed")

    def close(self, timeout: float | None = None) -> None:
        """Let go of the memory; arrays taken from it, and copies under way, keep it alive."""
        if self._is_closed:
            return
        super().close(timeout)
        self._bound = None
        self.owners = []
        if self.gpu.is_usable:
            self._stream.close()

    def _move(self, ids: IdArray, data: npt.NDArray[np.uint8], *, is_read: bool) -> None:
        if not len(ids):
            return
        held = self.owners  # stays while bytes move, also where another thread closes
        order = self.layout.dense(len(ids)).bind([data.ctypes.data])
        rows = np.arange(len(ids), dtype=np.int32)
        plan = plan_copy(self.bound, order, ids, rows) if is_read else plan_copy(order, self.bound, rows, ids)
        parts = (plan.source_blocks, plan.source_pieces), (plan.destination_blocks, plan.destination_pieces)
        self._queue(*parts, plan.piece_nbytes, is_read=is_read)
        del held

    def _move_runs(
        self, address: int, offsets: npt.NDArray[np.uint64], data: npt.NDArray[np.uint8], *, is_read: bool
    ) -> None:
        self.check_open()
        held = self.owners
        device, first = np.array([address], dtype=np.uint64), np.array([data.ctypes.data], dtype=np.uint64)
        steps = np.arange(len(offsets), dtype=np.uint64) * np.uint64(data.shape[1])
        there, here = (device, offsets), (first, steps)
        source, destination = (there, here) if is_read else (here, there)
        self._queue(source, destination, data.shape[1], is_read=is_read)
        del held

    def _queue(self, source: _Part, destination: _Part, piece_nbytes: int, *, is_read: bool) -> None:
        self._wait_for_others()
        nowhere = np.empty(0, dtype=np.uint64)
        starts = (self.segment_starts, nowhere) if is_read else (nowhere, self.segment_starts)
        try:
            for blocks, pieces in parts_in_one((*source, starts[0]), (*destination, starts[1])):
                self.gpu.device.copy(
                    self._stream,
                    source[0][blocks],
                    destination[0][blocks],
                    source[1][pieces],
                    destination[1][pieces],
                    piece_nbytes,
                    path="memcpy",  # the host side is not pinned
                    source_on_device=is_read,
                    destination_on_device=not is_read,
                )
        finally:  # what was queued before a failure still runs
            self._stream.synchronize()

    def _wait_for_others(self) -> None:
        for stream in self.streams:
            make_wait(self.gpu, self._stream, stream)

    def _adopt(self, buffer: Any, index: int) -> Region:
        region = region_of(buffer)
        device = self.gpu.device
        kind, holder = self.gpu.module.pointer_kind(region.address)
        if region.kind != "device" or kind not in ("device", "managed"):
            raise LayoutError(f"buffer {index} lies in {region.kind} memory, give one on {device.name}")
        if holder != device.index:
            raise LayoutError(f"buffer {index} lies on device {holder}, this storage is on device {device.index}")
        if region.is_read_only:
            raise LayoutError(f"buffer {index} is read-only, blocks are written")
        return region

    def _bind(self, addresses: Sequence[int], sizes: Sequence[int]) -> BoundLayout:
        """Bind the layout; a buffer may end with its last element, without the gap behind it."""
        layout = self.layout
        for i, size in enumerate(sizes):
            if size < layout.extent_nbytes:
                raise LayoutError(f"buffer {i} has {size} bytes, the layout needs {layout.extent_nbytes}")
        return layout.bind(addresses)


def _runs_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[AddressArray, int]:
    """Give the offset of each contiguous run of an array, in order, and the bytes of a run."""
    axes = list(zip(shape, strides, strict=True))
    size, nbytes = axes.pop()
    nbytes *= size
    while axes and axes[-1][1] == nbytes:
        nbytes *= axes.pop()[0]
    offsets: AddressArray = np.zeros((), dtype=np.uint64)
    for size, stride in axes:
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.uint64) * np.uint64(stride))
    return offsets.ravel(), nbytes
