"""What the kernels' tests share: a device, poisoned memory between guards, and what NumPy says should stand there."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

GUARD_NBYTES = 4096
POISON = 0xA5
SIMULATED, REAL = "kvbm._native.simulated_device", "kvbm._native.device"


def _has_gpu() -> bool:
    return importlib.util.find_spec(REAL) is not None and importlib.import_module(REAL).device_count() > 0


# The real device joins where there is one: the same tests, so what passes in the simulation is asked of the GPU too.
GPUS = ["simulated", *([pytest.param("cuda", marks=pytest.mark.gpu)] if _has_gpu() else [])]


def words(values: Sequence[int] | npt.NDArray[Any]) -> Words:
    return np.array(values, dtype=np.uint64)


def fill_bytes(seed: int, nbytes: int) -> Bytes:
    """What fill gives: splitmix64, little-endian."""
    word = np.uint64(seed) + np.arange(1, -(-nbytes // 8) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))).astype("<u8").view(np.uint8)[:nbytes]


class Memory:
    """A range of device or pinned memory, poisoned, with guards that `image` shows too."""

    def __init__(self, gpu: Gpu, nbytes: int, *, is_pinned: bool) -> None:
        self._gpu, self._nbytes = gpu, nbytes + 2 * GUARD_NBYTES
        self.is_pinned = is_pinned
        if is_pinned:
            self._map = mmap.mmap(-1, self._nbytes)
            self._view = np.frombuffer(self._map, dtype=np.uint8)
            self._base = int(self._view.ctypes.data)
            gpu.device.register_host(self._base, self._nbytes)
        else:
            self._base = gpu.device.allocate(self._nbytes)
        self.address = self._base + GUARD_NBYTES
        self.put_image(np.full(self._nbytes, POISON, dtype=np.uint8))

    def image(self) -> Bytes:
        """All bytes, guards included; byte 0 of the range is at GUARD_NBYTES."""
        if self.is_pinned:
            return self._view.copy()
        image: Bytes = self._gpu.device.read(self._base, self._nbytes)
        return image

    def check_guards(self) -> None:
        image = self.image()
        assert (image[:GUARD_NBYTES] == POISON).all(), "bytes before the range were written"
        assert (image[-GUARD_NBYTES:] == POISON).all(), "bytes behind the range were written"

    def put_image(self, image: Bytes) -> None:
        if self.is_pinned:
            self._view[:] = image
        else:
            self._gpu.device.write(self._base, image)

    def put_random(self, seed: int) -> Bytes:
        image = np.random.default_rng(seed).integers(0, 256, self._nbytes, dtype=np.uint8)
        self.put_image(image)
        return image

    def index(self, address: int | Words) -> Any:
        """Where an address stands in the image."""
        return address - np.uint64(self._base) if isinstance(address, np.ndarray) else address - self._base

    def close(self) -> None:
        if self.is_pinned:
            self._gpu.device.unregister_host(self._base)
            del self._view
            self._map.close()
        else:
            self._gpu.device.free(self._base)


class Gpu:
    """A device with one stream, and submissions that are waited for."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.device = module.Device(0)
        self.stream = self.device.create_stream()
        self._memories: list[Memory] = []

    @property
    def is_simulated(self) -> bool:
        return hasattr(self.module, "simulation")

    def memory(self, nbytes: int, *, is_pinned: bool = False) -> Memory:
        memory = Memory(self, nbytes, is_pinned=is_pinned)
        self._memories.append(memory)
        return memory

    def release(self) -> None:
        """Give back all memory, as between two examples of one test."""
        while self._memories:
            self._memories.pop().close()

    def copy(
        self,
        sides: tuple[Memory, Memory],
        blocks: tuple[Words, Words],
        pieces: tuple[Words, Words],
        piece_nbytes: int,
        *,
        hashes: Words | None = None,
        num_thread_blocks: int = 4,
    ) -> Words | None:
        """Copy by the kernel; give the checksums when there are hashes."""
        num_blocks = len(blocks[0])
        scratch_nbytes = self.device.scratch_nbytes(num_blocks, len(pieces[0]), with_checksums=hashes is not None)
        scratch, pinned = self.memory(scratch_nbytes), self.memory(scratch_nbytes, is_pinned=True)
        checksums = self.memory(8 * max(num_blocks, 1), is_pinned=True)
        with_hashes = {} if hashes is None else {"hashes": hashes, "checksums": checksums.address}
        self.device.copy(
            self.stream,
            *blocks,
            *pieces,
            piece_nbytes,
            path="kernel",
            source_on_device=not sides[0].is_pinned,
            destination_on_device=not sides[1].is_pinned,
            scratch=(scratch.address, scratch_nbytes),
            pinned=pinned.address,
            num_thread_blocks=num_thread_blocks,
            **with_hashes,
        )
        self._finish(scratch, pinned, checksums)
        return None if hashes is None else _words_of(checksums, num_blocks)

    def checksum(self, blocks: Words, pieces: Words, piece_nbytes: int, hashes: Words) -> Words:
        num_blocks = len(blocks)
        scratch_nbytes = self.device.scratch_nbytes(num_blocks, len(pieces), with_checksums=True)
        scratch, pinned = self.memory(scratch_nbytes), self.memory(scratch_nbytes, is_pinned=True)
        checksums = self.memory(8 * max(num_blocks, 1), is_pinned=True)
        self.device.checksum(
            self.stream,
            blocks,
            pieces,
            piece_nbytes,
            hashes,
            scratch=(scratch.address, scratch_nbytes),
            pinned=pinned.address,
            checksums=checksums.address,
        )
        self._finish(scratch, pinned, checksums)
        return _words_of(checksums, num_blocks)

    def permute(
        self, blocks: tuple[Words, Words], regions: tuple[Words, Words], *, num_thread_blocks: int = 4, **shape: Any
    ) -> None:
        nbytes = 16 * (len(blocks[0]) + len(regions[0]))
        scratch, pinned = self.memory(nbytes), self.memory(nbytes, is_pinned=True)
        self.device.permute(
            self.stream,
            *blocks,
            *regions,
            scratch=(scratch.address, nbytes),
            pinned=pinned.address,
            num_thread_blocks=num_thread_blocks,
            **shape,
        )
        self._finish(scratch, pinned)

    def _finish(self, *lent: Memory) -> None:
        self.stream.synchronize()
        for memory in lent:
            memory.check_guards()


def _words_of(memory: Memory, count: int) -> Words:
    return memory.image()[GUARD_NBYTES : GUARD_NBYTES + 8 * count].view(np.uint64)


def open_gpu(name: str) -> Iterator[Gpu]:
    """Give the simulated device, or the first real one; skip where it is not built."""
    module_name = SIMULATED if name == "simulated" else REAL
    if importlib.util.find_spec(module_name) is None:
        pytest.skip(f"{module_name} is not built")
    module = importlib.import_module(module_name)
    if name == "simulated":
        module.simulation.reset()
    gpu = Gpu(module)
    yield gpu
    gpu.release()
    gpu.stream.close()
    if name == "simulated":
        module.simulation.reset()


def move(
    images: tuple[Bytes, Bytes], sides: tuple[Memory, Memory], starts: tuple[Words, Words], piece_nbytes: int
) -> Bytes:
    """Give the image of the destination after every piece has moved, by NumPy."""
    expected = images[1].copy()
    steps = np.arange(piece_nbytes, dtype=np.uint64)
    from_index = sides[0].index(starts[0].reshape(-1))[:, None] + steps
    to_index = sides[1].index(starts[1].reshape(-1))[:, None] + steps
    expected[to_index.astype(np.int64)] = images[0][from_index.astype(np.int64)]
    return expected
