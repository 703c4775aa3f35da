from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray

_AddressArray = npt.NDArray[np.uint64]

PATHS: tuple[str, ...]  # ("memcpy", "batch", "kernel", "staged")

def device_count() -> int: ...
def why_no_device() -> str: ...
def versions() -> tuple[int, int]: ...
def pointer_kind(address: int) -> tuple[str, int]: ...

class Event:
    handle: int
    def is_done(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_s(self, end: Event) -> float: ...
    def close(self) -> None: ...

class Stream:
    handle: int
    def is_idle(self) -> bool: ...
    def synchronize(self) -> None: ...
    def record(self, event: Event) -> None: ...
    def wait(self, event: Event) -> None: ...
    def close(self) -> None: ...
    def __cuda_stream__(self) -> tuple[int, int]: ...

class Device:
    index: int
    name: str
    pci_bus_id: str
    compute_capability: tuple[int, int]
    total_nbytes: int
    l2_nbytes: int
    num_multiprocessors: int
    num_copy_engines: int
    priorities: tuple[int, int]
    can_map_host: bool
    has_kernels: bool
    has_batch_copy: bool
    def __init__(self, index: int = ...) -> None: ...
    def memory_info(self) -> tuple[int, int]: ...
    def allocate(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def register_host(self, address: int, nbytes: int) -> None: ...
    def unregister_host(self, address: int) -> None: ...
    def create_stream(self, *, priority: int = ...) -> Stream: ...
    def adopt_stream(self, handle: int) -> Stream: ...
    def create_event(self, *, with_timing: bool = ...) -> Event: ...
    def adopt_event(self, handle: int) -> Event: ...
    def scratch_nbytes(self, num_blocks: int, num_pieces: int, *, with_checksums: bool = ...) -> int: ...
    def copy(
        self,
        stream: Stream,
        source_blocks: _AddressArray,
        destination_blocks: _AddressArray,
        source_pieces: _AddressArray,
        destination_pieces: _AddressArray,
        piece_nbytes: int,
        *,
        path: str,
        source_on_device: bool,
        destination_on_device: bool,
        scratch: tuple[int, int] = ...,
        pinned: int = ...,
        staging: tuple[int, int] = ...,
        num_thread_blocks: int = ...,
        hashes: HashArray | None = ...,
        checksums: int = ...,
        wait_for: Sequence[Stream] = ...,
        fence: Event | None = ...,
        with_event: bool = ...,
    ) -> Event | None: ...
    def permute(
        self,
        stream: Stream,
        source_blocks: _AddressArray,
        destination_blocks: _AddressArray,
        source_regions: _AddressArray,
        destination_regions: _AddressArray,
        *,
        num_tokens: int,
        num_heads: int,
        head_nbytes: int,
        source_strides: tuple[int, int],
        destination_strides: tuple[int, int],
        scratch: tuple[int, int] = ...,
        pinned: int = ...,
        num_thread_blocks: int = ...,
    ) -> None: ...
    def checksum(
        self,
        stream: Stream,
        blocks: _AddressArray,
        pieces: _AddressArray,
        piece_nbytes: int,
        hashes: HashArray,
        *,
        scratch: tuple[int, int],
        pinned: int,
        checksums: int,
        num_thread_blocks: int = ...,
    ) -> None: ...
    def memcpy(self, stream: Stream, destination: int, source: int, nbytes: int) -> None: ...
    def fill(self, stream: Stream, address: int, nbytes: int, seed: int) -> None: ...
    def delay(self, stream: Stream, seconds: float) -> None: ...
    def read(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]: ...
    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None: ...
