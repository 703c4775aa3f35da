"""A manager under load is killed again and again, and bits of its files are turned: see `KILLS`.

After each restart, on the same directory: every block that is found has its own bytes, none that was reset is found,
and where no bit was turned none that was registered in G3 is lost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_child import MESSAGE_NBYTES, NUM_NAMES

KILLS = int(os.environ.get("KVBM_CRASH_KILLS", "20"))
SEED = int(os.environ.get("KVBM_CRASH_SEED", str(random.randrange(2**32))))
PATIENCE_S = 60.0
BACKENDS = ["pure"] + ["native"] * (importlib.util.find_spec("kvbm._native.store") is not None)

pytestmark = [pytest.mark.crash, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")]


class Children:
    """Starts children, reads what they say, kills them."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self.data = b""

    def start(self, order: dict[str, Any]) -> int:
        """Fork a child; give its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        kind, body = self.read(PATIENCE_S) or ("", b"")
        assert kind == "S", "the child did not start"
        return int.from_bytes(body, "little")

    def read(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Give the next message; None when none comes in time."""
        assert self.process.stdout is not None
        give_up = time.monotonic() + timeout_s
        while len(self.data) < MESSAGE_NBYTES:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, give_up - time.monotonic()))
            if not ready:
                return None
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, "whoever forks the children is gone"
            self.data += more
        message, self.data = self.data[:MESSAGE_NBYTES], self.data[MESSAGE_NBYTES:]
        return chr(message[0]), message[1:]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def children() -> Iterator[Children]:
    children = Children()
    yield children
    children.close()


class Books:
    """What must be found, and what must not; names are (place, life)."""

    def __init__(self) -> None:
        self.lives = [0] * NUM_NAMES
        self.expected: set[bytes] = set()  # registered in G3, and not reset since
        self.found: set[bytes] = set()
        self.resetting: set[bytes] = set()
        self.is_verified = self.is_resetting_all = False
        self.num_lost_in_all = 0
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        self.found, self.resetting = set(), set()
        self.is_verified = self.is_resetting_all = False

    def take(self, kind: str, name: bytes, *, has_flips: bool) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "F":
            self.found.add(name)
        elif kind == "V":
            lost = self.expected - self.found
            assert has_flips or not lost, f"{len(lost)} of {len(self.expected)} registered blocks are lost"
            self.num_lost_in_all += len(lost)
            self.expected, self.is_verified = set(self.found), True
        elif kind == "G":
            if name not in self.resetting and not self.is_resetting_all:
                self.expected.add(name)
        elif kind == "b":
            self.resetting.add(name)
            self.expected.discard(name)
        elif kind == "R":
            self.lives[_place_of(name)] += 1
        elif kind == "B":
            self.expected, self.is_resetting_all = set(), True
        elif kind == "A":
            self.lives, self.is_resetting_all = [life + 1 for life in self.lives], False
        else:
            what = {"W": "wrong bytes", "D": "a block that was reset is found"}.get(kind, "the child failed by itself")
            raise AssertionError(f"{what} ({kind} {name.hex()})")


def _place_of(name: bytes) -> int:
    return int(np.frombuffer(name, dtype=np.uint64)[0])


def turn_bits(folder: Path, rng: random.Random) -> None:
    """Turn some bits of every file, the index harder than its size would have it."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for _ in range(rng.choice([1, 3, 30]) if size else 0):
                at = rng.randrange(min(size, rng.choice([1 << 13, 1 << 16, size])))
                file.seek(at)
                (value,) = file.read(1)
                file.seek(at)
                file.write(bytes([value ^ (1 << rng.randrange(8))]))


@pytest.mark.timeout(0)
def test_nothing_wrong_comes_back_nothing_is_lost_whenever_it_is_killed(tmp_path: Path, children: Children) -> None:
    rng, books = random.Random(SEED), Books()
    folder = tmp_path / "disk"
    has_flips, num_verified = False, 0
    for turn in range(KILLS):
        story = f"seed {SEED} (KVBM_CRASH_SEED), kill {turn}"
        order = {
            "seed": rng.randrange(2**32),
            "lives": books.lives,
            "path": str(folder),
            "direct_io": rng.random() < 0.5,
            "backend": rng.choice(BACKENDS),
        }
        books.begin()
        pid = children.start(order)
        delay_s = rng.expovariate(1 / 0.05) if turn % 5 == 4 else rng.uniform(0.05, 0.4)  # some while it opens
        kill_at: float | None = None if turn % 5 != 4 else time.monotonic() + delay_s
        try:
            while message := children.read(PATIENCE_S if kill_at is None else max(0.0, kill_at - time.monotonic())):
                books.take(*message, has_flips=has_flips)
                if message[0] == "V" and kill_at is None:
                    kill_at = time.monotonic() + delay_s
                if kill_at is not None and time.monotonic() >= kill_at:
                    break
            assert kill_at is not None, "the child says nothing"
        except AssertionError as error:
            raise AssertionError(f"{story}: {error}") from None
        finally:
            os.kill(pid, signal.SIGKILL)
        while (message := children.read(PATIENCE_S)) and message[0] != "X":
            try:
                books.take(*message, has_flips=has_flips)
            except AssertionError as error:
                raise AssertionError(f"{story}: {error}") from None
        assert message, story
        assert int.from_bytes(message[1], "little", signed=True) == -signal.SIGKILL, f"{story}: it ended by itself"
        num_verified += books.is_verified
        # A round that was killed before it had looked leaves the damage to the next.
        has_flips = has_flips and not books.is_verified
        if rng.random() < 0.5 and folder.exists():
            turn_bits(folder, rng)
            has_flips = True
    print(f"{KILLS} kills, {num_verified} verified, {books.num_lost_in_all} lost to turned bits, {books.counts}")
    assert num_verified >= KILLS // 2
    assert books.counts["G"] > KILLS
    assert books.counts["F"] > KILLS
