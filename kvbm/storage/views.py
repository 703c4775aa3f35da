"""Windows onto blocks and layers that share the storage's memory: NumPy, DLPack, buffer protocol.

An exported array keeps the memory alive, also after the manager is gone. Blocks that are registered are shown
read-only; whoever keeps an array beyond the life of its guard reads whatever the slot holds by then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import LayoutError
from kvbm.storage.host import HostStorage


class ArrayView:
    """Part of a block as an n-dimensional window.

    Notes
    -----
    From Python 3.12 on the buffer protocol works on the view itself, ``memoryview(view)``; before, a class written in
    Python cannot offer it: use ``memoryview(view.numpy())``, which every version takes.

    DLPack knows no read-only memory before version 1.0: a consumer that does not ask for it gets `BufferError` on a
    registered block, as from NumPy. Use ``torch.from_numpy(view.numpy().copy())`` there.
    """

    __slots__ = ("_array",)

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements on each axis."""
        return self._array.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next on each axis."""
        return self._array.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type; an unsigned integer of the same width where NumPy has none of that name."""
        return self._array.dtype

    @property
    def nbytes(self) -> int:
        """Bytes shown."""
        return self._array.nbytes

    @property
    def is_writable(self) -> bool:
        """Whether the bytes may be written."""
        return bool(self._array.flags.writeable)

    def numpy(self) -> npt.NDArray[Any]:
        """Give an array that shares the memory."""
        return self._array

    def tobytes(self) -> bytes:
        """Copy the bytes."""
        return self._array.tobytes()

    def assign(self, data: Any, *, dtype: str) -> None:
        """Overwrite all of it.

        Parameters
        ----------
        data : bytes-like or array
            As many bytes as are shown. An array has the block's dtype, or is unsigned integers of the same width, or
            bytes.
        dtype : str
            Element type of the block.

        Raises
        ------
        LayoutError
            Wrong size or dtype; nothing was written.
        """
        source = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
        if source.dtype.name != dtype and source.dtype not in (f"u{self.dtype.itemsize}", np.uint8):
            raise LayoutError(f"blocks hold {dtype}, got an array of {source.dtype}: convert it, or give its bytes")
        if source.nbytes != self.nbytes:
            raise LayoutError(f"this part of a block takes {self.nbytes} bytes, got {source.nbytes}")
        self._array[...] = source.reshape(-1).view(self.dtype).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy or (dtype is not None and np.dtype(dtype) != self._array.dtype):
            return self._array.astype(dtype or self._array.dtype)
        return self._array

    def __buffer__(self, flags: int) -> memoryview:
        return self._array.data

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __len__(self) -> int:
        return len(self._array)

    def __repr__(self) -> str:
        return f"ArrayView{self.shape}({self.dtype}{'' if self.is_writable else ', read-only'})"


class StorageBytes:
    """Shows the blocks of a storage in host memory; the `kvbm.types.BlockBytes` that a manager gives its pool."""

    def __init__(self, storage: HostStorage) -> None:
        self._storage = storage
        self._layout = storage.layout

    def block(self, block_id: int, *, writable: bool) -> ArrayView:
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

    def layer(self, block_id: int, layer: int, *, writable: bool) -> ArrayView:
        """View one layer: (outer_dim, block_size, inner_dim)."""
        return self._view(block_id, layer, 0, [(self._layout.outer_dim, self._layout.strides.outer)], writable)

    def layer_view(self, block_id: int, layer: int, outer: int, *, writable: bool) -> ArrayView:
        """View one layer's K or V: (block_size, inner_dim)."""
        return self._view(block_id, layer, outer, [], writable)

    def _view(self, block_id: int, layer: int, outer: int, axes: list[tuple[int, int]], writable: bool) -> ArrayView:
        layout = self._layout
        buffer, offset = layout.offset(block_id, layer, outer)
        if layout.num_heads > 1 and layout.strides.head != layout.head_nbytes:
            raise LayoutError("the heads of a token do not lie side by side in this layout: use storage.read")
        axes = [*axes, (layout.block_size, layout.strides.token), (layout.inner_dim, layout.itemsize)]
        array: npt.NDArray[Any] = np.ndarray(
            shape=tuple(size for size, _ in axes),
            dtype=layout.numpy_dtype,
            buffer=self._buffer(buffer),
            offset=offset,
            strides=tuple(stride for _, stride in axes),
        )
        if writable:
            self._storage.has_checksum[block_id] = False  # whoever writes through the view does not tell us
        else:
            array.flags.writeable = False
        return ArrayView(array)

    def _buffer(self, index: int) -> Any:
        return self._storage.open_buffer(index)
