"""Measures which path is fastest on this machine, and keeps the answer in the user's cache directory.

A file holds the table of one device name and driver version; another driver, another file. A file that cannot be read
is ignored with a warning, and the built-in table used. `kvbm tune` is the only writer.
"""

from __future__ import annotations

import logging
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvbm.copyplan import AddressArray
from kvbm.errors import ConfigError, KvbmError
from kvbm.gpu import DeviceMemory, Gpu, PinnedMemory
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell, PathTable

_log = logging.getLogger("kvbm.transfer")
_VERSION = 1
_RUNS_NBYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
_NUM_RUNS = (1, 8, 64, 1024)
_MOST_NBYTES = 256 << 20
_PIECES = 16  # of a block that is whole on the host's side and scattered on the device, as layers are
_SEED = 5


class _File(msgspec.Struct, frozen=True):
    """What a file holds."""

    version: int
    device: str
    driver: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Measured:
    """One cell with its times.

    Attributes
    ----------
    direction : str
    run_nbytes, num_runs : int
    seconds : dict of path to float
        Median of one submission, on the stream.
    """

    direction: str
    run_nbytes: int
    num_runs: int
    seconds: dict[str, float]

    @property
    def nbytes(self) -> int:
        """Bytes that one submission moved."""
        return self.run_nbytes * self.num_runs

    def cell(self) -> Cell:
        """Give the cell: paths in order of their times."""
        return Cell(
            self.direction, self.run_nbytes, self.num_runs, tuple(sorted(self.seconds, key=self.seconds.__getitem__))
        )


def shapes(*, most_nbytes: int = _MOST_NBYTES) -> list[tuple[str, int, int]]:
    """Give direction, run length and number of runs of every cell that is measured."""
    return [
        (direction, run_nbytes, num_runs)
        for direction in DIRECTIONS
        for run_nbytes in _RUNS_NBYTES
        for num_runs in _NUM_RUNS
        if run_nbytes * num_runs <= most_nbytes
    ]


def measure(
    gpu: Gpu,
    *,
    num_repeats: int = 7,
    most_nbytes: int = _MOST_NBYTES,
    num_thread_blocks: int = 0,
    on_cell: Callable[[Measured], None] | None = None,
) -> list[Measured]:
    """Measure every cell.

    Parameters
    ----------
    gpu : Gpu
    num_repeats : int
        Submissions of each path; the median counts.
    most_nbytes : int
        Of one submission; twice as much memory is taken on each side.
    num_thread_blocks : int
        As the engine will use; 0 takes the native side's own.
    on_cell : callable, optional
        Told each cell as it is measured.

    Raises
    ------
    ConfigError
        num_repeats is below 1.
    StorageError
        Not enough memory on either side.
    """
    if num_repeats < 1:
        raise ConfigError(f"num_repeats is {num_repeats}, give 1 or more")
    bench = _Bench(gpu, most_nbytes, num_thread_blocks)
    found = []
    for direction, run_nbytes, num_runs in shapes(most_nbytes=most_nbytes):
        measured = bench.cell(direction, run_nbytes, num_runs, num_repeats)
        found.append(measured)
        if on_cell is not None:
            on_cell(measured)
    return found


class _Bench:
    """Memory and stream of the measurements."""

    def __init__(self, gpu: Gpu, nbytes: int, num_thread_blocks: int) -> None:
        self._gpu = gpu
        self._num_thread_blocks = num_thread_blocks
        self._device = DeviceMemory(gpu, 2 * nbytes)
        self._other = DeviceMemory(gpu, 2 * nbytes)
        self._host = PinnedMemory(gpu, 2 * nbytes, slice_nbytes=2 * nbytes, in_background=False)
        if not self._host.is_complete:
            raise ConfigError(f"cannot measure without pinned memory: {self._host.failure}")
        self._staging = DeviceMemory(gpu, nbytes)
        self._scratch_nbytes = gpu.device.scratch_nbytes(max(_NUM_RUNS), _PIECES, with_checksums=False)
        self._scratch = DeviceMemory(gpu, max(1, self._scratch_nbytes))
        self._pinned = PinnedMemory(gpu, max(1, self._scratch_nbytes), in_background=False)
        self._stream = gpu.device.create_stream()
        self._random = np.random.default_rng(_SEED)

    def cell(self, direction: str, run_nbytes: int, num_runs: int, num_repeats: int) -> Measured:
        """Measure every path that can be had."""
        seconds = {}
        for path in self._paths(direction, num_runs):
            times = [self._time(path, direction, run_nbytes, num_runs) for _ in range(num_repeats + 1)]
            seconds[path] = statistics.median(times[1:])  # the first one maps and loads
        return Measured(direction, run_nbytes, num_runs, seconds)

    def _paths(self, direction: str, num_runs: int) -> Iterator[str]:
        device = self._gpu.device
        for path in PATHS:
            if path == "batch" and not device.has_batch_copy:
                continue
            if path == "kernel" and direction != "across" and not device.can_map_host:
                continue
            if path == "staged" and (direction == "across" or num_runs == 1):
                continue
            yield path

    def _time(self, path: str, direction: str, run_nbytes: int, num_runs: int) -> float:
        device, stream = self._gpu.device, self._stream
        num_pieces = min(_PIECES, num_runs)
        num_blocks = num_runs // num_pieces
        order = self._random.permutation(2 * num_blocks)[:num_blocks].astype(np.uint64)
        scattered = self._scattered(order, run_nbytes, num_pieces, 2 * num_blocks)
        whole = self._whole(direction, order, run_nbytes, num_pieces)
        source, destination = (scattered, whole) if direction == "down" else (whole, scattered)
        begin, end = device.create_event(with_timing=True), device.create_event(with_timing=True)
        stream.record(begin)
        device.copy(
            stream,
            source[0],
            destination[0],
            source[1],
            destination[1],
            run_nbytes,
            path=path,
            source_on_device=direction != "up",
            destination_on_device=direction != "down",
            scratch=(self._scratch.address, self._scratch_nbytes),
            pinned=self._pinned.address,
            staging=(self._staging.address, self._staging.nbytes),
            num_thread_blocks=self._num_thread_blocks,
        )
        stream.record(end)
        end.synchronize()
        return begin.elapsed_s(end)

    def _scattered(
        self, order: AddressArray, run_nbytes: int, num_pieces: int, num_slots: int
    ) -> tuple[AddressArray, AddressArray]:
        """Lay blocks on the device as layers in buffers of their own."""
        pieces = np.arange(num_pieces, dtype=np.uint64) * np.uint64(num_slots * run_nbytes)
        return order * np.uint64(run_nbytes), pieces + np.uint64(self._device.address)

    def _whole(
        self, direction: str, order: AddressArray, run_nbytes: int, num_pieces: int
    ) -> tuple[AddressArray, AddressArray]:
        """Lay blocks whole, in another order."""
        base = self._other.address if direction == "across" else self._host.address
        pieces = np.arange(num_pieces, dtype=np.uint64) * np.uint64(run_nbytes)
        return order[::-1] * np.uint64(num_pieces * run_nbytes), pieces + np.uint64(base)


# -- kept between processes ------------------------------------------------------------------------------------


def table_path(gpu: Gpu, *, folder: Path | None = None) -> Path:
    """Give the file that holds this device's table, under a folder or the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.device.name.lower()).strip("-")
    return (folder or Path(home) / "kvbm") / f"copies-{name}-{gpu.module.versions()[0]}.json"


def save_table(gpu: Gpu, cells: tuple[Cell, ...], *, folder: Path | None = None) -> Path:
    """Write the table of a device, whole or not at all; return its file. Raises `OSError` where that failed."""
    path = table_path(gpu, folder=folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _File(_VERSION, gpu.device.name, gpu.module.versions()[0], cells)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    draft.replace(path)
    return path


def load_table(gpu: Gpu, *, folder: Path | None = None) -> PathTable:
    """Give the table that was measured for this device and driver, else the built-in one."""
    try:
        path = table_path(gpu, folder=folder)
        content = msgspec.json.decode(path.read_bytes(), type=_File)
        known: dict[str, Any] = {"version": _VERSION, "device": gpu.device.name, "driver": gpu.module.versions()[0]}
        for name, value in known.items():
            if getattr(content, name) != value:
                raise ConfigError(f"{name} is {getattr(content, name)!r}, expected {value!r}")
        return PathTable(content.cells, origin=str(path))
    except FileNotFoundError:
        return PathTable.built_in()
    except (OSError, RuntimeError, msgspec.MsgspecError, KvbmError) as error:
        _log.warning("measured copies are ignored, run kvbm tune again path=%s error=%s", path, error)
        return PathTable.built_in()
