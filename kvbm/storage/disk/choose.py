"""Which engine moves the blocks of a slab: a ring, native threads, or Python's, and why.

Left to itself it takes what a probe of a few milliseconds shows: some writes and reads of a file beside the data file,
with each native kind in turn, timed by the clock and by the processor. The data file itself would not do: what was
never written in it is never read from the device.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, StorageError
from kvbm.jobs import Transfer
from kvbm.storage.disk.calls import OsCalls, aligned_empty
from kvbm.storage.disk.counters import DiskCounters
from kvbm.storage.disk.engine import DiskEngine
from kvbm.storage.disk.native_engine import NativeEngine
from kvbm.storage.disk.slab import Slab
from kvbm.types import IdArray

_log = logging.getLogger("kvbm.storage.disk")

ENGINES = ("auto", "uring", "threads", "python")

_PROBE_BLOCK_NBYTES = 64 << 10  # of each write and read
_PROBE_BLOCKS = 16  # of each turn
PROBE_NBYTES = _PROBE_BLOCKS * _PROBE_BLOCK_NBYTES
_PROBE_TURNS = 3  # of each kind; the best counts
_PROBE_LIMIT_S = 0.05  # no turn begins after that: a slow disk is not to hold up the opening
_NOTICEABLE = 1.1  # what is less is noise


class SubmittedBatch(Protocol):
    """What an engine gives for a batch."""

    transfer: Transfer[npt.NDArray[np.bool_]]
    is_read: bool
    error: OSError | None


class Engine(Protocol):
    """What moves blocks; `DiskEngine` and `NativeEngine` document it call by call."""

    @property
    def counters(self) -> DiskCounters: ...  # noqa: D102
    @property
    def is_worker(self) -> bool: ...  # noqa: D102
    def submit(  # noqa: D102
        self, is_read: bool, ids: IdArray, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
    ) -> SubmittedBatch: ...
    def close(self, timeout: float | None = None) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class EngineChoice:
    """An engine that was chosen.

    Attributes
    ----------
    engine : Engine
    name : str
        "uring", "threads" or "python".
    reason : str
        Why.
    """

    engine: Engine
    name: str
    reason: str


@dataclass(frozen=True)
class _Cost:
    """What a turn of reads took, seconds."""

    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.wall_s * 1e3:.2f} ms, {self.cpu_s * 1e3:.2f} ms of processor time"


def choose_engine(
    setting: str,
    files: Slab,
    *,
    block_nbytes: int,
    slot_nbytes: int,
    num_threads: int,
    depth: int,
    max_queued_nbytes: int,
    os_calls: OsCalls,
    disk_io: ModuleType | None,
) -> EngineChoice:
    """Make the engine of a slab.

    Parameters
    ----------
    setting : {"auto", "uring", "threads", "python"}
    files : Slab
    block_nbytes, slot_nbytes, num_threads, depth, max_queued_nbytes : int
        As the engines take them.
    os_calls : OsCalls
        Another operating system than the real one is Python's: "auto" then takes "python".
    disk_io : module, optional
        `Backend.disk_io`.

    Raises
    ------
    ConfigError
        Another setting, or one that this installation has not got.
    StorageError
        With errno: "uring" was asked for and cannot be had here. The files stay open.

    Notes
    -----
    Logs one line. "auto" writes and reads a file of 1 MiB that is gone afterwards, and begins nothing after 50 ms.
    """
    check_engine(setting, disk_io)
    name, reason = setting, "asked for"
    if setting == "auto":
        name, reason = _decide(files, depth=depth, num_threads=num_threads, os_calls=os_calls, disk_io=disk_io)
    engine: Engine
    if name == "python":
        engine = DiskEngine(
            files,
            block_nbytes=block_nbytes,
            slot_nbytes=slot_nbytes,
            num_threads=num_threads,
            max_queued_nbytes=max_queued_nbytes,
            os_calls=os_calls,
        )
    else:
        assert disk_io is not None, "checked before"
        engine = NativeEngine(
            files,
            block_nbytes=block_nbytes,
            slot_nbytes=slot_nbytes,
            num_threads=num_threads,
            max_queued_nbytes=max_queued_nbytes,
            disk_io=disk_io,
            kind=name,
            depth=depth,
        )
    _log.info("disk engine chosen engine=%s reason=%r path=%s", name, reason, files.path)
    return EngineChoice(engine, name, reason)


def check_engine(setting: str, disk_io: ModuleType | None) -> None:
    """Refuse an engine that this installation has not got, or that nobody has.

    Raises
    ------
    ConfigError
        The setting is another than those of `ENGINES`, or needs the native twin.
    """
    if setting not in ENGINES:
        raise ConfigError(f"engine is {setting!r}, give one of {', '.join(ENGINES)}")
    if setting in ("uring", "threads") and disk_io is None:
        raise ConfigError(f"engine {setting!r} needs the native twin, which is absent: use auto or python")


def compare_kinds(disk_io: ModuleType, fd: int, *, depth: int, num_threads: int) -> tuple[str, str]:
    """Write and read a file with both kinds of native queues in turn; give the better kind, and why.

    Parameters
    ----------
    disk_io : module
    fd : int
        Of a file of `PROBE_NBYTES` that were written before.
    depth, num_threads : int

    Notes
    -----
    The clock decides where it sees a difference of a tenth, else the processor time, else the ring has it. Without a
    ring it is threads.
    """
    try:
        queues = {
            kind: disk_io.DiskQueue(fd, kind=kind, depth=depth, num_threads=num_threads)
            for kind in ("threads", "uring")
        }
    except StorageError as error:
        return "threads", error.strerror or str(error)
    memory = aligned_empty(_PROBE_BLOCKS, _PROBE_BLOCK_NBYTES)
    memory[:] = 0x5A
    offsets = np.random.default_rng(0).permutation(_PROBE_BLOCKS) * _PROBE_BLOCK_NBYTES
    addresses = memory.ctypes.data + np.arange(_PROBE_BLOCKS, dtype=np.uint64) * np.uint64(_PROBE_BLOCK_NBYTES)
    sizes = np.full(_PROBE_BLOCKS, _PROBE_BLOCK_NBYTES, dtype=np.uint64)
    arrays = offsets, np.ones(_PROBE_BLOCKS, dtype=np.int64), addresses, sizes
    give_up = time.monotonic() + _PROBE_LIMIT_S
    costs: dict[str, list[_Cost]] = {kind: [] for kind in queues}
    for turn in range(1 + _PROBE_TURNS):
        for kind, queue in queues.items():
            if time.monotonic() > give_up:
                break
            cost = _move_once(queue, 2 * turn + 1, arrays, memory)
            if cost is None:
                return "threads", "a probe could not be written and read"
            if turn:  # the first one starts threads and touches memory
                costs[kind].append(cost)
    threads, uring = costs["threads"], costs["uring"]
    if not threads or not uring:
        return "threads", f"the disk is too slow to probe within {_PROBE_LIMIT_S * 1e3:.0f} ms"
    return _judge(_best(threads), _best(uring))


def _decide(
    files: Slab, *, depth: int, num_threads: int, os_calls: OsCalls, disk_io: ModuleType | None
) -> tuple[str, str]:
    """Give the engine that "auto" stands for, and why."""
    if type(os_calls) is not OsCalls:
        return "python", "the calls to the operating system are replaced"
    if disk_io is None:
        return "python", "the native twin is absent or has no disk queues"
    try:
        with files.scratch(PROBE_NBYTES) as fd:
            return compare_kinds(disk_io, fd, depth=depth, num_threads=num_threads)
    except OSError as error:
        return "threads", f"there is no file to probe with: {error.strerror or error}"


def _move_once(queue: Any, token: int, arrays: tuple[Any, ...], memory: npt.NDArray[np.uint8]) -> _Cost | None:
    """Write and read a turn; None where that failed."""
    cpu, begin = time.process_time(), time.perf_counter()
    for is_read in (False, True):
        queue.submit(token + is_read, is_read, *arrays, memory)
        ((_, errnos, _, _),) = queue.wait()
        if errnos.any():
            return None
    return _Cost(time.perf_counter() - begin, time.process_time() - cpu)


def _best(costs: list[_Cost]) -> _Cost:
    return _Cost(min(cost.wall_s for cost in costs), min(cost.cpu_s for cost in costs))


def _judge(threads: _Cost, uring: _Cost) -> tuple[str, str]:
    figures = f"{_PROBE_BLOCKS} writes and reads took a ring {uring}, threads {threads}"
    if uring.wall_s > threads.wall_s * _NOTICEABLE:
        return "threads", f"threads are faster: {figures}"
    if threads.wall_s > uring.wall_s * _NOTICEABLE:
        return "uring", f"a ring is faster: {figures}"
    if uring.cpu_s > threads.cpu_s * _NOTICEABLE:
        return "threads", f"threads are cheaper: {figures}"
    return "uring", f"a ring is as fast and no dearer: {figures}"
