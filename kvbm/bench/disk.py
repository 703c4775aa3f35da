"""Blocks through the executor to disk and back, against fio with the same sizes, depth and directness in the same run.

Everything is as a manager with default settings makes it: slab, staging ring, checksums, jobs as large and as many as
the planner would have under way. Writes go to slots in their order, from host blocks in a random one; reads come from
random slots. We and each engine of fio take turns, each of half a GiB; what was read last is compared with what was
written. ``restart_1m`` opens a slab of a million records and registers them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvbm._backend import Backend, default_backend
from kvbm.bench.disk_site import Site, open_site
from kvbm.bench.fio import ENGINES, FioRun, find_fio, run_fio
from kvbm.bench.restart import RECORD_BLOCK_NBYTES, restart_row
from kvbm.bench.rig import make_row
from kvbm.errors import ConfigError

SIZES = {"64k": 64 << 10, "1m": 1 << 20, "4m": 4 << 20}
_SPEEDS = tuple(f"{verb}_{size}" for size in SIZES for verb in ("write", "read"))
ROWS = (*_SPEEDS, "restart_1m")

_GIB = 1 << 30
_SLACK_NBYTES = 256 << 20  # indexes, and what else a file system takes

Turn = Callable[[], tuple[float, float]]  # gives bytes a second, and seconds of processor time


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes
    ----------
    path : Path, optional
        Directory on the disk to be measured; default: the current one. Everything made there is removed.
    nbytes : int
        Of the slab, and of fio's file.
    turn_nbytes : int
        That each side moves before it is the other's turn; twice that is needed of memory.
    rounds : int
        After one that is thrown away.
    rows : sequence of str
        Some of `ROWS`; a speed brings its processor time along.
    num_records : int
        Of ``restart_1m``.
    """

    path: Path | None = None
    nbytes: int = 2 << 30
    turn_nbytes: int = 512 << 20
    rounds: int = 9
    rows: Sequence[str] = ROWS
    num_records: int = 1_000_000


@dataclass
class _Figures:
    """What the turns of one row gave, by whose turn it was."""

    speeds: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, speed: float, cpu_s: float) -> None:
        self.speeds.setdefault(name, []).append(speed)
        self.cpu_s.setdefault(name, []).append(cpu_s)


def run(extent: Extent | None = None, *, backend: Backend | None = None) -> list[dict[str, Any]]:
    """Measure blocks to disk and back.

    Parameters
    ----------
    extent : Extent, optional
    backend : Backend, optional
        The twin to measure; None measures the one in use.

    Returns
    -------
    list of dict
        For each speed: GB/s with those of fio's best engine as the reference; the ratio is the median of those of the
        rounds. Then the milliseconds of processor time a GiB, beside those of that engine. ``fio`` has the GB/s of
        each engine, ``depth`` the blocks that it had under way, ``is_direct`` how both went to the file.

    Raises
    ------
    ConfigError
        A row is unknown, fio is not installed or fails, or the directory has no room.
    """
    extent = extent or Extent()
    backend = backend or default_backend()
    wrong = [name for name in extent.rows if name not in ROWS]
    if wrong or not extent.rows:
        raise ConfigError(f"there is no row {', '.join(wrong) or 'given'}, use {', '.join(ROWS)}")
    if extent.nbytes < 2 * max(SIZES.values()):
        raise ConfigError(f"--size is {extent.nbytes} bytes, give at least {2 * max(SIZES.values())}")
    if any(name in _SPEEDS for name in extent.rows):
        find_fio()
    rows: list[dict[str, Any]] = []
    with _folder(extent) as folder:
        for size in SIZES:
            verbs = [verb for verb in ("write", "read") if f"{verb}_{size}" in extent.rows]
            if verbs:
                rows += _speed_rows(folder, size, verbs, extent, backend)
        if "restart_1m" in extent.rows:
            rows.append(restart_row(folder / "restart", extent.num_records, extent.rounds, backend))
    return rows


@contextmanager
def _folder(extent: Extent) -> Iterator[Path]:
    """Give a directory with room for a slab and fio's file; it is removed with all that is in it."""
    parent = (extent.path or Path()).absolute()
    if not parent.is_dir():
        raise ConfigError(f"--path {parent} is no directory: give one on the disk to be measured")
    needed = 2 * extent.nbytes if any(name in _SPEEDS for name in extent.rows) else 0
    if "restart_1m" in extent.rows:
        needed = max(needed, extent.num_records * RECORD_BLOCK_NBYTES)
    needed, free = needed + _SLACK_NBYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(f"need {needed} bytes in {parent}, have {free}: give a smaller --size or another --path")
    with tempfile.TemporaryDirectory(prefix="kvbm-bench-", dir=parent) as folder:
        yield Path(folder)


# -- speeds ----------------------------------------------------------------------------------------------------


def _speed_rows(
    folder: Path, size: str, verbs: Sequence[str], extent: Extent, backend: Backend
) -> list[dict[str, Any]]:
    """Give the rows of one block size; what it takes of the disk is given back."""
    slab = folder / size
    figures = {verb: _Figures() for verb in verbs}
    with open_site(slab, SIZES[size], nbytes=extent.nbytes, turn_nbytes=extent.turn_nbytes, backend=backend) as site:
        site.fill()
        file = folder / f"{size}.fio"
        runs = _fio_runs(file, site)
        engines = _engines_that_work(runs["write"])
        for i in range(-1, extent.rounds):
            for verb in verbs:
                offset = (i + 1) * site.turn_blocks % site.num_blocks * site.block_nbytes
                ours: Turn = site.read if verb == "read" else site.write
                turns: list[tuple[str, Turn]] = [("ours", ours)]
                for engine in engines:
                    task = replace(runs[verb], offset=offset if verb == "write" else 0)
                    turns.append((engine, lambda task=task, engine=engine: run_fio(task, engine)))  # type: ignore[misc]
                first = i % len(turns)  # whoever follows a pause, or a write, is another one each time
                for name, turn in turns[first:] + turns[:first]:
                    speed, cpu_s = turn()
                    if i >= 0:
                        figures[verb].add(name, speed, cpu_s)
        site.check()
    file.unlink()
    shutil.rmtree(slab)
    more = {"depth": site.depth, "is_direct": site.is_direct}
    turn_nbytes = site.turn_blocks * site.block_nbytes
    return [row for verb in verbs for row in _rows_of(f"{verb}_{size}", figures[verb], turn_nbytes, more)]


def _rows_of(name: str, figures: _Figures, turn_nbytes: int, more: dict[str, Any]) -> list[dict[str, Any]]:
    speeds = {who: np.array(values) / 1e9 for who, values in figures.speeds.items()}
    ours = speeds.pop("ours")
    best = max(speeds, key=lambda engine: float(np.median(speeds[engine])))
    own_cpu, best_cpu = (np.array(figures.cpu_s[who]) * 1000 * _GIB / turn_nbytes for who in ("ours", best))
    speed_row = make_row(
        name,
        "GB/s",
        ours,
        float(np.median(speeds[best])),
        is_more_better=True,
        fio={engine: float(np.median(values)) for engine, values in speeds.items()},
        **more,
    )
    speed_row["ratio"] = float(np.median(ours / speeds[best]))  # of each round: a disk drifts over minutes
    cpu_row = make_row(f"{name}_cpu", "ms/GiB", own_cpu, float(np.median(best_cpu)), engine=best)
    return [speed_row, cpu_row]


def _fio_runs(file: Path, site: Site) -> dict[str, FioRun]:
    """Make fio's file, on the medium as a slab that was filled is, and give its two tasks."""
    nbytes = site.num_blocks * site.block_nbytes
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, nbytes)
        else:
            opened.truncate(nbytes)
    write = FioRun(
        file=file,
        is_read=False,
        block_nbytes=site.block_nbytes,
        nbytes=nbytes,
        file_nbytes=nbytes,
        depth=site.depth,
        is_direct=site.is_direct,
    )
    run_fio(replace(write, block_nbytes=4 << 20, depth=1), "psync")
    task = replace(write, nbytes=site.turn_blocks * site.block_nbytes)
    return {"write": task, "read": replace(task, is_read=True)}


def _engines_that_work(task: FioRun) -> list[str]:
    """Try each engine; a kernel may forbid io_uring."""
    found = []
    for engine in ENGINES:
        try:
            run_fio(task, engine)
            found.append(engine)
        except ConfigError:
            if engine == "psync":
                raise
    return found
