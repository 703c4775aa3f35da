"""What the tests of scrubbing and inspecting share: a slab that is closed, and ways to damage it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.reader import SlabName
from kvbm.types import HashArray

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=200, num_layers=2, outer_dim=2, block_size=4, inner_dim=300, dtype="uint8"
)  # 4800 bytes in a slot of 8192
SLOT_NBYTES = 8192
FINGERPRINT = "model=tiny; layers=2"
SLOTS = [*range(150), 170, 180, 199]


def hashes_of(num_blocks: int) -> HashArray:
    words = np.arange(2 * num_blocks, dtype=np.uint64).reshape(num_blocks, 2)
    return words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)


def fill(storage: DiskStorage, slots: Sequence[int], backend: Backend, **arguments: Any) -> HashArray:
    """Put blocks into a slab, as an executor does."""
    ids = np.array(slots, dtype=np.int32)
    data = np.random.default_rng(7).integers(0, 256, (len(ids), LAYOUT.block_nbytes), dtype=np.uint8)
    storage.write(ids, data)
    hashes = hashes_of(LAYOUT.num_blocks)[ids]
    addresses = np.uint64(data.ctypes.data) + np.arange(len(ids), dtype=np.uint64) * np.uint64(LAYOUT.block_nbytes)
    checksums = backend.checksum_blocks(addresses, np.zeros(1, dtype=np.uint64), LAYOUT.block_nbytes, hashes)
    storage.record(ids, hashes=hashes, checksums=checksums, **arguments)
    return hashes


def make_slab(directory: Path, backend: Backend) -> SlabName:
    """Make a slab with blocks in `SLOTS`, and close it."""
    with DiskStorage(LAYOUT, directory, fingerprint=FINGERPRINT) as storage:
        fill(storage, SLOTS, backend)
    return SlabName(directory, "rank0")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 4]))


def contents(slab: SlabName) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in slab.directory.iterdir() if path.suffix != ".lock"}
