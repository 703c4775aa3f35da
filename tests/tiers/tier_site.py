"""What the tests of whole managers share: tiers over real storages, content that names its block, and gates."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.blocks import ImmutableBlocks
from kvbm.config import Config
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Job, JobResult
from kvbm.layout import BlockLayout
from kvbm.manager import BlockManager
from kvbm.storage import HostStorage, Storage
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.testing.faults import FaultPlan, FaultyStorage
from kvbm.types import HashArray, Tier

PATIENCE_S = 60.0  # for what another thread must do; a test that needs it all has failed

MODEL: dict[str, Any] = {"num_layers": 3, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"}
BLOCK_NBYTES = 3 * 2 * 4 * 12
_numbers = itertools.count(1)


def content_of(hashes: HashArray, nbytes: int = BLOCK_NBYTES) -> npt.NDArray[np.uint8]:
    """Give the bytes that belong to these names: (num_blocks, nbytes)."""
    data = b"".join(hashlib.shake_128(row.tobytes()).digest(nbytes) for row in hashes)
    return np.frombuffer(data, dtype=np.uint8).reshape(len(hashes), nbytes)


def names(num_blocks: int) -> HashArray:
    """Name a prompt that no other has: (num_blocks, 2) uint64."""
    return np.array([[next(_numbers), 2**63 - 1] for _ in range(num_blocks)], dtype=np.uint64).reshape(-1, 2)


def disk_layout(num_blocks: int) -> BlockLayout:
    return BlockLayout.fully_contiguous(num_blocks=num_blocks, **MODEL)


class Tiers:
    """A manager whose every block holds what its hash says."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.top = next(iter(manager.status()))

    # -- a request, in pieces ----------------------------------------------------------------------------------

    def fill(self, hashes: HashArray, before: HashArray | None = None) -> ImmutableBlocks:
        """Allocate, fill and register blocks; `before` is the chain above them."""
        fresh = self.manager.allocate_blocks(len(hashes))
        self.manager.storage(self.top).write(fresh.block_ids, content_of(hashes))
        parent = None if before is None or not len(before) else before[-1].tobytes()
        return self.manager.register_blocks(fresh.complete(hashes, parent=parent))

    def put(self, hashes: HashArray, before: HashArray | None = None) -> None:
        """Fill blocks and let go of them."""
        self.fill(hashes, before).release()

    def get(self, hashes: HashArray, timeout: float | None = None) -> ImmutableBlocks:
        """Match and onboard; whatever comes has the right bytes and names."""
        blocks = self.manager.onboard(self.manager.match_sequence_hashes(hashes), timeout=timeout).result(PATIENCE_S)
        self.see_right(blocks, hashes)
        return blocks

    def num_hit(self, hashes: HashArray) -> int:
        """Count the blocks that a request gets."""
        blocks = self.get(hashes)
        num_blocks = len(blocks)
        blocks.release()
        return num_blocks

    def see_right(self, blocks: ImmutableBlocks, hashes: HashArray) -> None:
        assert blocks.hashes.tolist() == hashes[: len(blocks)].tolist()
        data = self.manager.storage(self.top).read(blocks.block_ids)
        np.testing.assert_array_equal(data, content_of(hashes[: len(blocks)]))

    # -- what lies where ---------------------------------------------------------------------------------------

    def lies(self, tier: str, hashes: HashArray) -> list[bool]:
        """Tell which blocks a tier has registered."""
        return (self.pool(tier).lookup(hashes) >= 0).tolist()  # type: ignore[no-any-return]

    def pool(self, tier: str) -> Any:
        return self.manager._pools[Tier(tier)]

    def put_below(self, hashes: HashArray, *tiers: str) -> None:
        """Fill blocks, let them sink, and forget them in the tiers above those named."""
        self.put(hashes)
        self.manager.flush(PATIENCE_S)
        for tier in self.manager.status():
            if tier not in tiers:
                self.manager.reset_blocks(tier, hashes)
            assert self.lies(tier, hashes) == [tier in tiers] * len(hashes), tier

    def evict(self, tier: str) -> None:
        """Make a tier's pool evict all that nobody holds, as an allocation does."""
        pool = self.pool(tier)
        pool.allocate_blocks(pool.available_blocks).release()

    def route(self, name: str) -> Any:
        """Give the counters of e.g. "host-disk"."""
        source, destination = name.split("-")
        return self.manager.statistics().route(Tier(source), Tier(destination))

    def spoil_memory(self, tier: str, name: HashArray, place: int) -> None:
        """Turn one bit of one byte of a block in memory, behind everybody's back."""
        storage: Any = self.manager.storage(tier)
        (block_id,) = self.pool(tier).lookup(name.reshape(1, 2)).tolist()
        region, byte = divmod(place, storage.layout.region_nbytes)
        layer, outer = divmod(region, storage.layout.outer_dim)
        address = storage.address(block_id, layer, outer) + byte
        for buffer in storage.buffers:
            offset = address - buffer.ctypes.data
            if 0 <= offset < buffer.nbytes:
                buffer[offset] ^= 0x10
                return
        raise AssertionError("no buffer has this address")

    def spoil_disk(self, name: HashArray, place: int) -> None:
        """Turn one bit of one byte of a block in the file."""
        storage: Any = self.manager.storage("disk")
        storage = getattr(storage, "storage", storage)
        (block_id,) = self.pool("disk").lookup(name.reshape(1, 2)).tolist()
        with storage.path.open("r+b") as file:
            file.seek(block_id * storage.slot_nbytes + place)
            (value,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([value ^ 0x10]))

    def settle(self) -> None:
        """Wait until no job is open."""
        planner = self.manager._planner
        with planner._changed:
            assert planner._changed.wait_for(lambda: not planner.num_open_jobs, PATIENCE_S)

    def see_idle(self) -> None:
        """See that, once all has sunk, nobody holds, waits for or moves a block, and that every pool is sound."""
        self.settle()
        self.manager.flush(PATIENCE_S)
        self.settle()
        self.manager.check()
        for tier, status in self.manager.status().items():
            assert (status.mutable, status.complete, status.active) == (0, 0, 0), f"{tier} keeps blocks: {status}"
        for route, counters in self.manager.statistics().routes.items():
            assert (counters.queued, counters.in_flight, counters.draining) == (0, 0, 0), (route, counters)
        self.settle()  # what was used may have been on its way to the records of a tier


class Gate:
    """Stands before an executor: jobs of chosen routes wait until it is opened, or fail as told."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_shut: set[str] = set()
        self.errors: dict[str, list[BaseException]] = {}  # to raise, by route
        self.num_waiting = 0
        self.jobs: list[Job] = []

    def shut(self, *routes: str) -> None:
        with self._condition:
            self._is_shut.update(routes)

    def open(self) -> None:
        with self._condition:
            self._is_shut.clear()
            self._condition.notify_all()

    def wait_for(self, num_jobs: int) -> None:
        """Wait until that many jobs stand at the gate."""
        with self._condition:
            assert self._condition.wait_for(lambda: self.num_waiting >= num_jobs, PATIENCE_S)

    def copies(self, route: str) -> list[CopyJob]:
        """Give the copies of a route that were begun so far."""
        return [job for job in self.jobs if isinstance(job, CopyJob) and _route_of(job) == route]

    def enter(self, job: Job) -> None:
        """Wait as long as the job's route is shut; raise what is to be raised."""
        route = _route_of(job)
        with self._condition:
            self.jobs.append(job)
            if route in self._is_shut:
                self.num_waiting += 1
                self._condition.notify_all()
                assert self._condition.wait_for(lambda: route not in self._is_shut, PATIENCE_S)
                self.num_waiting -= 1
        if errors := self.errors.get(route):
            raise errors.pop(0)


class GatedExecutor(Executor):
    """An executor before which a gate may be put."""

    gate: Gate | None = None

    def execute(self, job: Job, deadline: float | None = None) -> JobResult:
        if self.gate is not None:
            self.gate.enter(job)
        return super().execute(job, deadline)


def _route_of(job: Job) -> str:
    return f"{job.source.value}-{job.destination.value}" if isinstance(job, CopyJob) else type(job).__name__


class GatedOs(OsCalls):
    """Reads of a disk wait until the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.has_begun = threading.Event()

    def preadv(self, *arguments: Any) -> int:
        if not self.gate.is_set():
            self.has_begun.set()
            assert self.gate.wait(PATIENCE_S)
        return super().preadv(*arguments)


class Site:
    """Makes managers under one directory."""

    def __init__(self, directory: Path, backend: Backend) -> None:
        self.directory = directory
        self.backend = backend
        self.managers: list[BlockManager] = []
        self.gates: list[Gate] = []

    def __call__(
        self,
        *,
        device: int = 0,
        host: int = 0,
        disk: int = 0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        faults: FaultPlan | None = None,
        faulty: str = "disk",
        storages: Mapping[Tier, Storage] | None = None,
        **arguments: Any,
    ) -> Tiers:
        """Make a manager; with `faults` its disk (or host) tier goes wrong as they say."""
        tree: dict[str, dict[str, Any]] = {"model": {**MODEL, "fingerprint": "toy"}, "runtime": {"copy_threads": 1}}
        given: dict[Tier, Storage] = dict(storages or {})
        for tier, num_blocks in (("device", device), ("host", host), ("disk", disk)):
            if faults is not None and tier == faulty:
                given[Tier(tier)] = FaultyStorage(self.make_storage(tier, num_blocks), faults)
            elif num_blocks and Tier(tier) not in given:
                tree[tier] = {"num_blocks": num_blocks}
        if "disk" in tree:
            tree["disk"]["path"] = str(self.disk_path)
        for section, keys in (settings or {}).items():
            tree.setdefault(section, {}).update(keys)
        config = Config.from_dict(tree)
        manager = BlockManager(config, backend=self.backend, storages=given or None, **arguments)
        self.managers.append(manager)
        return Tiers(manager)

    def gate(self, tiers: Tiers, *routes: str) -> Gate:
        """Put a gate before a manager's executor, shut for these routes; opened when the test ends, at the latest."""
        gate = Gate()
        gate.shut(*routes)
        executor = tiers.manager._executor
        assert isinstance(executor, GatedExecutor)
        executor.gate = gate
        self.gates.append(gate)
        return gate

    @property
    def disk_path(self) -> Path:
        """A directory of its own for each manager."""
        return self.directory / f"disk{len(self.managers)}"

    def make_storage(self, tier: str, num_blocks: int, **arguments: Any) -> Storage:
        if tier == "disk":
            return DiskStorage(disk_layout(num_blocks), self.disk_path, **arguments)
        return HostStorage(disk_layout(num_blocks), backend=self.backend)


def open_files(directory: Path) -> list[str]:
    """Give the descriptors of this process that point under a directory; none where the system does not tell."""
    found = []
    for link in Path("/proc/self/fd").glob("*"):
        try:
            target = str(link.readlink())
        except OSError:  # of the listing itself
            continue
        if target.startswith(str(directory)):
            found.append(target)
    return found
