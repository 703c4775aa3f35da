"""The exception tree: one root, nearest builtins, and all of it pickles."""

from __future__ import annotations

import pickle

import pytest

from kvbm import errors

LEAVES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.KvbmError) and value is not errors.KvbmError
]
ARGUMENTS: dict[type[errors.KvbmError], tuple[object, ...]] = {
    errors.NotEnoughBlocksAvailable: (12, 10, "(7 free + 3 evictable)"),
    errors.DeviceError: ("cudaMalloc", "cudaErrorMemoryAllocation", 2, "out of memory", 0, 4096),
}


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind: type[errors.KvbmError]) -> None:
    error = kind(*ARGUMENTS.get(kind, ("what happened",)))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_error_is_the_nearest_builtin_too(kind: type[errors.KvbmError]) -> None:
    builtin = (MemoryError, RuntimeError, IndexError, ValueError, OSError, ImportError)
    assert issubclass(kind, builtin)


def test_shortage_names_both_numbers() -> None:
    error = errors.NotEnoughBlocksAvailable(12, 10, "(7 free + 3 evictable, pool 'host', 1024 total)")
    assert (error.requested, error.available) == (12, 10)
    assert str(error) == "need 12 blocks, have 10 (7 free + 3 evictable, pool 'host', 1024 total)"
    assert str(errors.NotEnoughBlocksAvailable(2, 1)) == "need 2 blocks, have 1"


def test_device_error_names_call_size_device_and_code() -> None:
    error = errors.DeviceError("cudaMalloc", "cudaErrorMemoryAllocation", 2, "out of memory", 1, 4096)
    assert isinstance(error, errors.CudaError)
    assert (error.call, error.name, error.code, error.device, error.nbytes) == (
        "cudaMalloc",
        "cudaErrorMemoryAllocation",
        2,
        1,
        4096,
    )
    assert str(error) == ("cudaMalloc of 4096 bytes on device 1 failed: cudaErrorMemoryAllocation (2), out of memory")
    assert str(errors.DeviceError("cudaGetDeviceCount", "cudaErrorNoDevice", 100, "no device")) == (
        "cudaGetDeviceCount failed: cudaErrorNoDevice (100), no device"
    )
