"""Memory that one process makes and another maps: who may have it, what happens when one of them is not there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.engines import shared_memory
from kvbm.engines.shared_memory import Giver, SharedMemory, available_nbytes, name_of, take
from kvbm.errors import StorageError

NBYTES = 3 << 20
PATIENCE_S = 30.0

TAKER = """
import sys
from kvbm.engines.shared_memory import SharedMemory, take
fd, message = take(sys.argv[1])
memory = SharedMemory.adopt(fd, int(message))
print(int(memory.data[7]), memory.data.flags.writeable, flush=True)
sys.stdin.readline()
print(int(memory.data[7]), flush=True)
"""
GIVER = """
import sys
from kvbm.engines.shared_memory import Giver, SharedMemory
giver = Giver(sys.argv[1], num_takers=1)
memory = SharedMemory.create(int(sys.argv[2]))
memory.data[:] = 5
giver.give(memory, sys.argv[2].encode())
print("given", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def fresh_name() -> str:
    return name_of("test", os.getpid(), os.urandom(8))


@pytest.fixture
def name() -> str:
    return fresh_name()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_another_process_maps_the_same_bytes_and_cannot_write_them(name: str) -> None:
    giver = Giver(name, num_takers=1)
    memory = SharedMemory.create(NBYTES)
    try:
        assert memory.data.nbytes == NBYTES
        assert not memory.data.any()
        memory.data[7] = 41
        with running(TAKER, name) as taker:
            giver.give(memory, str(NBYTES).encode())
            assert line_of(taker) == "41 False"
            memory.data[7] = 42
            print("", file=taker.stdin, flush=True)
            assert line_of(taker) == "42", "one copy, not two"
            allocated = os.fstat(memory.fd).st_blocks * 512
            assert NBYTES <= allocated < 2 * NBYTES
    finally:
        giver.close()
        memory.close()


def test_a_killed_giver_leaves_its_bytes_to_those_who_map_them_and_nothing_else(name: str) -> None:
    with running(GIVER, name, str(NBYTES)) as first:
        assert line_of(first) == "given"
        fd, message = take(name)
        memory = SharedMemory.adopt(fd, int(message))
        first.send_signal(signal.SIGKILL)
        assert first.wait(PATIENCE_S) == -signal.SIGKILL
    assert (memory.data == 5).all()
    assert not list(Path("/dev/shm").glob("*kvbm*"))
    Giver(name, num_takers=1).close()  # its name is free


def test_who_asks_early_waits_for_the_gift_and_the_name_is_free_after_the_last(name: str) -> None:
    pauses: list[float] = []
    giver: list[Giver] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            giver.append(Giver(name, num_takers=1))
            giver[0].give(memory, b"hello")

    memory = SharedMemory.create(NBYTES)
    fd, message = take(name, pause=pause)
    os.close(fd)
    assert (len(pauses), message) == (3, b"hello")
    assert giver[0]._thread is not None
    giver[0]._thread.join(PATIENCE_S)
    Giver(name, num_takers=1).close()
    giver[0].close()
    memory.close()


def test_who_leaves_with_the_last_byte_has_been_given_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = socket.send_fds

    def send_and_lose(connection: socket.socket, *arguments: Any) -> int:
        num_sent = sending(connection, *arguments)
        taker.close()
        return num_sent

    monkeypatch.setattr(socket, "send_fds", send_and_lose)
    giver = Giver(name, num_takers=1)
    memory = SharedMemory.create(NBYTES)
    taker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    taker.connect(b"\0" + name.encode())
    giver.give(memory, b"hello")
    assert giver._thread is not None
    giver._thread.join(PATIENCE_S)
    assert not giver._thread.is_alive(), "it waits for another taker"
    giver.close()
    memory.close()


def test_a_name_has_one_giver(name: str) -> None:
    giver = Giver(name, num_takers=1)
    with pytest.raises(StorageError, match="is another engine of this id here"):
        Giver(name, num_takers=1)
    giver.close()
    giver.close()


def test_nobody_waits_for_a_rank_that_never_comes_or_has_ended(name: str) -> None:
    with pytest.raises(StorageError, match="waited 0 s for the host memory of rank 0, which is not there"):
        take(name, timeout_s=0)
    giver = Giver(name, num_takers=1)
    with pytest.raises(StorageError, match="which opens its tiers"):
        take(name, patience_s=0.001)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
        waiting.connect(b"\0" + name.encode())
        giver.close()
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(1) == b"", "it hears of the end at once"


def listener(name: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(b"\0" + name.encode())
    made.listen(1)
    return made


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"", "ended before it gave"),
        (b"\0\0\0\5ab", "gives 0 memories and 5 bytes"),
        (b"\0\0", "ended while it gave"),
    ],
)
def test_what_is_no_gift_is_refused(name: str, sent: bytes, problem: str) -> None:
    def answer(_: float = 0) -> None:
        connection, _address = made.accept()
        connection.sendall(sent)
        connection.close()

    with listener(name) as made:
        connecting = shared_memory._connect

        def connect_and_answer(*arguments: object) -> socket.socket:
            connection = connecting(*arguments)  # type: ignore[arg-type]
            answer()
            return connection

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory, "_connect", connect_and_answer)
            with pytest.raises(StorageError, match=problem):
                take(name)


def test_a_giver_of_another_user_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    with listener(name):
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        with pytest.raises(StorageError, match=f"of user {uid} gives host memory, need user {uid + 1}"):
            take(name)


def test_a_taker_of_another_user_gets_nothing_and_does_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    giver = Giver(name, num_takers=1)
    memory = SharedMemory.create(NBYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(b"\0" + name.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: uid + 1)
            giver.give(memory, b"secret")
            data, fds, _, _ = socket.recv_fds(stranger, 64, 1)
        assert (data, list(fds)) == (b"", [])
    fd, message = take(name)
    os.close(fd)
    assert message == b"secret"
    giver.close()
    memory.close()


def test_memory_of_another_size_and_memory_that_is_not_there_are_refused() -> None:
    memory = SharedMemory.create(NBYTES)
    with pytest.raises(StorageError, match=f"got {NBYTES} bytes of shared host memory, need {NBYTES + 1}"):
        SharedMemory.adopt(os.dup(memory.fd), NBYTES + 1)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(memory.fd, 1)  # others would be killed at their next read
    fd = memory.fd
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    memory.data[:] = np.uint8(1)  # stays


@pytest.mark.parametrize(
    ("setting", "wish", "has"),
    [
        ("always within_size [advise] never deny force", True, True),
        ("always within_size [advise] never deny force", False, False),
        ("always within_size advise [never] deny force", True, False),
        (None, True, False),
    ],
)
def test_huge_pages_are_there_where_the_kernel_gives_them_to_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, wish: bool, has: bool
) -> None:
    file = tmp_path / "shmem_enabled"
    if setting is not None:
        file.write_text(setting)
    monkeypatch.setattr(shared_memory, "_SHMEM_ENABLED", file)
    memory = SharedMemory.create(NBYTES, use_huge_pages=wish)
    assert memory.has_huge_pages == has
    memory.close()


def test_more_memory_than_there_is_is_refused_before_a_page_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_nbytes() < sys.maxsize
    monkeypatch.setattr(shared_memory, "available_nbytes", lambda: NBYTES - 1)
    with pytest.raises(StorageError, match=f"{NBYTES - 1} are available: give a smaller host tier"):
        SharedMemory.create(NBYTES)
    monkeypatch.setattr(shared_memory, "available_nbytes", lambda: sys.maxsize)
    with pytest.raises(StorageError, match=r"cannot make .* give a smaller host tier"):
        SharedMemory.create(1 << 60)  # no process has so many addresses
