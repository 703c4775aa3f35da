"""Blocks between host and GPU through the engine, against one large plain copy and torch's index copy in the same run.

Everything is as a manager makes it: storages, paths by the table in use, a few thread blocks for kernels. All who are
compared take turns in every round; times are the caller's, from the call to the result. What was moved is compared
with what was sent. On the simulated device the figures mean nothing; sizes are small there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvbm.bench.gpu_permutes import permute_rows
from kvbm.bench.gpu_site import (
    DIRECTIONS,
    LAYOUTS,
    Call,
    Limit,
    Site,
    block_nbytes_of,
    make_layout,
    piece_name,
    speed_row,
    take_turns,
)
from kvbm.bench.gpu_torch import IndexCopies, Product, find_torch
from kvbm.bench.report import Bar
from kvbm.bench.rig import make_row
from kvbm.errors import ConfigError, TransferError
from kvbm.gpu import Gpu, describe_gpu, find_gpu
from kvbm.transfer import GpuTransferEngine

_KIB, _MIB = 1 << 10, 1 << 20
_LAYERS = ("block_first", "outer_first")
_CHECKED = (("contiguous", _MIB), ("block_first", 64 * _KIB))
_ONE_BLOCK_NBYTES = 64 * _KIB
_MANY = (64, 256, 1024)
_NUM_BESIDE = 64  # blocks of a copy beside a product, and such copies: what a lane takes without a wait
SIMULATED_NOTE = "the device is simulated on the CPU: these figures say nothing about any GPU"


def _bars() -> dict[str, Bar]:
    bars = {f"one_block_{direction}{end}": Bar(60) for direction in DIRECTIONS for end in ("", "_checked")}
    for direction in DIRECTIONS:
        for count in _MANY:
            bars[f"{direction}_contiguous_1m_{count}"] = Bar(0.95, "ratio")
            for kind in _LAYERS:
                bars[f"{direction}_{kind}_64k_{count}"] = Bar(0.9, "ratio")
                bars[f"{direction}_{kind}_16k_{count}"] = Bar(0.7, "ratio")
        for kind, piece_nbytes in _CHECKED:
            bars[f"checksum_{direction}_{kind}_{piece_name(piece_nbytes)}"] = Bar(0.952, "ratio")  # 5 % more time
    for name in ("nhd_hnd_256", "hnd_nhd_256", "nhd_universal_256", "universal_nhd_256", "nhd_hnd_128"):
        bars[f"permute_{name}"] = Bar(0.6, "ratio")
    return bars


BARS = _bars()
GROUPS = ("h2d", "d2h", "permute", "checksum", "one_block", "product")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes
    ----------
    pieces_nbytes : sequence of int
        Bytes that are contiguous on the device.
    counts : sequence of int
        Blocks of a batch.
    most_nbytes : int
        Of a batch, 1 MiB or more: larger ones are left out. So much memory is taken on each side, twice with torch.
    limit_nbytes : int
        Of the one large copy.
    rounds : int
    least_s : float
        Seconds that a turn lasts at least.
    num_calls : int
        Of one-block copies, each a value of its row.
    product_size : int
        Rows and columns of the matrix product.
    rows : sequence of str
        What the names of rows begin with, or all.
    """

    pieces_nbytes: Sequence[int] = (16 * _KIB, 64 * _KIB, 256 * _KIB, _MIB, 4 * _MIB)
    counts: Sequence[int] = (1, 16, *_MANY)
    most_nbytes: int = 1 << 30
    limit_nbytes: int = 256 << 20
    rounds: int = 9
    least_s: float = 0.005
    num_calls: int = 500
    product_size: int = 8192
    rows: Sequence[str] = ()

    def wants(self, name: str) -> bool:
        """Whether a row, or some row whose name begins with this, was asked for."""
        return not self.rows or any(name.startswith(row) or row.startswith(name) for row in self.rows)


@dataclass
class Figures:
    """What a run gave.

    Attributes
    ----------
    device : str
        What was measured.
    is_simulated : bool
    rows : list of dict
        As `kvbm.bench.rig.make_row` makes them. Copies have ``layout``, ``piece_nbytes``, ``num_blocks``, ``path``,
        and ``torch``, in GB/s: its index copy, None where it was not measured.
    notes : list of str
        What was not measured, and why; which table chose the paths.
    """

    device: str
    is_simulated: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find() -> Gpu:
    """Give the GPU that ``KVBM_DEVICE`` names.

    Raises
    ------
    ConfigError
        There is none; says what to do.
    """
    gpu = find_gpu()
    if gpu is None:
        raise ConfigError(
            f"there is no GPU to measure: {describe_gpu()}; run this where there is one, or try it out with "
            "KVBM_DEVICE=simulated, whose figures mean nothing"
        )
    return gpu


def extent_for(gpu: Gpu, **changes: Any) -> Extent:
    """Give all of it for a GPU; for the simulated one what only tries out whether everything runs, in seconds."""
    if not gpu.is_simulated:
        return Extent(**changes)
    small: dict[str, Any] = {
        "pieces_nbytes": (16 * _KIB, 64 * _KIB),
        "counts": (1, 4),
        "most_nbytes": _MIB,
        "limit_nbytes": 4 * _MIB,
        "rounds": 1,
        "least_s": 0.0,
        "num_calls": 5,
    }
    return Extent(**small | changes)


def run(extent: Extent | None = None, *, gpu: Gpu | None = None) -> Figures:
    """Measure a GPU.

    Parameters
    ----------
    extent : Extent, optional
        None takes all of it on a GPU, a little of it on the simulated one.
    gpu : Gpu, optional
        None takes the one that ``KVBM_DEVICE`` names.

    Returns
    -------
    Figures
        Copies and permutes in GB/s with those of the plain copy as the reference; checked copies with unchecked ones;
        one block in microseconds, with a bare copy and wait; the matrix product in milliseconds, with its own while
        nothing is copied. A ratio above 1 is better than the reference, the median of those of the rounds.

    Raises
    ------
    ConfigError
        There is no GPU, the size is too small, or no row is left to be measured.
    TransferError
        Wrong bytes arrived.
    """
    gpu = gpu or find()
    extent = extent or extent_for(gpu)
    wrong = [row for row in extent.rows if not row.startswith(GROUPS)]
    if wrong:
        raise ConfigError(f"there is no row {', '.join(wrong)}: names begin with {', '.join(GROUPS)}")
    if extent.most_nbytes < _MIB:
        raise ConfigError(f"--size is {extent.most_nbytes} bytes, give at least {_MIB}")
    figures = Figures(gpu.describe(), gpu.is_simulated)
    torch, reason = (None, "the device is simulated") if gpu.is_simulated else find_torch()
    if torch is None:
        figures.notes.append(f"not measured: torch's index copy, the effect on a matrix product ({reason})")
    with GpuTransferEngine(gpu) as engine:
        figures.notes.append(f"paths chosen by the table: {engine.means.table.origin}")
        limit = Limit(gpu, extent.limit_nbytes)
        means = _Means(engine, limit, extent, torch)
        for kind in LAYOUTS:
            for piece_nbytes in extent.pieces_nbytes:
                figures.rows += _copy_rows(means, kind, piece_nbytes)
        if extent.wants("permute"):
            figures.rows += permute_rows(
                gpu, limit, most_nbytes=extent.most_nbytes, rounds=extent.rounds, least_s=extent.least_s
            )
        figures.rows += _checksum_rows(means)
        figures.rows += _one_block_rows(means)
        if torch is not None and extent.wants("product"):
            figures.rows += _product_rows(means)
    figures.rows = [row for row in figures.rows if not extent.rows or row["name"].startswith(tuple(extent.rows))]
    if not figures.rows:
        raise ConfigError(f"no row begins with {', '.join(extent.rows)} at this size: leave --rows out to see all")
    if not figures.is_simulated:
        figures.notes.append(bars_line(figures.rows))
    return figures


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the rows that do not reach their bar."""
    return [row["name"] for row in rows if row["name"] in BARS and not BARS[row["name"]].is_met(row)]


def bars_line(rows: Sequence[dict[str, Any]]) -> str:
    """Say how many of the rows that have a bar reach it, and which do not."""
    num_barred, missed = sum(row["name"] in BARS for row in rows), missed_bars(rows)
    return f"bars reached: {num_barred - len(missed)} of {num_barred}" + (f"; not {', '.join(missed)}" * bool(missed))


@dataclass(frozen=True, eq=False)
class _Means:
    """What all rows are measured with."""

    engine: GpuTransferEngine
    limit: Limit
    extent: Extent
    torch: Any


def _copy_rows(means: _Means, kind: str, piece_nbytes: int) -> Iterator[dict[str, Any]]:
    """Give the rows of one layout and piece, every number of blocks in both directions."""
    limit, extent = means.limit, means.extent
    block_nbytes = block_nbytes_of(kind, piece_nbytes)
    counts = [count for count in extent.counts if count * block_nbytes <= extent.most_nbytes]
    stems = {direction: f"{direction}_{kind}_{piece_name(piece_nbytes)}" for direction in DIRECTIONS}
    if not counts or not any(extent.wants(stem) for stem in stems.values()):
        return
    site = Site(means.engine, make_layout(kind, piece_nbytes, max(counts)))
    peer = None if means.torch is None else IndexCopies(means.torch, kind, piece_nbytes, site.device_order)
    for num_blocks in counts:
        for direction, stem in stems.items():
            if not extent.wants(f"{stem}_{num_blocks}"):
                continue
            turns: dict[str, Call] = {
                "ours": partial(site.copy, direction, num_blocks),
                "limit": partial(limit.copy, direction),
            }
            if peer is not None:
                turns["torch"], _ = peer.turn(direction, num_blocks)
            times = site.moved(
                direction,
                num_blocks,
                partial(take_turns, turns, rounds=extent.rounds, least_s=extent.least_s),
            )
            nbytes = {"ours": num_blocks * block_nbytes, "limit": limit.nbytes, "torch": num_blocks * block_nbytes}
            speeds = {name: nbytes[name] / 1e9 / values for name, values in times.items()}
            yield speed_row(
                f"{stem}_{num_blocks}",
                speeds["ours"],
                speeds["limit"],
                direction=direction,
                layout=kind,
                piece_nbytes=piece_nbytes,
                num_blocks=num_blocks,
                path=site.path_of(direction, num_blocks),
                torch=float(np.median(speeds["torch"])) if "torch" in speeds else None,
            )
    site.close()


def _checksum_rows(means: _Means) -> Iterator[dict[str, Any]]:
    """Copy with and without checksums in turn; those that the host keeps are compared with the processor's own."""
    for kind, piece_nbytes in _CHECKED:
        stem = f"{kind}_{piece_name(piece_nbytes)}"
        if not any(means.extent.wants(f"checksum_{direction}_{stem}") for direction in DIRECTIONS):
            continue
        num_blocks = max(1, min(64, means.extent.most_nbytes // block_nbytes_of(kind, piece_nbytes)))
        site = Site(means.engine, make_layout(kind, piece_nbytes, num_blocks))
        nbytes = num_blocks * site.block_nbytes
        for direction in reversed(DIRECTIONS):  # down first: then the host has checksums to compare
            turns: dict[str, Call] = {
                "checked": partial(site.copy, direction, num_blocks, is_checked=True),
                "plain": partial(site.copy, direction, num_blocks),
            }
            times = take_turns(turns, rounds=means.extent.rounds, least_s=means.extent.least_s)
            site.copy(direction, num_blocks, is_checked=True)
            speeds = {name: nbytes / 1e9 / values for name, values in times.items()}
            yield speed_row(f"checksum_{direction}_{stem}", speeds["checked"], speeds["plain"], num_blocks=num_blocks)
            if direction == "d2h":
                _compare_checksums(site, num_blocks)
        site.close()


def _compare_checksums(site: Site, num_blocks: int) -> None:
    ids = site.host_order[:num_blocks]
    own = site.engine.compute_checksums(site.host, ids, site.names(num_blocks))
    num_wrong = int(np.count_nonzero((own != site.host.checksums[ids]) | ~site.host.has_checksum[ids]))
    if num_wrong:
        raise TransferError(f"{num_wrong} of {num_blocks} checksums of the device are not those of the processor")


def _one_block_rows(means: _Means) -> Iterator[dict[str, Any]]:
    """Time one small block again and again, each call by itself, beside a bare copy that is waited for."""
    if not means.extent.wants("one_block"):
        return
    site = Site(means.engine, make_layout("contiguous", _ONE_BLOCK_NBYTES, 16))
    for direction in reversed(DIRECTIONS):  # down first: then the host has a checksum to compare
        for is_checked in (False, True):
            turns: dict[str, Call] = {
                "ours": partial(site.copy, direction, 1, is_checked=is_checked),
                "bare": partial(means.limit.copy, direction, min(_ONE_BLOCK_NBYTES, means.limit.nbytes)),
            }
            times = site.moved(direction, 1, partial(take_turns, turns, rounds=means.extent.num_calls, least_s=0.0))
            name = f"one_block_{direction}{'_checked' if is_checked else ''}"
            yield make_row(name, "us", times["ours"] * 1e6, float(np.median(times["bare"])) * 1e6)
    site.close()


def _product_rows(means: _Means) -> Iterator[dict[str, Any]]:
    """Time a matrix product alone, and while copies run from before its start until after its end."""
    product = Product(means.torch, means.extent.product_size)
    for kind, piece_nbytes in _CHECKED:
        site = Site(means.engine, make_layout(kind, piece_nbytes, _NUM_BESIDE), streams=())
        for direction in DIRECTIONS:
            alone, beside, are_covered = [], [], True
            for i in range(-1, means.extent.rounds):
                alone_s = product.time()
                transfers = [site.submit(direction, _NUM_BESIDE) for _ in range(_NUM_BESIDE)]
                beside_s = product.time()
                is_covered = not transfers[-1].done()
                transfers[-1].result()
                if i >= 0:  # the first loads and maps
                    alone.append(alone_s)
                    beside.append(beside_s)
                    are_covered &= is_covered
            name = f"product_{direction}_{kind}_{piece_name(piece_nbytes)}"
            values = np.array(beside) * 1000
            yield make_row(name, "ms", values, float(np.median(alone)) * 1000, are_copies_longer=are_covered)
        site.close()
