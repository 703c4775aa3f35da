"""Copies by every path leave each byte as NumPy would: around the edges of vectors, warps and tiles, gaps included.

Both sides are filled with other bytes first, and whole buffers are compared, so a byte too many is seen as well.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm._backend import load_backend
from kvbm.gpu import DeviceMemory, Gpu
from kvbm.layout import BlockLayout
from kvbm.storage import CudaStorage, HostStorage, Storage
from kvbm.transfer import GpuTransferEngine, PathTable, TransferEngine
from kvbm.transfer.choose import DIRECTIONS, Cell

PATIENCE_S = 60.0
REGIONS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 496, 511, 512, 513, 528, 4095, 4096, 4097)
WAYS = [
    *(("down", path) for path in ("memcpy", "batch", "kernel", "staged")),
    *(("up", path) for path in ("memcpy", "batch", "kernel", "staged")),
    *(("across", path) for path in ("memcpy", "batch", "kernel")),
]


class Array:
    """Memory of ours that begins anywhere, as another package would show it."""

    def __init__(self, gpu: Gpu, nbytes: int, shift: int) -> None:
        self._memory = DeviceMemory(gpu, nbytes + shift)
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (self._memory.address + shift, False),
        }


def layout_of(kind: str, region: int, num_blocks: int, *, alignment: int = 1) -> BlockLayout:
    shape: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": 1, "inner_dim": region, "dtype": "uint8"}
    shape |= {"num_blocks": num_blocks, "alignment": alignment}
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(**shape)
    return BlockLayout.layer_separate(**shape, block_first=kind == "block_first")


def ordered(order: str, num_tokens: int, num_heads: int, head_nbytes: int, *, gap: int = 0) -> BlockLayout:
    """Give three blocks of two layers, K and V; a gap lies behind each."""
    plane = num_tokens * num_heads * head_nbytes
    strides = {"block": 4 * plane + gap, "layer": 2 * plane, "outer": plane}
    if order == "nhd":
        strides |= {"token": num_heads * head_nbytes, "head": head_nbytes}
    elif order == "hnd":
        strides |= {"token": head_nbytes, "head": num_tokens * head_nbytes}
    else:
        part = num_tokens * head_nbytes
        strides |= {"layer": 2 * part, "outer": part, "token": head_nbytes, "head": 4 * part}
    return BlockLayout.custom(
        num_blocks=3,
        num_layers=2,
        outer_dim=2,
        block_size=num_tokens,
        inner_dim=num_heads * head_nbytes,
        num_heads=num_heads,
        dtype="uint8",
        strides=strides,
    )


def image(gpu: Gpu, storage: Storage) -> npt.NDArray[np.uint8]:
    """Give every byte of a storage's buffers, gaps too."""
    if isinstance(storage, HostStorage):
        return np.concatenate([buffer.copy() for buffer in storage.buffers])
    sizes = storage.layout.buffer_nbytes
    return np.concatenate([gpu.device.read(address, sizes) for address in storage.bound.addresses])


def put_image(gpu: Gpu, storage: Storage, data: npt.NDArray[np.uint8]) -> None:
    for place, part in enumerate(np.split(data, storage.layout.num_buffers)):
        if isinstance(storage, HostStorage):
            storage.buffers[place][:] = part
        else:
            gpu.device.write(storage.bound.addresses[place], part)


def spoil(gpu: Gpu, storage: Storage, seed: int) -> npt.NDArray[np.uint8]:
    layout = storage.layout
    data = np.random.default_rng(seed).integers(0, 256, layout.num_buffers * layout.buffer_nbytes, dtype=np.uint8)
    put_image(gpu, storage, data)
    return data


def make(gpu: Gpu, layout: BlockLayout, *, is_device: bool, shift: int = 0) -> Storage:
    if not is_device:
        return HostStorage(layout, gpu=gpu)
    buffers = [Array(gpu, layout.buffer_nbytes, shift) for _ in range(layout.num_buffers)] if shift else None
    return CudaStorage(layout, gpu=gpu, buffers=buffers)


def check(
    gpu: Gpu, engine: GpuTransferEngine, direction: str, layouts: tuple[BlockLayout, BlockLayout], shift: int = 0
) -> None:
    """Copy, and let the pure twin do the same with plain memory."""
    on_device = direction != "up", direction != "down"
    source, target = (
        make(gpu, layout, is_device=is_device, shift=shift)
        for layout, is_device in zip(layouts, on_device, strict=True)
    )
    random = np.random.default_rng(layouts[0].block_nbytes)
    num_blocks = layouts[0].num_blocks
    count = max(1, num_blocks - 1)
    ids = [random.permutation(num_blocks)[:count].astype(np.int32) for _ in range(2)]
    before = spoil(gpu, source, 1), spoil(gpu, target, 2)
    twins = [HostStorage(layout, backend=load_backend("pure")) for layout in layouts]
    for twin, data in zip(twins, before, strict=True):
        put_image(gpu, twin, data)
    with TransferEngine(backend=load_backend("pure")) as plain:
        plain.copy(*twins, *ids).result(PATIENCE_S)
    engine.copy(source, target, *ids).result(PATIENCE_S)
    np.testing.assert_array_equal(image(gpu, target), image(gpu, twins[1]))
    np.testing.assert_array_equal(image(gpu, source), before[0])
    for storage in (source, target, *twins):
        storage.close()


def engine_by(gpu: Gpu, path: str, **arguments: Any) -> GpuTransferEngine:
    cells = tuple(Cell(direction, 0, 1, (path,)) for direction in DIRECTIONS)
    return GpuTransferEngine(gpu, table=PathTable(cells), **arguments)


@pytest.mark.parametrize(("direction", "path"), WAYS)
@pytest.mark.parametrize("kind", ["contiguous", "block_first", "outer_first"])
def test_every_length_arrives_and_nothing_beside_it_changes(gpu: Gpu, kind: str, direction: str, path: str) -> None:
    with engine_by(gpu, path) as engine:
        for region in REGIONS:
            here = layout_of(kind, region, 5, alignment=1 if region % 2 else 16)
            there = layout_of("contiguous", region, 5)
            check(gpu, engine, direction, (there, here) if direction == "up" else (here, there))


@pytest.mark.parametrize(("direction", "path"), WAYS)
@pytest.mark.parametrize("shift", [1, 2, 4, 8, 15])
def test_memory_that_begins_anywhere_is_read_and_written_there(gpu: Gpu, shift: int, direction: str, path: str) -> None:
    with engine_by(gpu, path) as engine:
        for region in (16, 33, 512):
            layouts = layout_of("outer_first", region, 4), layout_of("outer_first", region, 4, alignment=64)
            check(gpu, engine, direction, layouts, shift)


@pytest.mark.parametrize(("direction", "path"), WAYS)
@pytest.mark.parametrize("num_blocks", [1, 2, 31, 32, 33, 65, 257])
def test_any_number_of_blocks_is_one_batch(gpu: Gpu, num_blocks: int, direction: str, path: str) -> None:
    with engine_by(gpu, path, staging_nbytes=4096) as engine:
        layouts = layout_of("outer_first", 48, num_blocks), layout_of("contiguous", 48, num_blocks)
        check(gpu, engine, direction, layouts)
        check(gpu, engine, direction, layouts[::-1])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("orders", list(itertools.permutations(("nhd", "hnd", "universal"), 2)))
def test_heads_change_places_at_every_width(gpu: Gpu, orders: tuple[str, str], direction: str) -> None:
    sizes = [(4, 3, n) for n in (1, 2, 4, 8, 6, 16, 24, 33)] + [(33, 2, 2), (1, 5, 4), (31, 32, 1), (16, 8, 128)]
    with GpuTransferEngine(gpu) as engine:
        for place, size in enumerate(sizes):
            layouts = ordered(orders[0], *size, gap=place), ordered(orders[1], *size, gap=16 * place)
            check(gpu, engine, direction, layouts)
