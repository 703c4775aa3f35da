"""The lock of a slab: one owner at a time, free the moment its process is dead, and never given up by accident."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.errors import StorageError
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.lock import SlabLock

HOLDER = """
import os, sys
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.lock import SlabLock
fd = os.open(sys.argv[1], os.O_RDONLY)
lock = SlabLock(fd, "rank0.lock", path=sys.argv[1], timeout_s=0, os_calls=OsCalls())
print("held", flush=True)
sys.stdin.read()
"""


class Timer(OsCalls):
    """Time goes by only where the lock waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at_sleep: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_sleep()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def take(folder: int, timer: Timer | None = None, *, timeout_s: float = 2.0, name: str = "rank0.lock") -> SlabLock:
    timer = timer or Timer()
    return SlabLock(folder, name, path="/slab", timeout_s=timeout_s, os_calls=timer, clock=lambda: timer.now)


def test_a_held_slab_is_refused_after_its_time_and_the_holder_is_named(
    folder: int, holder: subprocess.Popen[bytes]
) -> None:
    timer = Timer()
    with pytest.raises(StorageError, match=f"in use by another storage of process {holder.pid}: give each") as info:
        take(folder, timer)
    assert (info.value.errno, info.value.filename) == (errno.EBUSY, "/slab")
    assert 2.0 <= timer.now < 2.2
    take(folder, name="rank1.lock").close()  # another rank's


def test_a_slab_is_free_when_its_owner_is_killed_while_we_wait(folder: int, holder: subprocess.Popen[bytes]) -> None:
    timer = Timer()

    def kill() -> None:
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    timer.at_sleep = kill
    lock = take(folder, timer)
    assert timer.now <= 0.1
    lock.close()


def test_a_storage_of_this_process_is_refused_and_does_not_give_the_lock_up(folder: int, tmp_path: Path) -> None:
    lock = take(folder)
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"another storage of process {os.getpid()} \(this one\)"):
            take(folder, timeout_s=0)
    code = HOLDER.replace("sys.stdin.read()", "")
    other = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(other, capture_output=True, text=True, env=environment, check=False)
    assert re.search(f"in use by another storage of process {os.getpid()}", done.stderr), "ours is held still"
    lock.close()
    lock.close()
    assert subprocess.run(other, capture_output=True, env=environment, check=False).stdout == b"held\n"
    take(folder).close()


def test_a_lock_file_that_is_replaced_while_we_take_it_is_taken_anew(folder: int, tmp_path: Path) -> None:
    class Replacing(Timer):
        num_replaced = 0

        def lock(self, fd: int) -> None:
            super().lock(fd)
            if self.num_replaced < 2:
                self.num_replaced += 1
                (tmp_path / "rank0.lock").unlink()
                if self.num_replaced == 1:
                    (tmp_path / "rank0.lock").touch()

    calls = Replacing()
    lock = take(folder, calls)
    assert calls.num_replaced == 2
    assert (tmp_path / "rank0.lock").read_text() == f"{os.getpid()}\n"
    lock.close()


@pytest.mark.parametrize("text", [b"", b"nonsense\n", b"\xff" * 100, b"12 34"])
def test_a_holder_that_wrote_nonsense_is_not_named(
    folder: int, tmp_path: Path, holder: subprocess.Popen[bytes], text: bytes
) -> None:
    (tmp_path / "rank0.lock").write_bytes(text)
    with pytest.raises(StorageError, match=r"in use by another storage: give each"):
        take(folder, timeout_s=0)


def test_a_link_or_a_folder_in_its_place_is_refused(folder: int, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "link.lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        take(folder, name="link.lock")
    (tmp_path / "folder.lock").mkdir()
    with pytest.raises(OSError, match="directory"):
        take(folder, name="folder.lock")
    os.mkfifo(tmp_path / "fifo.lock")
    with pytest.raises(OSError, match="no regular file: remove it"):
        take(folder, name="fifo.lock")
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_a_lock_that_cannot_be_had_leaves_nothing_open(folder: int) -> None:
    class NoLocks(Timer):
        def lock(self, fd: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

    before = sorted(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else []
    with pytest.raises(OSError, match="No locks available"):
        take(folder, NoLocks())
    assert before == (sorted(Path("/proc/self/fd").iterdir()) if before else [])
    take(folder).close()
