"""The choice of a disk engine: what is asked for, what a probe shows, and the reason that is told."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from disk_native import KINDS, PAGE, PATIENCE_S, File, aligned, disk_io

from kvbm.errors import ConfigError, StorageError
from kvbm.storage.disk import choose
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.choose import EngineChoice, choose_engine, compare_kinds
from kvbm.storage.disk.engine import DiskEngine
from kvbm.storage.disk.native_engine import NativeEngine

NUM_SLOTS = 64
needs_queues = pytest.mark.skipif(disk_io is None, reason="the native twin has no disk queues here")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "slots", NUM_SLOTS * PAGE, is_direct=False)
    yield file
    file.close()


def decide(
    file: File, setting: str = "auto", *, os_calls: OsCalls | None = None, module: Any = disk_io
) -> EngineChoice:
    return choose_engine(
        setting,
        file,
        block_nbytes=PAGE,
        slot_nbytes=PAGE,
        num_threads=2,
        depth=8,
        max_queued_nbytes=1 << 20,
        os_calls=os_calls or OsCalls(),
        disk_io=module,
    )


def check_that_it_moves(choice: EngineChoice) -> None:
    memory, slots = aligned(4, PAGE), np.arange(4, dtype=np.int32)
    memory[:] = 3
    assert choice.engine.submit(False, slots, memory, np.arange(4)).transfer.result(PATIENCE_S).all()
    choice.engine.close()


@pytest.mark.parametrize("setting", ["python", *KINDS])
def test_engine_that_is_asked_for_is_given(file: File, setting: str) -> None:
    choice = decide(file, setting)
    assert (choice.name, choice.reason) == (setting, "asked for")
    assert isinstance(choice.engine, DiskEngine if setting == "python" else NativeEngine)
    check_that_it_moves(choice)


def test_unknown_engine_is_refused(file: File) -> None:
    with pytest.raises(ConfigError, match="engine is 'aio', give one of auto, uring, threads, python"):
        decide(file, "aio")


@pytest.mark.parametrize("setting", ["uring", "threads"])
def test_native_engine_without_the_native_twin_is_refused(file: File, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"engine '{setting}' needs the native twin, which is absent"):
        decide(file, setting, module=None)


def test_without_the_native_twin_auto_takes_python(file: File) -> None:
    choice = decide(file, module=None)
    assert (choice.name, choice.reason) == ("python", "the native twin is absent or has no disk queues")
    check_that_it_moves(choice)


def test_replaced_calls_to_the_system_are_obeyed(file: File) -> None:
    class Other(OsCalls):
        pass

    choice = decide(file, os_calls=Other())
    assert (choice.name, choice.reason) == ("python", "the calls to the operating system are replaced")
    choice.engine.stop()


@needs_queues
def test_auto_takes_a_kind_after_a_probe_and_says_so_in_one_line(file: File, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvbm")
    choice = decide(file)
    assert choice.name in KINDS
    (record,) = caplog.records
    assert record.getMessage() == f"disk engine chosen engine={choice.name} reason={choice.reason!r} path={file.path}"
    check_that_it_moves(choice)


class FakeQueues:
    """A native module and a clock: a turn of a kind takes what it is told."""

    def __init__(self, costs: dict[str, tuple[float, float]], *, errnos: int = 0, code: int = 0) -> None:
        self.costs, self.errnos, self.code = costs, errnos, code
        self.wall = self.cpu = 0.0
        self.num_turns = 0

    def DiskQueue(self, fd: int, *, kind: str, depth: int, num_threads: int) -> Any:
        if kind == "uring" and self.code:
            raise StorageError(self.code, f"cannot set up an io_uring: {os.strerror(self.code).lower()}")

        def wait() -> Any:
            self.num_turns += 1
            self.wall += self.costs[kind][0]
            self.cpu += self.costs[kind][1]
            return [(1, np.array([self.errnos]), np.array([0]), 1)]

        return SimpleNamespace(submit=lambda *_: None, wait=wait)

    def monotonic(self) -> float:
        return self.wall

    perf_counter = monotonic

    def process_time(self) -> float:
        return self.cpu


@pytest.mark.parametrize(
    ("uring", "threads", "name", "reason"),
    [
        ((1e-3, 1e-3), (2e-3, 5e-4), "uring", "a ring is faster"),
        ((2e-3, 5e-4), (1e-3, 1e-3), "threads", "threads are faster"),
        ((1.05e-3, 5e-4), (1e-3, 1e-3), "uring", "a ring is as fast and no dearer"),
        ((1e-3, 1.05e-3), (1e-3, 1e-3), "uring", "a ring is as fast and no dearer"),
        ((1e-3, 2e-3), (1.05e-3, 1e-3), "threads", "threads are cheaper"),
    ],
)
def test_faster_kind_is_taken_and_among_equals_the_cheaper(
    monkeypatch: pytest.MonkeyPatch, uring: Any, threads: Any, name: str, reason: str
) -> None:
    fake = FakeQueues({"uring": uring, "threads": threads})
    monkeypatch.setattr(choose, "time", fake)
    answer = compare_kinds(fake, 0, depth=8, num_threads=2)
    assert answer[0] == name
    took = f"16 writes and reads took a ring {2e3 * uring[0]:.2f} ms, {2e3 * uring[1]:.2f} ms of"
    assert answer[1].startswith(f"{reason}: {took}")
    assert fake.num_turns == 16


def test_slow_disk_does_not_hold_up_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeQueues({"uring": (1.0, 0.0), "threads": (1.0, 0.0)})
    monkeypatch.setattr(choose, "time", fake)
    answer = compare_kinds(fake, 0, depth=8, num_threads=2)
    assert answer == ("threads", "the disk is too slow to probe within 50 ms")
    assert fake.num_turns == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_system_that_refuses_a_ring_gets_threads(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fake = FakeQueues({"uring": (1.0, 0.0), "threads": (1.0, 0.0)}, code=code)
    answer = compare_kinds(fake, 0, depth=8, num_threads=2)
    assert answer == ("threads", f"cannot set up an io_uring: {os.strerror(code).lower()}")


def test_file_that_cannot_be_probed_gets_threads() -> None:
    fake = FakeQueues({"uring": (1e-3, 0.0), "threads": (1e-3, 0.0)}, errnos=errno.EIO)
    answer = compare_kinds(fake, 0, depth=8, num_threads=2)
    assert answer == ("threads", "a probe could not be written and read")


@needs_queues
def test_directory_without_room_for_a_probe_gets_threads(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(nbytes: int) -> Iterator[int]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(file, "scratch", refuse)
    choice = decide(file)
    assert (choice.name, choice.reason) == ("threads", "there is no file to probe with: No space left on device")
    choice.engine.stop()


@needs_queues
def test_probe_leaves_no_file(file: File) -> None:
    before = list(file.path.parent.iterdir())
    decide(file).engine.stop()
    assert list(file.path.parent.iterdir()) == before
