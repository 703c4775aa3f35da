"""Arrays of other packages as plain regions of memory: adopted without a copy, and kept alive.

Whatever shows ``__cuda_array_interface__`` or DLPack is taken: torch tensors, CuPy and Numba arrays, JAX, NumPy.
Strides are read, never guessed from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvbm.errors import LayoutError
from kvbm.gpu.dlpack import CPU, CUDA, CUDA_HOST, dense_strides, read_dlpack

_KINDS = {CPU: "host", CUDA: "device", CUDA_HOST: "pinned"}


@dataclass(frozen=True)
class Region:
    """Memory that somebody else owns.

    Attributes
    ----------
    address : int
        Of the first element.
    shape : tuple of int
        Elements on each axis.
    strides : tuple of int
        Bytes from one index to the next.
    itemsize : int
        Bytes an element.
    kind : {"device", "host", "pinned"}
    device_index : int or None
        None where the array does not tell, and for host memory.
    is_read_only : bool
    owner : object
        Keeps the memory alive as long as the region lives.
    stream : int or None
        Handle of the stream on which the array was last written, where it tells one.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: str
    device_index: int | None
    is_read_only: bool
    owner: Any
    stream: int | None = None

    @property
    def extent_nbytes(self) -> int:
        """Bytes from the first to the end of the last element."""
        if 0 in self.shape:
            return 0
        pairs = zip(self.shape, self.strides, strict=True)
        return sum((size - 1) * stride for size, stride in pairs) + self.itemsize


def region_of(array: Any) -> Region:
    """Give the memory that an array shows.

    Parameters
    ----------
    array : object
        With ``__cuda_array_interface__``, or with ``__dlpack__`` and ``__dlpack_device__``; of CUDA memory, host memory
        or pinned host memory.

    Raises
    ------
    LayoutError
        It shows neither, or memory of another kind; or its strides run backwards, or some of it is masked out.

    Examples
    --------
    >>> region = region_of(np.zeros((4, 6), dtype=np.float32)[:, :3])
    >>> region.kind, region.shape, region.strides, region.extent_nbytes
    ('host', (4, 3), (24, 4), 84)
    """
    interface = _interface_of(array)
    if interface is not None:
        region = _of_interface(interface, array)
    elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        region = _of_dlpack(array)
    else:
        raise LayoutError(
            f"a {type(array).__module__}.{type(array).__name__} shows neither __cuda_array_interface__ nor DLPack: "
            "give a torch tensor, a CuPy array or the like"
        )
    if any(stride < 0 for size, stride in zip(region.shape, region.strides, strict=True) if size > 1):
        raise LayoutError(f"strides {region.strides} run backwards: give the array as it lies in memory")
    return region


def _interface_of(array: Any) -> dict[str, Any] | None:
    try:
        interface: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
    except Exception:  # torch raises KeyError for floats of 8 bits, which have no name there: DLPack knows them
        if not hasattr(array, "__dlpack__"):
            raise
        return None
    return interface


def _of_interface(interface: dict[str, Any], array: Any) -> Region:
    try:
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        address, is_read_only = interface["data"]
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"the __cuda_array_interface__ of a {type(array).__name__} is incomplete: {error}") from error
    if interface.get("mask") is not None:
        raise LayoutError(f"a {type(array).__name__} with a mask cannot hold blocks: give the array without it")
    strides = interface.get("strides")
    steps = dense_strides(shape, dtype.itemsize) if strides is None else tuple(int(step) for step in strides)
    stream = interface.get("stream")
    if stream == 0:
        raise LayoutError(
            f"the __cuda_array_interface__ of a {type(array).__name__} names stream 0, which is ambiguous"
        )
    return Region(int(address), shape, steps, dtype.itemsize, "device", None, bool(is_read_only), array, stream)


def _of_dlpack(array: Any) -> Region:
    device_type = int(array.__dlpack_device__()[0])
    if device_type not in _KINDS:
        raise LayoutError(
            f"a {type(array).__name__} lies in memory of DLPack device type {device_type}; known are 1 (host), "
            "2 (CUDA) and 3 (pinned host)"
        )
    tensor = read_dlpack(array)
    index = tensor.device[1] if device_type == CUDA else None
    return Region(
        tensor.address,
        tensor.shape,
        tensor.strides,
        tensor.itemsize,
        _KINDS[device_type],
        index,
        tensor.is_read_only,
        (array, tensor.owner),
    )
