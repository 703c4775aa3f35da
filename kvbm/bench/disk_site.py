"""What the bench of disks works on: a slab as a manager makes it, and jobs as its planner sends them.

Half of the host tier is written to the slab, the other half is read from it. Each host block has content of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvbm._backend import Backend
from kvbm.assembly import Assembly, assemble
from kvbm.bench.rig import random_hashes
from kvbm.config import Config
from kvbm.errors import TransferError
from kvbm.jobs import CopyJob, JobResult, LocalChannel, Outcome
from kvbm.planner import Limits
from kvbm.storage.disk import DiskStorage
from kvbm.storage.host import HostStorage
from kvbm.transfer import TransferEngine
from kvbm.types import DEFAULT_PRIORITY, HashArray, IdArray, Tier

_TOKEN_NBYTES = 4096  # 8 layers of K and V, 128 elements of 2 bytes
_ODD = 0x9E3779B97F4A7C15


class Site:
    """A slab, host blocks that are written to it, and as many that are read from it.

    Parameters
    ----------
    parts : Assembly
        With a host tier of twice `turn_blocks` and a disk tier of a multiple of it.
    turn_blocks : int
        Blocks that `write` and `read` move.
    depth : int
    backend : Backend

    Attributes
    ----------
    num_blocks, block_nbytes : int
        Of the slab.
    depth : int
        Blocks that its engine has under way at once.
    is_direct : bool
        Whether it goes around the page cache.
    """

    def __init__(self, parts: Assembly, turn_blocks: int, *, depth: int, backend: Backend) -> None:
        host, disk = parts.storages[Tier.HOST], parts.storages[Tier.DISK]
        assert isinstance(host, HostStorage), "made by default"
        assert isinstance(disk, DiskStorage), "made by default"
        self.turn_blocks = turn_blocks
        self.num_blocks = disk.num_blocks
        self.block_nbytes = disk.layout.block_nbytes
        self.depth = depth
        self.is_direct = disk.io_mode == "direct"
        self._host = host
        self._rng = np.random.default_rng(8)
        self._memory = host.buffers[0].view(np.uint64).reshape(2 * turn_blocks, -1)
        first = self._rng.integers(0, 1 << 63, self._memory.shape[1], dtype=np.uint64)
        for i in range(2 * turn_blocks):
            np.bitwise_xor(first, np.uint64(i * _ODD % (1 << 64)), out=self._memory[i])
        self._hashes: HashArray = np.zeros((self.num_blocks, 2), dtype=np.uint64)
        self._rows = np.zeros(self.num_blocks, dtype=np.int64)  # that each slot was written from
        self._last_read: tuple[IdArray, IdArray] | None = None  # slots, and the rows they came to
        self._next = 0  # slot to be written
        self._limits = Limits()
        channel = LocalChannel(parts.executor.execute, is_bounded=parts.executor.is_bounded)
        self._sender = _Sender(channel, self._limits.route_jobs)
        self._checksums = TransferEngine(backend=backend)

    def fill(self) -> None:
        """Write every slot."""
        for _ in range(self.num_blocks // self.turn_blocks):
            self.write()

    def write(self) -> tuple[float, float]:
        """Write a turn of slots one behind the other, from host blocks in random order.

        Returns
        -------
        speed, cpu_s : float
            Bytes a second, and seconds of processor time.

        Raises
        ------
        TransferError
            A block did not arrive.
        """
        n = self.turn_blocks
        slots = np.arange(self._next, self._next + n, dtype=np.int32)
        self._next = (self._next + n) % self.num_blocks
        rows = self._rng.permutation(n).astype(np.int32)
        names = random_hashes(n, seed=int(self._rng.integers(1 << 31)))
        self._hashes[slots], self._rows[slots] = names, rows
        # As the copy from the device tier leaves them.
        self._host.checksums[rows] = self._checksums.compute_checksums(self._host, rows, names)
        self._host.has_checksum[rows] = True
        return self._move(Tier.HOST, rows, slots, names)

    def read(self) -> tuple[float, float]:
        """Read a turn of random slots to host blocks in random order; see `write`."""
        n = self.turn_blocks
        slots = self._rng.permutation(self.num_blocks)[:n].astype(np.int32)
        rows = (n + self._rng.permutation(n)).astype(np.int32)
        self._last_read = slots, rows
        self._memory[n:] = 0
        return self._move(Tier.DISK, slots, rows, self._hashes[slots])

    def check(self) -> None:
        """Compare what was read last with what was written; raise `TransferError` where it differs."""
        for slot, row in zip(*(self._last_read or ((), ())), strict=True):
            if not np.array_equal(self._memory[row], self._memory[self._rows[slot]]):
                raise TransferError(f"slot {slot} came back with other bytes than were written")

    def close(self) -> None:
        """End the threads that are not the assembly's."""
        self._sender.close()
        self._checksums.close()

    def _move(self, source: Tier, from_ids: IdArray, to_ids: IdArray, names: HashArray) -> tuple[float, float]:
        size, is_up = self._limits.job_blocks, source is Tier.DISK
        parents = np.roll(names, 1, axis=0)
        jobs = [
            CopyJob(
                job_id=start,
                source=source,
                destination=Tier.HOST if is_up else Tier.DISK,
                source_ids=from_ids[start : start + size],
                destination_ids=to_ids[start : start + size],
                hashes=names[start : start + size],
                parents=None if is_up else parents[start : start + size],
                priorities=None if is_up else np.full(size, DEFAULT_PRIORITY, dtype=np.uint8)[: len(names) - start],
                timeout_s=self._limits.onboard_timeout_s if is_up else self._limits.offload_timeout_s,
                is_urgent=is_up,
            )
            for start in range(0, len(names), size)
        ]
        cpu_before, began = time.process_time(), time.perf_counter()
        self._sender.run(jobs)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
        return len(names) * self.block_nbytes / seconds, cpu_s


class _Sender:
    """Sends jobs, so many at once."""

    def __init__(self, channel: LocalChannel, num_at_once: int) -> None:
        self._channel = channel
        self._num_at_once = num_at_once
        self._room = threading.Semaphore(num_at_once)
        self._reasons: list[str] = []
        channel.open(self._receive, self._reasons.append)

    def run(self, jobs: Sequence[CopyJob]) -> None:
        for job in jobs:
            self._room.acquire()
            self._channel.send(job)
        for _ in range(self._num_at_once):
            self._room.acquire()
        self._room.release(self._num_at_once)
        if self._reasons:
            raise TransferError(f"a block did not arrive: {self._reasons[0]}")

    def close(self) -> None:
        self._channel.close()

    def _receive(self, result: JobResult) -> None:
        if (result.outcomes != Outcome.OK).any():
            self._reasons.append(result.reason or "no reason was given")
        self._room.release()


@contextmanager
def open_site(folder: Path, block_nbytes: int, *, nbytes: int, turn_nbytes: int, backend: Backend) -> Iterator[Site]:
    """Make a slab of about `nbytes` in a directory of its own, with default settings; the files stay.

    Parameters
    ----------
    folder : Path
        Made where its parent exists.
    block_nbytes : int
        A multiple of 4096.
    nbytes, turn_nbytes : int
        Of the slab, and of what one call of `Site.write` or `Site.read` moves; rounded down to whole blocks and turns.
    backend : Backend
    """
    turn_blocks = max(1, min(nbytes // 2, turn_nbytes) // block_nbytes)  # a slab is no smaller than the host tier
    num_blocks = max(1, nbytes // block_nbytes // turn_blocks) * turn_blocks
    model = {"num_layers": 8, "inner_dim": 128, "block_size": block_nbytes // _TOKEN_NBYTES, "fingerprint": "bench"}
    config = Config.from_dict(
        {
            "model": model,
            "device": {"num_blocks": 1},  # engines write into the top tier, so it keeps no checksums
            "host": {"num_blocks": 2 * turn_blocks},
            "disk": {"num_blocks": num_blocks, "path": os.fspath(folder)},
        }
    )
    parts = assemble(config, backend=backend)
    try:
        site = Site(parts, turn_blocks, depth=config.runtime.io_threads, backend=backend)
        try:
            yield site
        finally:
            site.close()
    finally:
        parts.close(config.runtime.close_timeout_s)
