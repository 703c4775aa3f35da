"""The process that is killed: a manager under load that says what it registers in G3 and what it resets.

Run as a program it forks one child for each line it reads, so that a round costs no start of an interpreter, and says
when that child is gone. Messages are a letter and a block's name, written whole or not at all: pipes see to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
from tier_site import BLOCK_NBYTES, MODEL, content_of

from kvbm.config import Config
from kvbm.errors import NotEnoughBlocksAvailable
from kvbm.manager import BlockManager
from kvbm.types import HashArray, Tier

NUM_NAMES = 600  # all of them fit into the disk tier, so that nothing is evicted there
DISK_BLOCKS = 1024
MESSAGE_NBYTES = 17
OUT = 1
_NOBODY = bytes(16)
_AT_ONCE = 200  # messages: a pipe takes 4096 bytes in one piece
_PATIENCE_S = 30.0  # nobody waits longer for a child that was forgotten


def names_of(lives: Sequence[int]) -> HashArray:
    """Name block i in its `lives[i]`-th life: a name that was reset is never given again."""
    return np.array([[i, life] for i, life in enumerate(lives)], dtype=np.uint64).reshape(-1, 2)


def tell(kind: str, hashes: HashArray | None = None) -> None:
    """Send a message about each of these blocks."""
    rows = [_NOBODY] if hashes is None else [row.tobytes() for row in hashes]
    for first in range(0, len(rows), _AT_ONCE):
        os.write(OUT, b"".join(kind.encode() + row for row in rows[first : first + _AT_ONCE]))


class Child:
    """One round."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.rng = random.Random(order["seed"])
        self.lives = list(order["lives"])
        tree = {
            "model": {**MODEL, "fingerprint": "crash"},
            "device": {"num_blocks": 64},
            "host": {"num_blocks": 64},
            "disk": {"num_blocks": DISK_BLOCKS, "path": order["path"], "direct_io": order["direct_io"]},
            "runtime": {"copy_threads": 1},
        }
        self.manager = BlockManager(Config.from_dict(tree), backend=order["backend"])
        self.alive = names_of(self.lives)
        self.locks = [threading.Lock() for _ in range(3)]  # each held by its worker while it uses names
        disk: Any = self.manager.disk
        self.disk = disk
        register = disk.register_blocks

        def register_and_tell(blocks: Any) -> Any:
            stored = register(blocks)
            tell("G", stored.hashes)
            return stored

        disk.register_blocks = register_and_tell

    # -- what the last one left ----------------------------------------------------------------------------------

    def verify(self) -> None:
        """Tell of each block that is found whether it is right, and of each that was reset and is found."""
        dead = [[i, k] for i, life in enumerate(self.lives) for k in range(life)]
        reset = np.array(dead, dtype=np.uint64).reshape(-1, 2)
        tell("D", reset[self.disk.lookup(reset) >= 0])
        found = self.alive[self.disk.lookup(self.alive) >= 0]
        while len(found):
            blocks = self.manager.onboard(self.manager.match_sequence_hashes(found[:32])).result(_PATIENCE_S)
            self._see(blocks, "F")
            found = found[len(blocks) + (len(blocks) < min(32, len(found))) :]  # what shortened it was dropped
            blocks.release()
        tell("V")

    # -- load ----------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Put, get and reset until the end comes."""
        threads = [
            threading.Thread(target=self._use, args=(random.Random(self.rng.random()), lock), daemon=True)
            for lock in self.locks
        ]
        for thread in threads:
            thread.start()
        while True:
            self._reset_all() if self.rng.random() < 0.05 or len(self.alive) < 100 else self._reset_some()

    def _use(self, rng: random.Random, lock: threading.Lock) -> None:
        while True:
            with lock:
                first = rng.randrange(len(self.alive))
                hashes = self.alive[first : first + rng.randint(1, 8)]
                try:
                    self._put(hashes) if rng.random() < 0.7 else self._get(hashes)
                    is_full = False
                except NotEnoughBlocksAvailable:
                    is_full = True
            if is_full or rng.random() < 0.3:  # else most of it is evicted before it gets down
                self.manager.flush(_PATIENCE_S)

    def _put(self, hashes: HashArray) -> None:
        fresh = self.manager.allocate_blocks(len(hashes))
        self.manager.storage(Tier.DEVICE).write(fresh.block_ids, content_of(hashes))
        self.manager.register_blocks(fresh.complete(hashes)).release()

    def _get(self, hashes: HashArray) -> None:
        blocks = self.manager.onboard(self.manager.match_sequence_hashes(hashes)).result(_PATIENCE_S)
        self._see(blocks, "")
        blocks.release()

    def _see(self, blocks: Any, kind: str) -> None:
        data = self.manager.storage(Tier.DEVICE).read(blocks.block_ids)
        is_right = (data == content_of(blocks.hashes, BLOCK_NBYTES)).all(axis=1)
        tell("W", blocks.hashes[~is_right])
        if kind:
            tell(kind, blocks.hashes[is_right])

    def _reset_some(self) -> None:
        places = self.rng.sample(range(len(self.alive)), min(self.rng.randint(1, 10), len(self.alive) - 1))
        hashes = self.alive[places]
        with contextlib.ExitStack() as stack:  # from here on nobody brings them back
            for lock in self.locks:
                stack.enter_context(lock)
            self.alive = np.delete(self.alive, places, axis=0)
        tell("b", hashes)
        for _ in range(50):
            busy = [name for tier in ("device", "host", "disk") for name in self._reset(tier, hashes)]
            if not busy:
                tell("R", hashes)
                for place in hashes[:, 0].tolist():
                    self.lives[place] += 1
                return
            self.manager.flush(_PATIENCE_S)

    def _reset(self, tier: str, hashes: HashArray) -> Any:
        return self.manager.reset_blocks(tier, hashes).in_use

    def _reset_all(self) -> None:
        with contextlib.ExitStack() as stack:
            for lock in self.locks:
                stack.enter_context(lock)
            tell("B")
            self.manager.reset_all()
            tell("A")
            self.lives = [life + 1 for life in self.lives]
            self.alive = names_of(self.lives)


def run(order: dict[str, Any]) -> None:
    """Do one round; whatever goes wrong is told by the exit status."""
    threading.excepthook = lambda arguments: (sys.excepthook(*arguments[:3]), os._exit(3))
    alarm = threading.Timer(_PATIENCE_S, lambda: os._exit(4))
    alarm.daemon = True
    alarm.start()
    os.write(OUT, b"S" + os.getpid().to_bytes(16, "little"))
    try:
        child = Child(order)
        child.verify()
        child.work()
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def main() -> None:
    """Fork a child for each order, and tell how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        os.write(OUT, b"X" + os.waitstatus_to_exitcode(status).to_bytes(16, "little", signed=True))


if __name__ == "__main__":
    main()
