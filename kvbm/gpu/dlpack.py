"""DLPack by ctypes: reads capsules of other packages without consuming them, and makes capsules of our own.

Both forms are known, "dltensor" and, from DLPack 1.0 on, "dltensor_versioned". A capsule that is read stays whole: who
holds it keeps the memory alive, and its own destructor gives it back. What a capsule of ours shows stays alive until
its consumer calls the deleter.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvbm.errors import LayoutError

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType
_VERSION = (1, 0)
_READ_ONLY, _PLAIN, _VERSIONED = 1, b"dltensor", b"dltensor_versioned"
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


@dataclass(frozen=True)
class DlTensor:
    """What a capsule says.

    Attributes
    ----------
    address : int
        Of the first element.
    shape : tuple of int
    strides : tuple of int
        Bytes.
    itemsize : int
        Bytes.
    device : tuple of int
        DLPack's device type and index.
    is_read_only : bool
        False where the form cannot say.
    owner : object
        Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: tuple[int, int]
    is_read_only: bool
    owner: Any


_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _api),
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
# A destructor runs while the capsule dies: it must be named by address, never made into an object again.
_is_valid_raw = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_raw = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))


# -- in --------------------------------------------------------------------------------------------------------


def read_dlpack(array: Any) -> DlTensor:
    """Ask an object for its capsule and read it.

    Parameters
    ----------
    array : object
        With ``__dlpack__`` and ``__dlpack_device__``.

    Raises
    ------
    LayoutError
        The capsule is of a form that is not known, or its elements are no whole bytes.

    Notes
    -----
    The producer is not asked to order its streams: whoever moves the bytes says what to wait for.
    """
    device_type, _ = array.__dlpack_device__()
    stream = -1 if int(device_type) == CUDA else None
    try:
        capsule = array.__dlpack__(stream=stream, max_version=_VERSION)
    except TypeError:  # made before DLPack 1.0
        capsule = array.__dlpack__(stream=stream)
    if _is_valid(capsule, _VERSIONED):
        versioned = _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED))
        if versioned.major != _VERSION[0]:
            raise LayoutError(f"DLPack {versioned.major}.{versioned.minor} is not known, only 1.x and before")
        return _describe(versioned.tensor, bool(versioned.flags & _READ_ONLY), capsule)
    if _is_valid(capsule, _PLAIN):
        return _describe(_Managed.from_address(_pointer(capsule, _PLAIN)).tensor, False, capsule)
    raise LayoutError(f"{type(array).__name__}.__dlpack__ gave {capsule!r}, which is no DLPack capsule")


def _describe(tensor: _Tensor, is_read_only: bool, owner: Any) -> DlTensor:
    bits = tensor.dtype.bits * tensor.dtype.lanes
    if bits % 8:
        raise LayoutError(f"elements of {bits} bits are no whole bytes: view the array as uint8")
    itemsize = bits // 8
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] * itemsize for i in range(tensor.ndim))
    else:
        strides = dense_strides(shape, itemsize)
    address = (tensor.data or 0) + tensor.byte_offset
    return DlTensor(address, shape, strides, itemsize, (tensor.device.type, tensor.device.index), is_read_only, owner)


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Give the strides, in bytes, of a C-contiguous array."""
    return tuple(itertools.accumulate(reversed(shape[1:]), int.__mul__, initial=itemsize))[::-1] if shape else ()


# -- out -------------------------------------------------------------------------------------------------------

_shown: dict[int, tuple[Any, ...]] = {}  # by the address of the managed tensor: all that must live until its deleter


def make_dlpack(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    device: tuple[int, int],
    owner: Any,
    is_read_only: bool = False,
    max_version: tuple[int, int] | None = None,
) -> Any:
    """Make a capsule that shows memory.

    Parameters
    ----------
    address : int
    shape, strides : tuple of int
        Elements, and bytes.
    dtype : numpy.dtype
    device : tuple of int
        DLPack's device type and index.
    owner : object
        Kept until the consumer is done.
    is_read_only : bool
    max_version : tuple of int, optional
        What the consumer knows; below (1, 0) the old form is given, which cannot say that memory is read-only.

    Raises
    ------
    BufferError
        The memory is read-only and the consumer's form cannot say so.
    """
    is_versioned = max_version is not None and tuple(max_version) >= (1, 0)
    if is_read_only and not is_versioned:
        raise BufferError("a registered block is read-only, which DLPack before 1.0 cannot say: copy it first")
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    steps = (ctypes.c_int64 * max(1, len(shape)))(*(stride // dtype.itemsize for stride in strides))
    tensor = _Tensor(
        address,
        _Device(*device),
        len(shape),
        _DType(_CODES[dtype.kind], dtype.itemsize * 8, 1),
        ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64)),
        0,
    )
    managed: Any
    if is_versioned:
        managed = _ManagedVersioned(*_VERSION, None, _forget, _READ_ONLY if is_read_only else 0, tensor)
    else:
        managed = _Managed(tensor, None, _forget)
    place = ctypes.addressof(managed)
    _shown[place] = managed, sizes, steps, owner
    return _new(place, _VERSIONED if is_versioned else _PLAIN, ctypes.cast(_drop, ctypes.c_void_p))


def _forget_shown(place: int) -> None:
    _shown.pop(place, None)


def _drop_unused(capsule: int) -> None:
    """Give the memory of a capsule back that nobody consumed; a consumer gives it another name."""
    for name in (_PLAIN, _VERSIONED):
        if _is_valid_raw(capsule, name):
            _shown.pop(_pointer_raw(capsule, name), None)


_forget = _Deleter(_forget_shown)
_drop = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_drop_unused)
