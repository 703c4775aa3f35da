"""Picks the native or the pure twin once, whole, and says why.

``KVBM_BACKEND=auto|native|pure``. Auto falls back to pure only when the extension modules are absent; one that is
there but broken raises with its cause. Only this module names ``_pure`` and ``_native``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.errors import BackendError, ConfigError
from kvbm.types import HashArray, IdArray

if TYPE_CHECKING:  # so that those above can name the types without naming the module
    from kvbm._native.device import Device, Event, Stream

__all__ = ["Backend", "Device", "Event", "Store", "Stream", "default_backend", "load_backend", "load_device_module"]

DEVICE_CHOICES = ("auto", "cuda", "cpu", "simulated")  # of KVBM_DEVICE

_MODULES = ("store", "hashing", "copies")


class Store(Protocol):
    """The store contract that both twins keep; `kvbm._pure.store.Store` documents it call by call."""

    num_blocks: int

    def allocate(self, n: int) -> tuple[IdArray, HashArray] | None: ...
    def stage(self, ids: IdArray, hashes: HashArray, parents: HashArray) -> None: ...
    def register(self, ids: IdArray) -> tuple[IdArray, npt.NDArray[np.bool_]]: ...
    def match(self, hashes: HashArray) -> IdArray: ...
    def find(self, hashes: HashArray) -> IdArray: ...
    def acquire(self, ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]: ...
    def release(self, ids: IdArray) -> int: ...
    def touch(self, hashes: HashArray) -> int: ...
    def set_priority(self, hashes: HashArray, priority: int) -> int: ...
    def remove(self, hashes: HashArray) -> tuple[HashArray, HashArray, HashArray]: ...
    def discard(self, ids: IdArray) -> None: ...
    def restore(
        self, ids: IdArray, hashes: HashArray, parents: HashArray, priorities: npt.NDArray[np.uint8]
    ) -> None: ...
    def clear(self) -> int: ...
    def counts(self) -> dict[str, int]: ...
    def states(self, ids: IdArray) -> npt.NDArray[np.uint8]: ...
    def describe(self, ids: IdArray) -> tuple[HashArray, HashArray, npt.NDArray[np.uint8]]: ...
    def registered(self) -> tuple[IdArray, HashArray, HashArray, int]: ...
    def check(self) -> None: ...
    def subscribe(self) -> None: ...
    def unsubscribe(self) -> None: ...
    def drain(self, max_rows: int) -> npt.NDArray[Any]: ...


class StoreFactory(Protocol):
    """How a store is made; `policy` None means the built-in LRU."""

    def __call__(self, num_blocks: int, *, policy: Any = None, outbox_capacity: int = 65536) -> Store: ...


class CopyBlocks(Protocol):
    """`copy_blocks` of both twins."""

    def __call__(
        self,
        source_blocks: npt.NDArray[np.uint64],
        destination_blocks: npt.NDArray[np.uint64],
        source_pieces: npt.NDArray[np.uint64],
        destination_pieces: npt.NDArray[np.uint64],
        piece_nbytes: int,
        *,
        hashes: HashArray | None = None,
        num_threads: int = 1,
    ) -> npt.NDArray[np.uint64] | None: ...


class MemcpyBlocks(Protocol):
    """`memcpy_blocks` of the native twin: what benchmarks compare with."""

    def __call__(
        self,
        source_blocks: npt.NDArray[np.uint64],
        destination_blocks: npt.NDArray[np.uint64],
        source_pieces: npt.NDArray[np.uint64],
        destination_pieces: npt.NDArray[np.uint64],
        piece_nbytes: int,
    ) -> None: ...


class ChecksumBlocks(Protocol):
    """`checksum_blocks` of both twins."""

    def __call__(
        self,
        blocks: npt.NDArray[np.uint64],
        pieces: npt.NDArray[np.uint64],
        piece_nbytes: int,
        hashes: HashArray,
        *,
        num_threads: int = 1,
    ) -> npt.NDArray[np.uint64]: ...


class HashBlocks(Protocol):
    """`hash_blocks` of both twins."""

    def __call__(
        self,
        key: bytes,
        parent: bytes,
        tokens: npt.NDArray[np.uint32],
        block_size: int,
        extras: Sequence[bytes] | None = None,
    ) -> HashArray: ...


class Blake2b(Protocol):
    """`blake2b` of both twins."""

    def __call__(self, data: bytes, *, digest_size: int, key: bytes = b"", person: bytes = b"") -> bytes: ...


@dataclass(frozen=True)
class Backend:
    """One twin: its name, why it was chosen, and its entry points."""

    name: str
    reason: str
    store: StoreFactory
    blake2b: Blake2b
    hash_blocks: HashBlocks
    copy_blocks: CopyBlocks
    checksum_blocks: ChecksumBlocks
    cpu_features: tuple[str, ...] = ()
    memcpy_blocks: MemcpyBlocks | None = None
    disk_io: ModuleType | None = None  # disk queues; None where there are none: Python's own threads move blocks then


def load_backend(choice: str = "auto") -> Backend:
    """Load a twin.

    Parameters
    ----------
    choice : {"auto", "native", "pure"}

    Raises
    ------
    ConfigError
        Another choice.
    BackendError
        The native twin was asked for and is absent, or it is there and cannot be loaded.
    """
    if choice not in ("auto", "native", "pure"):
        raise ConfigError(f"twin {choice!r} is not known, use auto, native or pure (argument, or KVBM_BACKEND)")
    if choice == "pure":
        return _assemble("pure", "asked for")
    absent = [name for name in _MODULES if importlib.util.find_spec(f"kvbm._native.{name}") is None]
    if len(absent) == len(_MODULES) and choice == "auto":
        return _assemble("pure", "the extension modules are absent (built with KVBM_NATIVE=OFF, or removed)")
    if absent:
        raise BackendError(
            f"kvbm's native twin lacks {', '.join(absent)}: reinstall with a C++ compiler, or set KVBM_BACKEND=pure"
        )
    try:
        return _assemble("native", "the extension modules are present" if choice == "auto" else "asked for")
    except ImportError as error:
        raise BackendError(
            f"kvbm's native twin is there but cannot be loaded ({error}): reinstall it, or set KVBM_BACKEND=pure"
        ) from error


@functools.lru_cache(maxsize=1)
def default_backend() -> Backend:
    """Load the twin that ``KVBM_BACKEND`` names, once for the process."""
    return load_backend(os.environ.get("KVBM_BACKEND", "auto"))


def load_device_module(choice: str) -> tuple[ModuleType | None, str]:
    """Load the module that drives GPUs, or tell in a line why there is none.

    Parameters
    ----------
    choice : {"auto", "cuda", "cpu", "simulated"}
        What ``KVBM_DEVICE`` says; "auto" falls back to none where the module is absent.

    Returns
    -------
    module : ModuleType or None
        ``kvbm._native.device``, or the same compiled against the simulation. Loading it asks no driver.
    reason : str

    Raises
    ------
    ConfigError
        Another choice.
    BackendError
        The module that was asked for is absent, or it is there and cannot be loaded.
    """
    if choice not in DEVICE_CHOICES:
        raise ConfigError(f"device {choice!r} is not known, use {', '.join(DEVICE_CHOICES)} (device.kind, KVBM_DEVICE)")
    if choice == "cpu":
        return None, "the CPU was asked for"
    name = "simulated_device" if choice == "simulated" else "device"
    try:
        module = _optional(f"kvbm._native.{name}")
    except ImportError as error:
        raise BackendError(
            f"kvbm's module {name} is there but cannot be loaded ({error}): reinstall it, or set KVBM_DEVICE=cpu"
        ) from error
    if module is not None:
        return module, "the module is present" if choice == "auto" else "asked for"
    if choice == "auto":
        return None, "kvbm was built without CUDA"
    switch = "KVBM_CUDA=ON and nvcc" if choice == "cuda" else "KVBM_SIMULATED_DEVICE=ON"
    raise BackendError(f"kvbm lacks the module {name}: build it with {switch}, or set KVBM_DEVICE=auto")


def _assemble(name: str, reason: str) -> Backend:
    modules: dict[str, ModuleType] = {part: importlib.import_module(f"kvbm._{name}.{part}") for part in _MODULES}
    return Backend(
        name=name,
        reason=reason,
        store=modules["store"].Store,
        blake2b=modules["hashing"].blake2b,
        hash_blocks=modules["hashing"].hash_blocks,
        copy_blocks=modules["copies"].copy_blocks,
        checksum_blocks=modules["copies"].checksum_blocks,
        cpu_features=modules["copies"].cpu_features(),
        memcpy_blocks=getattr(modules["copies"], "memcpy_blocks", None),
        disk_io=_optional(f"kvbm._{name}.disk_io"),
    )


def _optional(name: str) -> ModuleType | None:
    """Give a module that a twin can do without; one that is there but broken raises."""
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)
