"""Opening a slab of very many records: what a restart costs before the first request can hit.

The records are written without the bytes they speak of, which opening does not look at.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.bench.rig import make_row, random_hashes
from kvbm.layout import BlockLayout
from kvbm.pool import BlockPool
from kvbm.storage.disk import DiskStorage
from kvbm.types import Tier

RECORD_BLOCK_NBYTES = 4096  # a slot takes that at least

_BATCH = 1 << 16


def restart_row(folder: Path, num_records: int, rounds: int, backend: Backend) -> dict[str, Any]:
    """Seconds from opening a slab to the last block registered in its pool.

    Parameters
    ----------
    folder : Path
        Made here, and removed again; takes 4 KiB a record.
    num_records : int
    rounds : int
    backend : Backend

    Notes
    -----
    What the page cache has of the files is dropped before each round, where the system can do that.
    """
    layout = BlockLayout.fully_contiguous(
        num_blocks=num_records,
        num_layers=1,
        outer_dim=2,
        block_size=16,
        inner_dim=RECORD_BLOCK_NBYTES // 64,
        dtype="float16",
    )
    hashes = random_hashes(num_records)
    priorities = np.full(_BATCH, 50, dtype=np.uint8)
    with DiskStorage(layout, folder) as storage:
        for start in range(0, num_records, _BATCH):
            names = hashes[start : start + _BATCH]
            ids = np.arange(start, start + len(names), dtype=np.int32)
            storage.record(
                ids,
                hashes=names,
                checksums=names[:, 0],
                parents=np.roll(names, 1, axis=0),
                priorities=priorities[: len(ids)],
            )
    try:
        seconds = [_restart(layout, folder, backend) for _ in range(rounds)]
    finally:
        shutil.rmtree(folder)
    return make_row("restart_1m", "s", seconds, None, num_records=num_records)


def _restart(layout: BlockLayout, folder: Path, backend: Backend) -> float:
    for file in folder.iterdir():
        _forget_pages(file)
    pool = BlockPool(layout.num_blocks, tier=Tier.DISK, backend=backend)
    began = time.perf_counter()
    with DiskStorage(layout, folder) as storage:
        pool.restore_blocks(*storage.inventory())
        seconds = time.perf_counter() - began
    if pool.status().inactive != layout.num_blocks:
        raise RuntimeError(f"{pool.status().inactive} of {layout.num_blocks} records were found")
    return seconds


def _forget_pages(file: Path) -> None:
    """Have the system read a file from the medium again."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
