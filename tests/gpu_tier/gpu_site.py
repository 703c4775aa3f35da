"""What the tests of the GPU tier share: layouts, content, storages, and a producer that takes its time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.gpu import Gpu
from kvbm.layout import BlockLayout
from kvbm.storage import CudaStorage, HostStorage
from kvbm.types import HashArray

PATIENCE_S = 60.0
NUM_BLOCKS = 8
DIMENSIONS: dict[str, Any] = {
    "num_layers": 3,
    "outer_dim": 2,
    "block_size": 4,
    "inner_dim": 24,
    "dtype": "uint8",
    "num_heads": 3,
}
KINDS = ("contiguous", "block_first", "outer_first", "head_major")


def layout_of(kind: str, num_blocks: int = NUM_BLOCKS, **changes: Any) -> BlockLayout:
    dimensions = {**DIMENSIONS, **changes, "num_blocks": num_blocks}
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(**dimensions)
    if kind == "head_major":
        head = dimensions["inner_dim"] // dimensions["num_heads"]
        region = dimensions["block_size"] * dimensions["inner_dim"]
        strides = {
            "block": region * dimensions["outer_dim"] * dimensions["num_layers"],
            "layer": region * dimensions["outer_dim"],
            "outer": region,
            "token": head,
            "head": head * dimensions["block_size"],
        }
        return BlockLayout.custom(**dimensions, strides=strides)
    return BlockLayout.layer_separate(**dimensions, block_first=kind == "block_first")


def random_bytes(layout: BlockLayout, num_blocks: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    """Give content for blocks: (num_blocks, block_nbytes)."""
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, layout.block_nbytes), dtype=np.uint8)


def names(num_blocks: int, first: int = 1) -> HashArray:
    return np.array([[first + i, 77] for i in range(num_blocks)], dtype=np.uint64).reshape(-1, 2)


def ids(*numbers: int) -> npt.NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


def on_gpu(gpu: Gpu, kind: str = "contiguous", num_blocks: int = NUM_BLOCKS, **arguments: Any) -> CudaStorage:
    return CudaStorage(layout_of(kind, num_blocks), gpu=gpu, **arguments)


def on_host(gpu: Gpu | None, kind: str = "contiguous", num_blocks: int = NUM_BLOCKS) -> HostStorage:
    return HostStorage(layout_of(kind, num_blocks), gpu=gpu)


def as_layout(data: npt.NDArray[np.uint8], layout: BlockLayout, order: BlockLayout) -> npt.NDArray[np.uint8]:
    """Give blocks that are in one layout's order of tokens and heads in that of another."""
    if layout.region_order == order.region_order:
        return data
    axes = {"token": layout.block_size, "head": layout.num_heads}
    there = layout.region_order
    shape = (len(data), layout.num_layers * layout.outer_dim, *(axes[axis] for axis in there), layout.head_nbytes)
    return np.ascontiguousarray(data.reshape(shape).swapaxes(2, 3)).reshape(len(data), -1)
