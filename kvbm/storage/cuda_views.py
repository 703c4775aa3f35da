"""Windows onto blocks in GPU memory: ``__cuda_array_interface__`` and DLPack, never a NumPy array.

What is exported keeps the memory alive, also after the manager is gone. Blocks that are registered are shown read-only
where the protocol can say so, else not at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import LayoutError, StorageError
from kvbm.gpu.dlpack import CUDA, make_dlpack
from kvbm.storage.cuda import CudaStorage


class CudaArrayView:
    """Part of a block on a GPU as an n-dimensional window.

    Parameters
    ----------
    storage : CudaStorage
    address : int
        Of the first element.
    shape, strides : tuple of int
        Elements, and bytes.
    is_writable : bool
    """

    __slots__ = ("_address", "_dtype", "_is_writable", "_owners", "_shape", "_storage", "_strides")

    def __init__(
        self,
        storage: CudaStorage,
        address: int,
        *,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        is_writable: bool,
    ) -> None:
        self._storage = storage
        self._owners = storage.owners
        self._address = address
        self._shape = shape
        self._strides = strides
        self._dtype = storage.layout.numpy_dtype
        self._is_writable = is_writable

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements on each axis."""
        return self._shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next on each axis."""
        return self._strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type; an unsigned integer of the same width where NumPy has none of that name."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes shown."""
        return int(np.prod(self._shape)) * self._dtype.itemsize

    @property
    def is_writable(self) -> bool:
        """Whether the bytes may be written."""
        return self._is_writable

    def numpy(self) -> npt.NDArray[Any]:
        """Refuse: the processor cannot read this memory; raises `StorageError`."""
        raise StorageError(
            "this block lies in GPU memory: use torch.from_dlpack(view) or cupy.asarray(view), or store_kv and load_kv "
            "of the manager; KVBM_DEVICE=cpu keeps the tier in host memory"
        )

    def tobytes(self) -> bytes:
        """Copy the bytes to the host; waits for the work on the storage's streams."""
        return self._storage.read_strided(self._address, self._shape, self._strides).tobytes()

    def assign(self, data: Any, *, dtype: str) -> None:
        """Overwrite all of it; arguments and errors as for `ArrayView.assign`. Waits until the bytes are there."""
        source = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
        if source.dtype.name != dtype and source.dtype not in (f"u{self._dtype.itemsize}", np.uint8):
            raise LayoutError(f"blocks hold {dtype}, got an array of {source.dtype}: convert it, or give its bytes")
        if source.nbytes != self.nbytes:
            raise LayoutError(f"this part of a block takes {self.nbytes} bytes, got {source.nbytes}")
        self._storage.write_strided(self._address, self._shape, self._strides, source.reshape(-1).view(np.uint8))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "typestr": self._dtype.str,
            "shape": self._shape,
            "strides": self._strides,
            "data": (self._address, not self._is_writable),
            "stream": None,  # whatever was copied here has landed
        }

    def __dlpack__(self, **kwargs: Any) -> Any:
        """Give a capsule; of the protocol's arguments `stream` changes nothing, for what was copied here has landed."""
        dl_device = kwargs.get("dl_device")
        if kwargs.get("copy") or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("blocks are shown where they lie, without a copy: copy what you get")
        return make_dlpack(
            self._address,
            self._shape,
            self._strides,
            self._dtype,
            device=self.__dlpack_device__(),
            owner=self._owners,
            is_read_only=not self._is_writable,
            max_version=kwargs.get("max_version"),
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._storage.gpu.device.index

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        device = self._storage.gpu.device.index
        return f"CudaArrayView{self._shape}({self._dtype}, cuda:{device}{'' if self._is_writable else ', read-only'})"


class CudaStorageBytes:
    """Shows the blocks of a storage in GPU memory; the `kvbm.types.BlockBytes` that a manager gives its pool."""

    def __init__(self, storage: CudaStorage) -> None:
        self._storage = storage
        self._layout = storage.layout

    def block(self, block_id: int, *, writable: bool) -> CudaArrayView:
        """View a whole block: (num_layers, outer_dim, block_size, inner_dim).

        Raises
        ------
        LayoutError
            Its layers lie in buffers of their own.
        """
        layout = self._layout
        if layout.has_layer_buffers and layout.num_layers > 1:
            raise LayoutError("a block of this layout is not in one piece: use .layer(i)")
        axes = [(layout.num_layers, layout.strides.layer), (layout.outer_dim, layout.strides.outer)]
        return self._view(block_id, 0, 0, axes, writable)

    def layer(self, block_id: int, layer: int, *, writable: bool) -> CudaArrayView:
        """View one layer: (outer_dim, block_size, inner_dim)."""
        return self._view(block_id, layer, 0, [(self._layout.outer_dim, self._layout.strides.outer)], writable)

    def layer_view(self, block_id: int, layer: int, outer: int, *, writable: bool) -> CudaArrayView:
        """View one layer's K or V: (block_size, inner_dim)."""
        return self._view(block_id, layer, outer, [], writable)

    def _view(
        self, block_id: int, layer: int, outer: int, axes: list[tuple[int, int]], writable: bool
    ) -> CudaArrayView:
        layout = self._layout
        self._storage.check_open()
        if layout.num_heads > 1 and layout.strides.head != layout.head_nbytes:
            raise LayoutError("the heads of a token do not lie side by side in this layout: use storage.read")
        if writable:
            self._storage.has_checksum[block_id] = False  # whoever writes through the view does not tell us
        axes = [*axes, (layout.block_size, layout.strides.token), (layout.inner_dim, layout.itemsize)]
        return CudaArrayView(
            self._storage,
            self._storage.address(block_id, layer, outer),
            shape=tuple(size for size, _ in axes),
            strides=tuple(stride for _, stride in axes),
            is_writable=writable,
        )
