"""What the tests of the object storage share: a layout, random blocks, and a store of dicts that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.layout import BlockLayout
from kvbm.storage.object_store import Fetched, Found, GarbageError, ObjectStorage

PATIENCE_S = 60.0
LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=8, num_layers=2, outer_dim=2, block_size=4, inner_dim=12, dtype="uint8"
)

MakeStorage = Callable[..., ObjectStorage]


class Blocks:
    """Random blocks with hashes and checksums, and what it takes to move them."""

    def __init__(self, n: int, layout: BlockLayout = LAYOUT, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.ids: npt.NDArray[np.int32] = np.arange(n, dtype=np.int32)
        self.data = rng.integers(0, 256, (n, layout.block_nbytes), dtype=np.uint8)
        self.hashes = rng.integers(0, 2**64, (n, 2), dtype=np.uint64)
        self.checksums = rng.integers(0, 2**64, n, dtype=np.uint64)
        self.back = np.full_like(self.data, 0xA5)

    def submit_write(self, storage: ObjectStorage) -> Any:
        return storage.submit_write(self.ids, self.data, self.ids, hashes=self.hashes, checksums=self.checksums)

    def submit_read(self, storage: ObjectStorage) -> Any:
        return storage.submit_read(self.ids, self.back, self.ids, hashes=self.hashes)

    def write(self, storage: ObjectStorage) -> list[bool]:
        good: list[bool] = self.submit_write(storage).result(PATIENCE_S).tolist()
        return good

    def read(self, storage: ObjectStorage) -> list[bool]:
        """Read, and check that what is called good is what was written."""
        self.back[:] = 0xA5
        good = self.submit_read(storage).result(PATIENCE_S)
        assert np.array_equal(self.back[good], self.data[good])
        assert np.array_equal(storage.checksums[self.ids[good]], self.checksums[good])
        assert storage.has_checksum[self.ids[good]].all()
        flags: list[bool] = good.tolist()
        return flags


class FakeClient:
    """Objects in a dict, behind a gate; counts what is under way.

    `plan` holds what the next requests do: None is answered, an exception is raised. Requests wait while `is_gated`.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.plan: list[Exception | None] = []
        self.seen: list[str] = []  # verbs
        self.is_gated = False
        self.has_come = threading.Semaphore(0)  # one for each request that waits at the gate
        self.num_at_once = 0
        self.max_at_once = 0
        self.lent: list[Any] = []  # blocks that this client does not let go of
        self.keeps_blocks = False
        self.on_answer: Callable[[], Any] | None = None  # called between the answer to a read and its end
        self._gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._made = datetime(2024, 1, 1, tzinfo=timezone.utc)
        self._times: dict[str, datetime] = {}

    def release(self) -> None:
        """Let requests go, these and those that come."""
        self.is_gated = False
        for loop, gate in self._gates:
            with contextlib.suppress(RuntimeError):  # that storage is closed
                loop.call_soon_threadsafe(gate.set)

    async def put(self, path: str, header: bytes, block: Any, *, max_requests: int, part_nbytes: int) -> None:
        if self.keeps_blocks:
            self.lent.append(block)
        try:
            await self._pass("put")
            self.objects[path] = header + bytes(block)
        finally:
            del block  # not kept by the traceback of what went wrong
        self._made += timedelta(seconds=1)
        self._times[path] = self._made

    async def get(self, path: str, nbytes: int, begin: int, end: int) -> Fetched:
        await self._pass("get")
        data = self._find(path)
        if self.on_answer is not None:
            self.on_answer()
        if len(data) != nbytes:
            raise GarbageError("wrong size")
        return Fetched(data[begin:end], None)

    async def size(self, path: str) -> int:
        await self._pass("head")
        return len(self._find(path))

    async def delete(self, paths: list[str]) -> None:
        await self._pass("delete")
        for path in paths:
            self.objects.pop(path, None)

    async def list(self, prefix: str) -> AsyncIterator[list[Found]]:
        await self._pass("list")
        yield [
            Found(path, len(data), self._times.get(path, self._made))
            for path, data in sorted(self.objects.items())
            if path.startswith(prefix + "/")
        ]

    def _find(self, path: str) -> bytes:
        try:
            return self.objects[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    async def _pass(self, verb: str) -> None:
        self.seen.append(verb)
        outcome = self.plan.pop(0) if self.plan else None
        self.num_at_once += 1
        self.max_at_once = max(self.max_at_once, self.num_at_once)
        try:
            if self.is_gated:
                gate = asyncio.Event()
                self._gates.append((asyncio.get_running_loop(), gate))
                self.has_come.release()
                await gate.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.num_at_once -= 1
        if outcome is not None:
            raise outcome


class Sleeper:
    """Sleeps that end when the test says so, or at once; keeps how long each was meant to be."""

    def __init__(self, *, is_gated: bool = False) -> None:
        self.seconds: list[float] = []
        self.is_gated = is_gated
        self.has_come = threading.Semaphore(0)
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.is_gated:
            gate = asyncio.Event()
            self._waiting.append((asyncio.get_running_loop(), gate))
            self.has_come.release()
            await gate.wait()

    def wait_for_sleeper(self) -> None:
        """Wait until somebody sleeps."""
        assert self.has_come.acquire(timeout=PATIENCE_S)

    def wake(self) -> None:
        """End the sleeps that there are."""
        waiting, self._waiting = self._waiting, []
        for loop, gate in waiting:
            loop.call_soon_threadsafe(gate.set)
