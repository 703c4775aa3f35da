"""A planner over three tiers, driven one step at a time by a schedule, with every byte checked.

A schedule is a list of (operation, number): requests that match, onboard, fill, register and release; jobs that are
executed in any order, late, or badly; pins and prefetches; time that passes, after which blocks leave; bits that flip;
ranks that disagree or die. Whatever it does: a request never sees a wrong byte, and in the end nothing is held, nothing
waits and every pool keeps its invariants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.blocks import ImmutableBlocks
from kvbm.errors import BlockStateError, NotEnoughBlocksAvailable, PoolClosed, TransferCancelled, TransferTimeout
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Outcome, Transfer
from kvbm.layout import BlockLayout
from kvbm.planner import Limits, OffloadPolicy, Planner, Prefetch
from kvbm.pool import BlockPool
from kvbm.storage import DeviceStorage, HostStorage
from kvbm.storage.base import Storage
from kvbm.testing.channels import SteppedChannel, SteppedClock
from kvbm.testing.faults import FaultPlan, FaultyStorage
from kvbm.types import HashArray, SequenceHash, Tier

NUM_BLOCKS = {Tier.DEVICE: 6, Tier.HOST: 9, Tier.DISK: 12}
TIMEOUT_S = 30.0
TTLS_S = {Tier.HOST: 50.0, Tier.DISK: 90.0}
OPERATIONS = (
    "nothing", "request", "request", "request", "request", "finish", "finish", "release", "release", "serve", "serve",
    "twins", "pump", "step", "step", "step", "settle", "settle", "evict", "evict",
    "fail", "garble", "late", "pass_time", "cancel", "flip", "flip", "reset_blocks", "reset_pool", "prioritise",
    "peek", "abandon", "lose", "pin", "unpin", "prefetch", "expect", "expect", "cancel_prefetch",
)  # fmt: skip

Schedule = list[tuple[str, int]]


@dataclass(eq=False)
class _Request:
    """One running request."""

    hashes: HashArray
    transfer: Transfer[ImmutableBlocks]
    blocks: list[ImmutableBlocks] = field(default_factory=list)


class TierSchedules:
    """Runs schedules; subclass it to prove other storages or policies, and override the ``make_`` methods.

    Parameters
    ----------
    backend : Backend
    num_ranks : int
        Executors, each with its own bytes.

    Examples
    --------
    >>> from kvbm._backend import default_backend
    >>> schedule = [("request", 3), ("finish", 0), ("pump", 0), ("step", 0), ("release", 0)]
    >>> TierSchedules(default_backend()).run(schedule)
    """

    def __init__(self, backend: Backend, *, num_ranks: int = 1) -> None:
        self.backend = backend
        self.clock = SteppedClock()
        self.ranks = [self.make_storages() for _ in range(num_ranks)]
        self.executors = [
            Executor(storages, copy_threads=1, staging_blocks=2, backend=backend) for storages in self.ranks
        ]
        self.channels = [SteppedChannel(executor.execute) for executor in self.executors]
        tiers = list(self.ranks[0])
        self.pools = [BlockPool(NUM_BLOCKS[tier], name=tier.value, tier=tier, backend=backend) for tier in tiers]
        self.planner = Planner(
            self.pools,
            self.channels,
            policies=self.make_policies(),
            limits=Limits(queue_blocks=6, job_blocks=3, in_flight_share=0.5, onboard_timeout_s=TIMEOUT_S),
            ttls_s=TTLS_S,
            clock=self.clock,
        )
        self.prefetches: list[Prefetch] = []
        self.loading: list[_Request] = []
        self.held: list[_Request] = []
        self.top = self.ranks[0][tiers[0]].layout.block_nbytes

    def make_storages(self) -> dict[Tier, Storage]:
        """Give the storages of one rank; the last has no addresses, as a disk."""
        dims: dict[str, Any] = {
            "num_layers": 2, "outer_dim": 2, "block_size": 2, "inner_dim": 4, "dtype": "uint8"
        }  # fmt: skip
        device = BlockLayout.layer_separate(num_blocks=NUM_BLOCKS[Tier.DEVICE], block_first=False, **dims)
        host = BlockLayout.fully_contiguous(num_blocks=NUM_BLOCKS[Tier.HOST], **dims)
        disk = BlockLayout.fully_contiguous(num_blocks=NUM_BLOCKS[Tier.DISK], **dims)
        return {
            Tier.DEVICE: DeviceStorage(device, backend=self.backend, num_threads=1),
            Tier.HOST: HostStorage(host, backend=self.backend, num_threads=1),
            Tier.DISK: FaultyStorage(HostStorage(disk, backend=self.backend, num_threads=1), FaultPlan()),
        }

    def make_policies(self) -> list[OffloadPolicy] | None:
        """Give one policy a route; None is write-through."""
        return None

    def run(self, schedule: Schedule) -> None:
        """Do what a schedule says, then end in one of two ways and check that nothing is left.

        Raises
        ------
        AssertionError
            A wrong byte, a leaked block, or a broken invariant.
        """
        for operation, number in schedule:
            getattr(self, f"do_{operation}")(number)
            for pool in self.pools:
                pool.check()
        if len(schedule) % 2:
            self.close_first()
        else:
            self.drain_first()
        transfers: list[Transfer[Any]] = [request.transfer for request in [*self.loading, *self.held]]
        for transfer in [*transfers, *self.prefetches]:
            assert transfer.done()
            assert not transfer.is_draining
        for pool in self.pools:
            pool.check()
            status = pool.status()
            assert (status.mutable, status.complete, status.active) == (0, 0, 0), f"leaked: {status}"
        assert self.planner.num_open_jobs == 0

    # -- ends --------------------------------------------------------------------------------------------------

    def drain_first(self) -> None:
        """Let everything end, release all, and see that what is cached is right."""
        self.do_settle(0)
        for _ in range(len(self.loading)):
            self.do_finish(0)
        while self.held:
            self.do_release(0)
        self.planner.pins.unpin()
        self.do_settle(0)
        statistics = self.planner.statistics()
        for counters in statistics.routes.values():
            assert (counters.queued, counters.in_flight, counters.draining) == (0, 0, 0), statistics
        for family in range(8):
            self.do_serve(family + 32)
        self.planner.close(0)
        for channel in self.channels:
            channel.step_all()

    def close_first(self) -> None:
        """Close while jobs are open; they are answered afterwards."""
        self.planner.close(0)
        for request in self.loading:
            assert request.transfer.done(), "closing ends every transfer"
            assert request.transfer.cancelled() or isinstance(request.transfer.exception(0), (PoolClosed, type(None)))
            if not request.transfer.cancelled() and request.transfer.exception(0) is None:
                request.transfer.result(0).release()
        for channel in self.channels:
            channel.step_all()
        for request in self.held:
            for blocks in request.blocks:
                blocks.release()

    # -- requests ----------------------------------------------------------------------------------------------

    def do_request(self, number: int) -> None:
        """Match a chain and onboard what was found."""
        hashes = chain_of(number % 8, 1 + number // 8 % 5)
        num_found = self.planner.lookup(hashes)
        hit = self.planner.match(hashes)
        assert len(hit) == num_found, "nobody else is here"
        try:
            transfer = self.planner.onboard(hit)
        except NotEnoughBlocksAvailable:
            assert sum(hit.tiers.values()) == len(hit), "nothing was taken from the hit"
            hit.release()
            return
        self.loading.append(_Request(hashes, transfer))

    def do_finish(self, number: int) -> None:
        """Take what an onboarding brought, compute the rest, and register it."""
        request = _pick(self.loading, number)
        if request is None or not request.transfer.done():
            return
        self.loading.remove(request)
        try:
            blocks = request.transfer.result(0)
        except TransferCancelled:
            return
        self.verify(blocks)
        assert np.array_equal(blocks.hashes, request.hashes[: len(blocks)]), "the leading blocks, in order"
        fresh = self.pools[0].try_allocate_blocks(len(request.hashes) - len(blocks))
        if fresh is not None:
            rest = request.hashes[len(blocks) :]
            self.fill(fresh.block_ids, rest)
            parent = SequenceHash(request.hashes[len(blocks) - 1].tobytes()) if len(blocks) else None
            blocks = blocks + self.pools[0].register_blocks(fresh.complete(rest, parent=parent))
        request.blocks.append(blocks)
        self.held.append(request)

    def do_release(self, number: int) -> None:
        """Look at a request's bytes a last time and release it."""
        request = _pick(self.held, number)
        if request is not None:
            self.held.remove(request)
            for blocks in request.blocks:
                self.verify(blocks)
                blocks.release()

    def do_cancel(self, number: int) -> None:
        """Cancel an onboarding."""
        request = _pick(self.loading, number)
        if request is not None:
            request.transfer.cancel()

    def do_abandon(self, number: int) -> None:
        """Forget a request without releasing anything; the garbage collector does."""
        request = _pick(self.loading, number)
        if request is not None:
            self.loading.remove(request)

    def do_nothing(self, number: int) -> None:
        """Pause; what a schedule shrinks to."""

    def do_peek(self, number: int) -> None:
        """Match and let go."""
        self.planner.match(chain_of(number % 8, 5)).release()

    def do_serve(self, number: int) -> None:
        """Do a whole request at once, if its blocks arrive at once."""
        self.do_request(number)
        self.do_settle(0)
        self.do_finish(len(self.loading) - 1)
        self.do_release(len(self.held) - 1)

    def do_twins(self, number: int) -> None:
        """Let two requests want the same blocks at once, long after their first use."""
        self.do_settle(0)
        self.do_evict(5)
        self.do_request(number)
        self.do_request(number)

    def do_evict(self, number: int) -> None:
        """Make room in the top tier, so that lower ones are read."""
        blocks = self.pools[0].try_allocate_blocks(1 + number % NUM_BLOCKS[Tier.DEVICE])
        if blocks is not None:
            blocks.release()

    # -- what is expected, and what is kept -----------------------------------------------------------------------

    def do_prefetch(self, number: int) -> None:
        """Stage a chain below the top."""
        prefetch = self.planner.loader.prefetch(chain_of(number % 8, 5), TIMEOUT_S)
        assert prefetch.accepted + prefetch.clipped + prefetch.rejected == 5
        self.prefetches.append(prefetch)

    def do_expect(self, number: int) -> None:
        """Prefetch a chain that lies on disk alone, and let a request come before it is there."""
        self.do_settle(0)
        self.do_evict(5)
        self.planner.reset_blocks(self.pools[1], chain_of(number % 8, 5))
        self.do_prefetch(number)
        self.do_request(number)

    def do_cancel_prefetch(self, number: int) -> None:
        """Cancel a prefetch, or look at what it brought."""
        if self.prefetches:
            prefetch = self.prefetches[number % len(self.prefetches)]
            if not prefetch.cancel() and not prefetch.cancelled():
                assert 0 <= prefetch.result(0) <= prefetch.accepted

    def do_pin(self, number: int) -> None:
        """Pin a chain for a while."""
        hashes = chain_of(number % 8, 5)
        num_pinned = self.planner.pins.pin(hashes, 1 + number)
        assert 0 <= num_pinned <= 5
        if num_pinned == 5:
            self.do_evict(NUM_BLOCKS[Tier.DEVICE] - 1)
            assert self.planner.lookup(hashes) == 5 or self.planner.statistics().lost_executors

    def do_unpin(self, number: int) -> None:
        """Let go of a pinned chain."""
        self.planner.pins.unpin(chain_of(number % 8, 5))

    # -- jobs --------------------------------------------------------------------------------------------------

    def do_pump(self, number: int) -> None:
        """Let the planner do what there is to do."""
        self.planner.pump()

    def do_settle(self, number: int) -> None:
        """Let everything that waits be done."""
        while self.planner.pump() or any(channel.step_all() for channel in self.channels):
            pass

    def do_step(self, number: int) -> None:
        """Execute one of the waiting jobs of one rank, whatever the time."""
        channel = self.channels[number % len(self.channels)]
        if channel.waiting:
            channel.step(number % len(channel.waiting))

    def do_fail(self, number: int) -> None:
        """Answer a job as failed or corrupt without moving a byte."""
        self._answer(number, Outcome.FAILED if number % 3 else Outcome.CORRUPT)

    def do_late(self, number: int) -> None:
        """Answer a job as late."""
        self._answer(number, Outcome.LATE)

    def do_garble(self, number: int) -> None:
        """Tear a job: its destination is full of garbage, and the answer says so."""
        channel = self.channels[number % len(self.channels)]
        if channel.waiting and isinstance(job := channel.waiting[number % len(channel.waiting)], CopyJob):
            storage = self.ranks[number % len(self.ranks)][job.destination]
            garbage = np.full((len(job.hashes), storage.layout.block_nbytes), 0xEE, dtype=np.uint8)
            storage.write(job.destination_ids, garbage)
            self._answer(number, Outcome.FAILED)

    def do_pass_time(self, number: int) -> None:
        """Let time pass; the planner looks at it."""
        self.clock.advance(number % 64)
        self.planner.pump()

    def do_lose(self, number: int) -> None:
        """Lose a rank, seldom."""
        if number == 77:
            self.channels[-1].die()

    def _answer(self, number: int, outcome: Outcome) -> None:
        channel = self.channels[number % len(self.channels)]
        if channel.waiting:
            channel.answer(number % len(channel.waiting), outcome)

    # -- what else happens -------------------------------------------------------------------------------------

    def do_flip(self, number: int) -> None:
        """Turn one bit in a lower tier of one rank."""
        storage = list(self.ranks[number % len(self.ranks)].values())[1 + number % 2]
        memory = storage.storage if isinstance(storage, FaultyStorage) else storage
        assert isinstance(memory, HostStorage)
        place = number * 131 % memory.buffers[0].size
        memory.buffers[0][place] ^= 1 << number % 8

    def do_reset_blocks(self, number: int) -> None:
        """Forget blocks of one tier by hash."""
        pool = self.pools[number % len(self.pools)]
        self.planner.reset_blocks(pool, chain_of(number // 3 % 8, 5))

    def do_reset_pool(self, number: int) -> None:
        """Forget a whole tier, unless it is in use."""
        pool = self.pools[number % len(self.pools)]
        try:
            self.planner.reset_pool(pool, timeout_s=0)
        except TransferTimeout:
            assert self.planner.num_open_jobs
        except BlockStateError:
            assert pool.status().active + pool.status().mutable > 0

    def do_prioritise(self, number: int) -> None:
        """Keep a chain longer, or less long."""
        self.planner.prioritise(chain_of(number % 8, 5), number % 101)

    # -- bytes -------------------------------------------------------------------------------------------------

    def fill(self, ids: Any, hashes: HashArray) -> None:
        """Write what blocks must hold, on every rank."""
        for rank, storages in enumerate(self.ranks):
            storages[self.pools[0].tier].write(ids, content_of(hashes, rank, self.top))

    def verify(self, blocks: ImmutableBlocks) -> None:
        """Compare the bytes of blocks in the top tier, on every rank."""
        for rank, storages in enumerate(self.ranks):
            found = storages[self.pools[0].tier].read(blocks.block_ids)
            assert np.array_equal(found, content_of(blocks.hashes, rank, self.top)), f"wrong bytes on rank {rank}"


def chain_of(family: int, num_blocks: int) -> HashArray:
    """Hashes of one of eight chains: all begin alike, and pairs of them share another block."""
    names = [(0, 0), (family // 2, 1), *((family, i) for i in range(2, num_blocks))][:num_blocks]
    return np.array([[1 + a, 100 + b] for a, b in names], dtype=np.uint64)


def content_of(hashes: HashArray, rank: int, nbytes: int) -> Any:
    """Bytes that tell block, place and rank: (num_blocks, nbytes) uint8."""
    words = hashes[:, :1] * np.uint64(31) + hashes[:, 1:] * np.uint64(7) + np.uint64(rank * 3)
    return (words + np.arange(nbytes, dtype=np.uint64) * np.uint64(5)).astype(np.uint8)


def _pick(requests: list[_Request], number: int) -> _Request | None:
    return requests[number % len(requests)] if requests else None
