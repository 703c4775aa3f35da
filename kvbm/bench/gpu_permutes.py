"""Blocks on the device whose tokens and heads change places, against the device's own copy of the same bytes.

Speeds count bytes read and bytes written, as the memory sees them. The rows with a bar may use the whole device; those
that end in ``_few`` use as few thread blocks as copies beside a decoding engine do.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.bench.gpu_site import Call, Limit, speed_row, take_turns
from kvbm.errors import TransferError
from kvbm.gpu import Gpu
from kvbm.layout import BlockLayout
from kvbm.storage import CudaStorage
from kvbm.transfer import GpuTransferEngine

_NUM_LAYERS, _OUTER_DIM, _NUM_TOKENS, _NUM_HEADS = 8, 2, 16, 8
_CASES = (
    ("nhd", "hnd", 256),  # a head of 128 in two bytes
    ("hnd", "nhd", 256),
    ("nhd", "universal", 256),
    ("universal", "nhd", 256),
    ("nhd", "hnd", 128),  # FP8
)
_NUM_QUEUED = 4  # copies queued before a wait, of both: the wait is no part of the memory's speed
_BLOCKS_EACH = 8  # thread blocks for every multiprocessor
_NUM_COMPARED = 16


def make_ordered(order: str, head_nbytes: int, num_blocks: int) -> BlockLayout:
    """Give whole blocks: heads within a token (nhd), tokens within a head (hnd), or head by head (universal)."""
    region = _NUM_TOKENS * _NUM_HEADS * head_nbytes
    block = _NUM_LAYERS * _OUTER_DIM * region
    strides = {"block": block, "layer": _OUTER_DIM * region, "outer": region}
    if order == "nhd":
        strides |= {"token": _NUM_HEADS * head_nbytes, "head": head_nbytes}
    elif order == "hnd":
        strides |= {"token": head_nbytes, "head": _NUM_TOKENS * head_nbytes}
    else:
        plane = _NUM_TOKENS * head_nbytes
        strides |= {"layer": _OUTER_DIM * plane, "outer": plane, "token": head_nbytes, "head": block // _NUM_HEADS}
    return BlockLayout.custom(
        num_blocks=num_blocks,
        num_layers=_NUM_LAYERS,
        outer_dim=_OUTER_DIM,
        block_size=_NUM_TOKENS,
        inner_dim=_NUM_HEADS * head_nbytes,
        num_heads=_NUM_HEADS,
        dtype="uint8",
        strides=strides,
    )


def permute_rows(gpu: Gpu, limit: Limit, *, most_nbytes: int, rounds: int, least_s: float) -> Iterator[dict[str, Any]]:
    """Give the rows of all permutes.

    Parameters
    ----------
    gpu : Gpu
    limit : Limit
        Copies on the device for comparison.
    most_nbytes : int
        Bytes of a permute; as much is written.
    rounds : int
    least_s : float
        Seconds that a turn lasts at least.

    Raises
    ------
    TransferError
        A head is in the wrong place.
    """
    all_blocks = _BLOCKS_EACH * gpu.device.num_multiprocessors
    with GpuTransferEngine(gpu, num_thread_blocks=all_blocks) as wide, GpuTransferEngine(gpu) as few:
        for source_order, target_order, head_nbytes in _CASES:
            block_nbytes = make_ordered("nhd", head_nbytes, 1).block_nbytes
            num_blocks = max(1, most_nbytes // block_nbytes)
            source, target = (
                CudaStorage(make_ordered(order, head_nbytes, num_blocks), gpu=gpu, streams=())
                for order in (source_order, target_order)
            )
            _fill(gpu, source)
            ids = np.random.default_rng(3).permutation(num_blocks).astype(np.int32)
            turns: dict[str, Call] = {
                "wide": partial(_permute, wide, source, target, ids),
                "few": partial(_permute, few, source, target, ids),
                "limit": partial(limit.copy, "d2d", num_copies=_NUM_QUEUED),
            }
            times = take_turns(turns, rounds=rounds, least_s=least_s)
            _compare(source, target, ids, source_order, target_order)
            moved = dict.fromkeys(("wide", "few"), 2 * _NUM_QUEUED * num_blocks * block_nbytes)
            moved["limit"] = 2 * _NUM_QUEUED * limit.nbytes
            speeds = {name: moved[name] / 1e9 / values for name, values in times.items()}
            name = f"permute_{source_order}_{target_order}_{head_nbytes}"
            for who, end in (("wide", ""), ("few", "_few")):
                yield speed_row(f"{name}{end}", speeds[who], speeds["limit"], num_blocks=num_blocks)
            source.close()
            target.close()


def _permute(engine: GpuTransferEngine, source: CudaStorage, target: CudaStorage, ids: npt.NDArray[np.int32]) -> None:
    transfers = [engine.copy(source, target, ids, ids[::-1]) for _ in range(_NUM_QUEUED)]
    for transfer in transfers:
        transfer.result()


def _fill(gpu: Gpu, storage: CudaStorage) -> None:
    stream = gpu.device.create_stream()
    gpu.device.fill(stream, storage.bound.addresses[0], storage.layout.buffer_nbytes, 11)
    stream.synchronize()


def _compare(
    source: CudaStorage, target: CudaStorage, ids: npt.NDArray[np.int32], source_order: str, target_order: str
) -> None:
    places = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), _NUM_COMPARED)).astype(np.int64))
    sent = _by_head(source.read(ids[places]), source_order)
    came = _by_head(target.read(ids[::-1][places]), target_order)
    if not np.array_equal(sent, came):
        raise TransferError(f"heads lie in the wrong place after a permute from {source_order} to {target_order}")


def _by_head(data: npt.NDArray[np.uint8], order: str) -> npt.NDArray[np.uint8]:
    """Give blocks, as a storage reads them, with the axes (block, plane, token, head, byte)."""
    planes = _NUM_LAYERS * _OUTER_DIM
    axes = (_NUM_TOKENS, _NUM_HEADS) if order == "nhd" else (_NUM_HEADS, _NUM_TOKENS)
    heads: npt.NDArray[np.uint8] = data.reshape(len(data), planes, *axes, -1)
    return heads if order == "nhd" else heads.swapaxes(2, 3)
