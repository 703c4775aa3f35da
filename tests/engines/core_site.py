"""An engine without a model around the connector's core: blocks, requests, steps, and bytes that say what they are."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.engines.groups import Group
from kvbm.engines.messages import decode_report, encode_orders
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.shared_host import HostShare, LeadingHost, follow
from kvbm.engines.shared_memory import name_of
from kvbm.engines.step_channel import StepChannels
from kvbm.engines.worker import StepNews, WorkerCore
from kvbm.executor import Executor
from kvbm.layout import BlockLayout
from kvbm.planner import Limits, Planner
from kvbm.pool import BlockPool
from kvbm.storage import DeviceStorage, HostStorage, Storage
from kvbm.storage.disk import DiskStorage
from kvbm.types import Tier

BLOCK_TOKENS = 4
MODEL: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": BLOCK_TOKENS, "inner_dim": 8, "dtype": "uint8"}
NBYTES = 2 * 2 * BLOCK_TOKENS * 8
POISON = 0xEE


def digests_of(tokens: list[int]) -> list[bytes]:
    """Name the full blocks of a prompt, each by all tokens up to its end."""
    found, digest = [], b"root"
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        digest = hashlib.sha256(digest + repr(tokens[end - BLOCK_TOKENS : end]).encode()).digest()
        found.append(digest)
    return found


def bytes_of(digest: bytes, rank: int) -> npt.NDArray[np.uint8]:
    """Give what a block holds on one rank: (nbytes,)."""
    return np.frombuffer(hashlib.shake_128(digest + bytes([rank])).digest(NBYTES), dtype=np.uint8)


@dataclass
class FakeRequest:
    """One request of the engine."""

    request_id: str
    tokens: list[int]
    slots: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_waiting: bool = False  # for its load
    promised: tuple[int, int] = (0, 0)  # first block, last block

    @property
    def digests(self) -> list[bytes]:
        return digests_of(self.tokens)


def _shared_hosts(num_ranks: int, num_blocks: int, backend: Backend) -> list[HostStorage]:
    """Make one host tier, and a view of it for each rank."""
    config = Config.from_dict({"model": MODEL, "host": {"num_blocks": num_blocks}})
    name = name_of("core site", os.getpid(), os.urandom(8))
    shares = [HostShare(name, rank, num_ranks) for rank in range(num_ranks)]
    leading = LeadingHost(config, shares[0], backend=backend)
    leading.give(b"")
    try:
        others = [follow(config, share, backend=backend)[0] for share in shares[1:]]
    finally:
        leading.close()
    return [leading.storage, *others]


class CoreSite:
    """Scheduler's half, a worker for each rank, and an engine that does what engines do with its blocks."""

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        *,
        num_slots: int = 24,
        host: int = 10,
        disk: int = 32,
        num_ranks: int = 1,
        is_shared: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.now = 0.0
        self.is_shared = is_shared
        hosts = _shared_hosts(num_ranks, host, backend) if is_shared else []
        self.ranks: list[dict[Tier, Storage]] = []
        for rank in range(num_ranks):
            self.ranks.append(
                {
                    Tier.DEVICE: DeviceStorage(
                        BlockLayout.layer_separate(num_blocks=num_slots, block_first=True, **MODEL), backend=backend
                    ),
                    Tier.HOST: hosts[rank]
                    if is_shared
                    else HostStorage(BlockLayout.fully_contiguous(num_blocks=host, **MODEL), backend=backend),
                }
            )
            if rank == 0 or not is_shared:
                self.ranks[rank][Tier.DISK] = DiskStorage(
                    BlockLayout.fully_contiguous(num_blocks=disk, **MODEL),
                    folder,
                    name=f"rank{rank}",
                    fingerprint="test",
                    backend=backend,
                )
        self.executors = [Executor(storages, backend=backend) for storages in self.ranks]
        self.workers = [
            WorkerCore([executor], rank=rank, following=[0] if is_shared and rank else [])
            for rank, executor in enumerate(self.executors)
        ]
        self.channels = StepChannels(num_ranks, is_shared=is_shared)
        self.pools = [
            BlockPool(host, name="host", tier=Tier.HOST, backend=backend),
            BlockPool(disk, name="disk", tier=Tier.DISK, backend=backend),
        ]
        self.planner = Planner(
            self.pools,
            self.channels.channels,
            recording_tiers=[Tier.DISK],
            foreign_tier=Tier.DEVICE,
            limits=limits or Limits(job_blocks=2, in_flight_share=1.0),
            clock=lambda: self.now,
        )
        self.core = SchedulerCore(
            [Group(self.planner, self.channels)], block_tokens=BLOCK_TOKENS, clock=lambda: self.now
        )
        self.free = list(range(num_slots))
        self.num_slots = num_slots
        self.requests: dict[str, FakeRequest] = {}
        self.held: dict[str, list[int]] = {}
        self._received: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._lost: set[int] = set()
        self.num_loaded = 0
        self.num_lost = 0
        self._give_back(list(self.free))

    # -- the engine's memory -----------------------------------------------------------------------------------

    def _give_back(self, slots: list[int]) -> None:
        """Free blocks; others write there at once."""
        ids = np.array(slots, dtype=np.int32)
        for storages in self.ranks:
            storages[Tier.DEVICE].write(ids, np.full((len(ids), NBYTES), POISON, dtype=np.uint8))
        self.free = sorted({*self.free, *slots})

    def _bytes_of(self, digest: bytes, rank: int) -> npt.NDArray[np.uint8]:
        return bytes_of(digest, 0 if self.is_shared else rank)

    def _compute(self, request: FakeRequest, first: int, last: int) -> None:
        """Fill blocks as a forward pass does."""
        for rank, storages in enumerate(self.ranks):
            ids = np.array(request.slots[first:last], dtype=np.int32)
            data = [self._bytes_of(digest, rank) for digest in request.digests[first:last]]
            if data:
                storages[Tier.DEVICE].write(ids, np.stack(data))

    def _see(self, request: FakeRequest, first: int, last: int) -> None:
        """See that blocks hold what they must, before a forward pass reads them."""
        for rank, storages in enumerate(self.ranks):
            data = storages[Tier.DEVICE].read(np.array(request.slots[first:last], dtype=np.int32))
            for got, digest in zip(data, request.digests[first:last], strict=True):
                assert np.array_equal(got, self._bytes_of(digest, rank)), f"wrong bytes for {request.request_id}"

    # -- what users do -----------------------------------------------------------------------------------------

    def add(self, request_id: str, tokens: list[int]) -> None:
        """Take a request in."""
        self.requests[request_id] = FakeRequest(request_id, tokens)

    def abort(self, request_id: str) -> None:
        """End a request, wherever it is."""
        request = self.requests.pop(request_id)
        is_held = self.core.finished(request_id)
        assert not self.core.finished(request_id), "said twice"
        if is_held or request.is_waiting:
            self.held[request_id] = request.slots
        else:
            self._give_back(request.slots)

    def preempt(self, request_id: str) -> None:
        """Take a running request's blocks away; the next step's fence comes before they are overwritten."""
        request = self.requests[request_id]
        if request.is_waiting or not request.slots:
            return
        self.core.preempted(request_id)
        slots, request.slots, request.num_computed = request.slots, [], 0
        self.step(before=lambda: self._give_back(slots), may_compute=False)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, before: Any = None, *, may_compute: bool = True, num_blocks: int = 2) -> None:
        """Schedule what can be, run it, report, end what is done."""
        running: list[tuple[FakeRequest, int, int]] = []
        for request in list(self.requests.values()) if may_compute else []:
            if request.is_waiting:
                continue
            if not request.slots and not self._admit(request):
                continue
            if request.is_waiting:
                continue
            first, last = request.num_computed, min(request.num_computed + num_blocks, len(request.digests))
            self._see(request, 0, first)
            self.core.computed(request.request_id, request.digests, [request.slots], num_tokens=last * BLOCK_TOKENS)
            running.append((request, first, last))
        orders = encode_orders(self.core.orders())
        for worker in self.workers:
            worker.begin(orders)
        if before is not None:
            before()
        for request, first, last in running:
            self._compute(request, first, last)
            request.num_computed = last
        for worker in self.workers:
            worker.after_forward()
        self._collect([worker.take() for worker in self.workers])
        for request, _, last in running:
            if last == len(request.digests) and request.request_id in self.requests:
                self.abort(request.request_id)

    def _admit(self, request: FakeRequest) -> bool:
        digests = request.digests
        found = -1
        for _ in range(3):
            num_tokens, is_async = self.core.matched_tokens(
                request.request_id, digests, num_tokens=len(request.tokens), num_computed_tokens=0
            )
            assert found in (-1, num_tokens), "asked again it says the same"
            found = num_tokens
            assert is_async == (num_tokens > 0)
        assert num_tokens < len(request.tokens)
        if len(self.free) < len(digests):
            return False
        request.slots, self.free = self.free[: len(digests)], self.free[len(digests) :]
        self.core.allocated(request.request_id, [request.slots], num_computed_tokens=0, num_external_tokens=num_tokens)
        if num_tokens:
            request.is_waiting = True
            request.promised = 0, num_tokens // BLOCK_TOKENS
        return True

    def _collect(self, news: list[StepNews]) -> None:
        for one in news:
            self.core.reported(decode_report(one.report))
        lost = set().union(*(one.lost_slots for one in news))
        for counts, field_name in ((self._received, "received"), (self._sent, "sent")):
            for one in news:
                for request_id in getattr(one, field_name):
                    counts[request_id] = counts.get(request_id, 0) + 1
        self._lost |= lost
        received = [request_id for request_id, n in self._received.items() if n == len(self.ranks)]
        sent = [request_id for request_id, n in self._sent.items() if n == len(self.ranks)]
        self.core.received(received)
        self.core.sent(sent)
        for request_id in received:
            del self._received[request_id]
            request = self.requests.get(request_id)
            if request is None:
                slots = self.held.pop(request_id)
                self._lost -= set(slots)
                self._give_back(slots)
                continue
            request.is_waiting = False
            first, last = request.promised
            bad = [i for i in range(first, last) if request.slots[i] in self._lost]
            self._lost -= set(request.slots)
            self.num_lost += len(bad)
            request.num_computed = min(bad, default=last)
            self.num_loaded += request.num_computed - first
            self._see(request, first, request.num_computed)
        for request_id in sent:
            del self._sent[request_id]
            self._give_back(self.held.pop(request_id))
        if not received and not sent and self.core.has_work:
            for worker in self.workers:
                with worker._has_ended:
                    worker._has_ended.wait_for(lambda worker=worker: any(worker._results) or not worker._open, 60.0)

    def run(self, max_steps: int = 500) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.requests and not self.held and not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def calm(self) -> None:
        """See that nothing is left: no request, no held block, no leaked slot."""
        assert self.core.num_requests == 0
        assert sorted(self.free) == list(range(self.num_slots))
        for pool in self.pools:
            pool.check()
            assert pool.status().active == pool.status().mutable == pool.status().complete == 0, pool.name

    def close(self) -> None:
        """End threads and files."""
        for worker in self.workers:
            assert worker.close(60.0)
        self.planner.close(0.0)
        for executor, storages in zip(self.executors, self.ranks, strict=True):
            executor.close()
            for storage in storages.values():
                storage.close()
