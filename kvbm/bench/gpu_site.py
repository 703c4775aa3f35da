"""What the bench of the GPU works on: blocks on both sides that no two look alike, the largest plain copy, and turns.

A site is one layout on the device and whole blocks on the host, each side's blocks in an order of its own. Content
differs in every 4 KiB, so a block in the wrong place is seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.bench.rig import make_row
from kvbm.copyplan import plan_copy
from kvbm.errors import StorageError, TransferError
from kvbm.gpu import DeviceMemory, Gpu, PinnedMemory
from kvbm.layout import BlockLayout
from kvbm.storage import CudaStorage, HostStorage
from kvbm.transfer import GpuTransferEngine
from kvbm.transfer.choose import choose_path, shape_of
from kvbm.types import HashArray, IdArray

LAYOUTS = ("contiguous", "block_first", "outer_first")
DIRECTIONS = ("h2d", "d2h")
NUM_PIECES = 16  # of a block that lies in layers

Call = Callable[[], object]
Times = npt.NDArray[np.float64]

_PAGE_NBYTES = 4096
_NUM_TOKENS = 16
_MOST_COMPARED_NBYTES = 64 << 20
_MOST_CALLS = 200


def piece_name(nbytes: int) -> str:
    """Give a piece's size as rows are named: ``64k``, ``1m``."""
    return f"{nbytes >> 20}m" if nbytes >= 1 << 20 else f"{nbytes >> 10}k"


def block_nbytes_of(kind: str, piece_nbytes: int) -> int:
    """Give the bytes of a block whose contiguous pieces on the device have this size."""
    return piece_nbytes * (1 if kind == "contiguous" else NUM_PIECES)


def make_layout(kind: str, piece_nbytes: int, num_blocks: int) -> BlockLayout:
    """Give a device layout: whole blocks, or layers in buffers of their own with K and V together or apart."""
    shape: dict[str, Any] = {"num_blocks": num_blocks, "block_size": _NUM_TOKENS, "dtype": "uint8"}
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(
            num_layers=1, outer_dim=1, inner_dim=piece_nbytes // _NUM_TOKENS, alignment=_PAGE_NBYTES, **shape
        )
    if kind == "block_first":
        inner_dim = piece_nbytes // 2 // _NUM_TOKENS
        return BlockLayout.layer_separate(
            block_first=True, num_layers=NUM_PIECES, outer_dim=2, inner_dim=inner_dim, **shape
        )
    inner_dim = piece_nbytes // _NUM_TOKENS
    return BlockLayout.layer_separate(
        block_first=False, num_layers=NUM_PIECES // 2, outer_dim=2, inner_dim=inner_dim, **shape
    )


class Limit:
    """One plain copy of large memory, as fast as the machine can: what everything else is compared with.

    Parameters
    ----------
    gpu : Gpu
    nbytes : int
        Of the copy; as much pinned memory is taken, and twice as much on the device.
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = gpu.device
        self._host = PinnedMemory(gpu, nbytes, slice_nbytes=nbytes, in_background=False)
        if not self._host.is_complete:
            raise StorageError(f"the bench needs pinned memory: {self._host.failure}")
        self._host.memory[:] = 1
        self._memory = DeviceMemory(gpu, nbytes), DeviceMemory(gpu, nbytes)
        self._stream = gpu.device.create_stream()

    def copy(self, direction: str, nbytes: int = 0, num_copies: int = 1) -> None:
        """Copy ``h2d``, ``d2h`` or ``d2d`` so many times, all of it or the first bytes, and wait."""
        here, there = self._memory[0].address, self._memory[1].address
        source = self._host.address if direction == "h2d" else here
        destination = {"h2d": here, "d2h": self._host.address, "d2d": there}[direction]
        for _ in range(num_copies):
            self._device.memcpy(self._stream, destination, source, nbytes or self.nbytes)
        self._stream.synchronize()


class Site:
    """Blocks on the device and on the host, to be copied by the engine.

    Parameters
    ----------
    engine : GpuTransferEngine
    layout : BlockLayout
        Of the device's side; the host has the same blocks whole.
    streams : tuple of objects
        Those that copies wait for, as `CudaStorage` takes them.
    """

    def __init__(self, engine: GpuTransferEngine, layout: BlockLayout, *, streams: tuple[Any, ...] = (None,)) -> None:
        self.engine = engine
        self.block_nbytes = layout.block_nbytes
        self.device = CudaStorage(layout, gpu=engine.gpu, streams=streams)
        self.host = HostStorage(layout.dense(layout.num_blocks, alignment=_PAGE_NBYTES), gpu=engine.gpu)
        random = np.random.default_rng(9)
        orders = [random.permutation(layout.num_blocks).astype(np.int32) for _ in range(2)]
        self.device_order: IdArray = orders[0]
        self.host_order: IdArray = orders[1]
        self._names = random.integers(1, 1 << 63, (layout.num_blocks, 2), dtype=np.uint64)
        every = np.arange(layout.num_blocks, dtype=np.int32)
        if not self.host.wait_pinned(every):
            reason = self.host.pinned.failure if self.host.pinned is not None else "it is not ours"
            raise StorageError(f"the bench needs pinned memory: {reason}")
        words = self.host.open_buffer(0).view(np.uint64).reshape(-1, _PAGE_NBYTES // 8)
        words[:] = random.integers(0, 1 << 64, words.shape[1], dtype=np.uint64)
        words[:, 0] = np.arange(len(words))

    def names(self, num_blocks: int) -> HashArray:
        """Give the sequence hashes of the first blocks in the order of copies: (num_blocks, 2) uint64."""
        return self._names[:num_blocks]

    def copy(self, direction: str, num_blocks: int, *, is_checked: bool = False) -> None:
        """Copy the first blocks of the orders and wait; every block has to be good."""
        result = self.submit(direction, num_blocks, is_checked=is_checked).result()
        if not result.good.all():
            raise TransferError(f"{int((~result.good).sum())} of {num_blocks} blocks did not match their checksums")

    def submit(self, direction: str, num_blocks: int, *, is_checked: bool = False) -> Any:
        """Begin the same copy: a `Transfer`."""
        here, there = (self.host, self.host_order), (self.device, self.device_order)
        (source, source_ids), (destination, destination_ids) = (here, there) if direction == "h2d" else (there, here)
        hashes = self.names(num_blocks) if is_checked else None
        return self.engine.copy(
            source, destination, source_ids[:num_blocks], destination_ids[:num_blocks], hashes=hashes
        )

    def path_of(self, direction: str, num_blocks: int) -> str:
        """Name the path that the engine's table takes for this copy."""
        there, here = self.device_order[:num_blocks], self.host_order[:num_blocks]
        if direction == "h2d":
            plan = plan_copy(self.host.bound, self.device.bound, here, there)
        else:
            plan = plan_copy(self.device.bound, self.host.bound, there, here)
        shape = shape_of(plan, "up" if direction == "h2d" else "down")
        return choose_path(self.engine.means.table, shape, device=self.engine.gpu.device, is_pinned=True)

    def moved(self, direction: str, num_blocks: int, work: Callable[[], Mapping[str, Times]]) -> Mapping[str, Times]:
        """Do work that copies these blocks, and compare what came of them with what was sent.

        Parameters
        ----------
        direction : {"h2d", "d2h"}
        num_blocks : int
        work : callable
            Copies at least once.

        Returns
        -------
        mapping
            What the work gave.

        Raises
        ------
        TransferError
            A byte is wrong; of many blocks, those at both ends of the batch and between are compared.
        """
        num_compared = max(1, min(num_blocks, _MOST_COMPARED_NBYTES // self.block_nbytes))
        places = np.unique(np.linspace(0, num_blocks - 1, num_compared).astype(np.int64))
        host_ids, device_ids = self.host_order[places], self.device_order[places]
        source, source_ids = (self.host, host_ids) if direction == "h2d" else (self.device, device_ids)
        target, target_ids = (self.device, device_ids) if direction == "h2d" else (self.host, host_ids)
        sent = source.read(source_ids)
        target.write(target_ids, ~sent)
        result = work()
        wrong = (target.read(target_ids) != sent).any(axis=1)
        if wrong.any():
            raise TransferError(
                f"{int(wrong.sum())} of {len(places)} blocks that were compared came with other bytes ({direction})"
            )
        return result

    def close(self) -> None:
        """Let go of the memory."""
        self.device.close()
        self.host.close()


def take_turns(turns: Mapping[str, Call], *, rounds: int, least_s: float) -> dict[str, Times]:
    """Time several ways of doing something, one after the other in every round, another one first each time.

    Parameters
    ----------
    turns : mapping of str to callable
        Each returns when its work is done.
    rounds : int
        Counted ones; two calls of each before them map, load, and say how often to call.
    least_s : float
        Seconds that a turn lasts at least, by calling again.

    Returns
    -------
    dict of str to (rounds,) float64
        Seconds a call.
    """
    counts = {}
    for name, call in turns.items():
        call()
        counts[name] = max(1, min(_MOST_CALLS, math.ceil(least_s / max(_time(call, 1), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_time(turns[name], counts[name]))
    return {name: np.array(values) for name, values in times.items()}


def speed_row(name: str, ours: Times, reference: Times, **more: Any) -> dict[str, Any]:
    """Give a row in GB/s: (rounds,) of ours and of the reference; the ratio is the median of the rounds' own."""
    row = make_row(name, "GB/s", ours, float(np.median(reference)), is_more_better=True, **more)
    row["ratio"] = float(np.median(ours / reference))  # of each round: clocks drift over minutes
    return row


def _time(call: Call, num_calls: int) -> float:
    began = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - began) / num_calls
