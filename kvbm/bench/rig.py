"""What the bench of tiers works on: managers whose memory is touched, requests that lie in the host tier, and rows.

Blocks of 64 KiB are 16 tokens of a small model, blocks of 1 MiB 256 tokens of it, in one piece each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.blocks import ImmutableBlocks
from kvbm.config import Config
from kvbm.manager import BlockManager
from kvbm.storage.host import HostStorage
from kvbm.types import HashArray

SIZE_TO_TOKENS = {"64k": 16, "1m": 256}
NUM_REQUEST_BLOCKS = 64

Times = npt.NDArray[np.float64]


def make_manager(
    size: str,
    backend: Backend,
    *,
    device_blocks: int,
    host_blocks: int = 0,
    disk_blocks: int = 0,
    disk_path: str | os.PathLike[str] | None = None,
) -> BlockManager:
    """Give a manager over blocks of ``"64k"`` or ``"1m"``, the device tier in host memory, all else as by default."""
    model = {"num_layers": 8, "block_size": SIZE_TO_TOKENS[size], "inner_dim": 128, "dtype": "float16"}
    tree: dict[str, dict[str, Any]] = {"model": model, "device": {"kind": "cpu", "num_blocks": device_blocks}}
    if host_blocks:
        tree["host"] = {"num_blocks": host_blocks}
    if disk_path is not None:
        tree["model"]["fingerprint"] = "bench"
        tree["disk"] = {"num_blocks": disk_blocks, "path": os.fspath(disk_path)}
    manager = BlockManager(Config.from_dict(tree), backend=backend)
    storage = manager.storage("device")
    assert isinstance(storage, HostStorage), "the configuration says so"
    memory = storage.open_buffer(0)  # whole blocks, and blocks are 64 KiB or more
    memory.reshape(-1, 64 << 10)[...] = np.random.default_rng(5).integers(0, 256, 64 << 10, dtype=np.uint8)
    return manager


def random_hashes(num_blocks: int, seed: int = 0) -> HashArray:
    """Give sequence hashes that no sequence has: (num_blocks, 2) uint64."""
    return np.random.default_rng(seed).integers(1, 1 << 63, (num_blocks, 2), dtype=np.uint64)


def put_into_host(manager: BlockManager, hashes: HashArray) -> None:
    """Register blocks, let them be offloaded, and forget them in the device tier."""
    room = manager.device.available_blocks
    for part in (hashes[start : start + room] for start in range(0, len(hashes), room)):
        manager.register_blocks(manager.allocate_blocks(len(part)).complete(part)).release()
        manager.flush()
        manager.reset_blocks("device", part)
    num_found = manager.lookup(hashes)
    if num_found != len(hashes):
        raise RuntimeError(f"{num_found} of {len(hashes)} blocks reached the host tier")


def bring_up(manager: BlockManager, hashes: HashArray) -> ImmutableBlocks:
    """Match and onboard; every block has to come out of the host tier."""
    blocks = manager.onboard(manager.match_sequence_hashes(hashes)).result()
    if len(blocks) != len(hashes):
        raise RuntimeError(f"{len(blocks)} of {len(hashes)} blocks came up")
    return blocks


def make_row(
    name: str,
    unit: str,
    values: Times | Sequence[float],
    reference: float | None,
    *,
    median: float | None = None,
    is_more_better: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Give a row of ``kvbm bench``; a ratio above 1 is better than the reference.

    Parameters
    ----------
    name, unit : str
    values : (num_rounds,) float
        For the spread, and the median where it is not given.
    reference : float, optional
    median : float, optional
    is_more_better : bool
        Whether larger values are better, as GB/s are.
    **more
        Put into the row as they are.
    """
    figure = float(np.median(values)) if median is None else median
    ratio = None if reference is None else figure / reference if is_more_better else reference / figure
    return {
        "name": name,
        "unit": unit,
        "median": figure,
        "spread": [float(value) for value in np.percentile(values, [10, 90])],
        "reference": reference,
        "ratio": ratio,
        **more,
    }
