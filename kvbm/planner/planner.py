"""Planner: the half that decides. It sees pools, hashes and slots, and speaks to the bytes only in jobs.

It takes registered blocks out of the pools' outboxes and offloads them, finds hits over all tiers, and onboards them.
One lock guards its books (the dispatcher's); it is taken before any pool's, and never held while a job is sent or a
callback runs. Nothing here waits for bytes except `flush`, `close` and `reset_pool`. `pump` does what there is to do; a
thread calls it when something was registered, or a test does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from kvbm.blocks import ImmutableBlocks
from kvbm.errors import ConfigError, PoolClosed
from kvbm.events import Migrations
from kvbm.jobs import CopyJob, Job, JobChannel, Outcome, Transfer
from kvbm.jobs.messages import tiers_of
from kvbm.planner.advice import Advisor
from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.dispatch import Dispatcher, Settle, Unsent, run_all
from kvbm.planner.emit import Emitter
from kvbm.planner.estimates import Estimates
from kvbm.planner.expiry import Expiry
from kvbm.planner.flush import Flusher
from kvbm.planner.foreign import ForeignTier
from kvbm.planner.forgetting import Forgetter
from kvbm.planner.hit import Hit, find_hit, find_sources, first_true
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.lineage import Lineages
from kvbm.planner.loading import Loader
from kvbm.planner.pins import Pins
from kvbm.planner.policies import OffloadPolicy
from kvbm.planner.prefetch import Prefetch
from kvbm.planner.presence import Presence
from kvbm.planner.records import RecordKeeper
from kvbm.planner.restore import restore_tiers
from kvbm.planner.routes import make_routes
from kvbm.planner.touches import Touches, tell
from kvbm.pool import BlockPool
from kvbm.types import HashArray, ResetBlocksResponse, Tier, hash_array

_log = logging.getLogger("kvbm.planner")


class Planner:
    """Decides what moves between pools.

    Parameters
    ----------
    pools : sequence of BlockPool
        From the top tier down; each tier once.
    channels : sequence of JobChannel
        One for each rank; a block is good when all ranks say so. Empty when there is one pool.
    policies : sequence of OffloadPolicy, optional
        One for each pair of neighbouring pools; default: write-through.
    recording_tiers : iterable of Tier
        Tiers whose executor keeps records that outlive the process: it is told of recency and of what to forget.
    keyed_tiers : iterable of Tier
        Tiers without slots, whose pool is what is known of them; see `Presence`.
    ttls_s : mapping of Tier to float, optional
        Seconds after which a block that nobody uses leaves a tier; a tier that is not named keeps its blocks.
    foreign_tier : Tier, optional
        Memory above the top pool whose slots an engine owns.
    limits : Limits, optional
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    foreign : ForeignTier or None
    forgetter : Forgetter
    migrations : Migrations
        Told of what is stored in another tier.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        channels: Sequence[JobChannel] = (),
        *,
        policies: Sequence[OffloadPolicy] | None = None,
        recording_tiers: Iterable[Tier] = (),
        keyed_tiers: Iterable[Tier] = (),
        ttls_s: Mapping[Tier, float] | None = None,
        foreign_tier: Tier | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (len(pools) > 1 or foreign_tier is not None) and not channels:
            num_tiers = len(pools) + (foreign_tier is not None)
            raise ConfigError(f"a planner over {num_tiers} tiers needs a channel to each rank's executor, got none")
        self.pools = tuple(pools)
        self.limits = limits or Limits()
        self._clock = clock
        self._complaints = Complaints(clock)
        self._dispatcher = Dispatcher(
            channels, clock=clock, settling=self._settling, losing=self._losing, settled=self._poke
        )
        self._locked, self._changed = self._dispatcher.locked, self._dispatcher.changed
        self._ledger = self._dispatcher.ledger
        keyed = frozenset(keyed_tiers)
        self.records = RecordKeeper(
            recording_tiers,
            keyed_tiers=keyed,
            next_id=self._ledger.next_id,
            submit=self._submit,
            timeout_s=self.limits.offload_timeout_s,
            clock=clock,
        )
        self.presences = tuple(
            Presence(pool, limits=self.limits, next_id=self._ledger.next_id, submit=self._submit, clock=clock)
            for pool in self.pools
            if pool.tier in keyed
        )
        self._statistics = PlannerStatistics()
        self._counting = threading.Lock()  # guards hits and misses, so that a look-up never waits for a pump
        self.migrations = Migrations(self._locked)
        self._wake: Callable[[], None] | None = None
        self._is_closed = self._are_pools_closed = False
        self._lineages = Lineages(self.limits.lineage_blocks)
        moving: dict[str, Any] = {
            "limits": self.limits,
            "statistics": self._statistics,
            "next_id": self._ledger.next_id,
            "moved": self.migrations.moved,
            "complaints": self._complaints,
        }
        self._routes, counting = make_routes(
            self.pools, policies, lineages=self._lineages, records=self.records, **moving
        )
        self._touches = Touches(
            pools[1:],
            counting,
            lineages=self._lineages,
            dispatcher=self._dispatcher,
            max_calls=self.limits.touch_calls,
        )
        self.estimates = Estimates(pools[0].tier, clock=clock)
        shared: dict[str, Any] = {"need_open": self._need_open, "poke": self._poke, "clock": clock}
        presence = next(iter(self.presences), None)
        self.loader = Loader(self.usable_pools, dispatcher=self._dispatcher, presence=presence, **moving, **shared)
        self.advisor = Advisor(
            self.estimates,
            self.loader,
            top=pools[0].tier,
            job_blocks=self.limits.job_blocks,
            clock=clock,
            foreign=foreign_tier,
        )
        self.foreign: ForeignTier | None = None
        if foreign_tier is not None:
            parts = moving | {"dispatcher": self._dispatcher, "need_open": self._need_open, "clock": clock}
            self.foreign = ForeignTier(pools[0], tier=foreign_tier, **parts)
        self.pins = Pins(self.pools, share=self.limits.pin_share, locked=self._locked, **shared)
        self.forgetter = Forgetter(
            self.pools,
            self._routes,
            foreign=self.foreign,
            loader=self.loader,
            pins=self.pins,
            records=self.records,
            dispatcher=self._dispatcher,
        )
        self._expiry = Expiry(self.pools, ttls_s or {}, statistics=self._statistics, records=self.records, clock=clock)
        self._flusher = Flusher(self._dispatcher, self._routes, pump=self.pump, need_open=self._need_open, clock=clock)
        self._emitter = Emitter(
            self._dispatcher,
            statistics=self._statistics,
            presences=self.presences,
            timeout_s=self.limits.offload_timeout_s,
            is_closed=lambda: self._is_closed,
            pauses=foreign_tier is None,  # an engine's scheduler is one thread
        )
        self._dispatcher.start()

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call this when there is something to pump, from whichever thread learns of it."""
        self._wake = wake
        for pool in self.pools[:-1]:
            pool.add_listener(wake)

    # -- requests ----------------------------------------------------------------------------------------------

    def match(self, hashes: HashArray, *, asks: bool = True) -> Hit:
        """Hold the longest prefix of a sequence that lies in any tier; `asks` stores for what follows, for others."""
        names = hash_array(hashes)
        hit = find_hit(self.usable_pools(), names)
        with self._counting:
            for tier, num_blocks in hit.tiers.items():
                self._statistics.hits[tier] += num_blocks
            self._statistics.misses += len(names) - len(hit)
        if self._routes and len(hit) and self._touches.note(hit.hashes):
            self._poke()
        if asks and self.presences and len(hit) < len(names):
            for presence in self.presences:
                presence.want(names, len(hit))
            self._poke()
        return hit

    def lookup(self, hashes: HashArray) -> int:
        """Count the leading blocks that lie in any tier; holds nothing and changes no recency."""
        where, _ = find_sources(self.usable_pools(), hash_array(hashes))
        return first_true(where < 0)

    def restore(self) -> None:
        """Register what outlived the process; see `restore_tiers`."""
        restore_tiers(self.pools[1:], self.records, self._routes, self.presences, locked=self._locked)

    def onboard(self, hit: Hit, timeout_s: float | None = None) -> Transfer[ImmutableBlocks]:
        """Bring the blocks of a hit into the top tier; see `BlockManager.onboard`."""
        return self.loader.onboard(hit, timeout_s)

    def prefetch(self, hashes: HashArray, timeout_s: float | None = None) -> Prefetch:
        """Bring blocks up in the background; see `BlockManager.prefetch`."""
        return self.loader.prefetch(hashes, timeout_s)

    def prioritise(self, hashes: HashArray, priority: int) -> int:
        """Set how long blocks are kept, in every tier; return how many the top tier has."""
        names = hash_array(hashes)
        found = [pool.set_priority(names, priority) for pool in self.pools]
        with self._locked():
            for route in self._routes:
                route.prioritised(names)
        for pool in self.pools[1:]:
            self.records.touch(pool, [names])
        self._poke()
        return found[0]

    # -- moving ------------------------------------------------------------------------------------------------

    def pump(self) -> bool:
        """Do what there is to do now; return whether there was anything.

        The lock is held for one job, or a thousand registrations, at a time.
        """
        try:
            with self._locked():
                if self._is_closed:
                    return False
                overdue = self._note_overdue()
                expired = self.loader.expired(self._clock())
            self._dispatcher.revoke(overdue)
            for onboarding in expired:
                onboarding.transfer.done()  # looks at its deadline, for a waiter that only asked to be called back
            self.pins.expire()
            has_news = self._expiry.step()
            touched = self._touches.spread()
            self.forgetter.step()
            num_jobs = sum(self._emitter.send(route) for route in self._routes)
            num_jobs += sum(presence.step() for presence in self.presences)
            for route in self._routes:
                with self._locked():
                    has_news |= route.collect()
                num_jobs += self._emitter.send(route)
            tell(self.records, self._routes, touched)
        except PoolClosed:
            if not self._is_closed:
                raise
            return False
        return has_news or num_jobs > 0

    def seconds_to_deadline(self) -> float | None:
        """How long until the time of an open job or of its waiter is over; None without one."""
        with self._locked():
            if self._is_closed:
                return None
            moments = [self._ledger.next_due_at(), self.loader.next_deadline(), self.pins.next_end()]
        moments += [self._expiry.next_look(), *(presence.next_look() for presence in self.presences)]
        due_at = min((moment for moment in moments if moment is not None), default=None)
        self.loader.looks_at = math.inf if due_at is None else due_at
        return None if due_at is None else max(0.0, due_at - self._clock())

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything that was registered before has gone as far down as it goes; see `Flusher.flush`."""
        self._flusher.flush(timeout_s)

    def reset_pool(self, pool: BlockPool, timeout_s: float | None = None) -> int:
        """Forget every block of a pool, offloads in flight waited for; see `BlockManager.reset_pool`."""
        self.pins.refuse_reset(pool)
        with self._flusher.calm(pool, timeout_s):
            return self.records.reset_pool(pool)

    def reset_blocks(self, pool: BlockPool, hashes: HashArray) -> ResetBlocksResponse:
        """Forget blocks of a pool, and those on their way to it; those in use stay."""
        names = hash_array(hashes)
        with self._locked():
            for route in self._routes:
                if route.destination is pool:
                    route.collect(everything=True)
                    route.forget(names)
        if pool.tier in self.records.tiers:  # what moves would leave a record behind
            self._flusher.wait_until_landed(pool, names, self.limits.offload_timeout_s)
        return self.records.reset_blocks(pool, names)

    def close(self, timeout_s: float | None = None) -> bool:
        """Drop what waits, end every transfer, wait for what moves, close the pools; return whether it ended in time.

        What is answered later is let go of. Called again, it waits again.
        """
        with contextlib.suppress(PoolClosed):  # closed before
            tell(self.records, self._routes, self._touches.spread(), is_last=True)
        with self._locked():
            self._is_closed = True
            for route in self._routes:
                route.close()
            error = PoolClosed("the manager was closed while blocks were on their way")
            ends: list[After] = self.loader.end_all(error)
            ends += self.foreign.end_all(error) if self.foreign is not None else []
            ends.append(partial(self.records.close, error))
            self._changed.notify_all()
        run_all(ends)
        self.pins.unpin()
        are_ended = self._dispatcher.close(timeout_s)
        if not are_ended:
            _log.warning("close: executors still work num_jobs=%d; what they write into stays held", len(self._ledger))
        with self._locked():
            self._are_pools_closed = True
            for pool in self.pools:
                pool.close()
        return are_ended

    # -- looking -----------------------------------------------------------------------------------------------

    def statistics(self) -> PlannerStatistics:
        """Give the counts of this moment."""
        with self._locked():
            overdue = self._note_overdue()
            with self._counting:
                counts = self._statistics.copy()
            counts.restored.update(self.records.restored)
        self._dispatcher.revoke(overdue)
        return counts

    @property
    def num_open_jobs(self) -> int:
        """Jobs that were sent and are not settled."""
        return len(self._ledger)

    # -- private -----------------------------------------------------------------------------------------------

    def usable_pools(self) -> Sequence[BlockPool]:
        """Give the pools of tiers that can be reached, from the top down."""
        if self._statistics.lost_executors:
            return self.pools[:1]
        shut = self.records.shut
        away = [presence.pool for presence in self.presences if presence.is_away or presence.tier in shut]
        return [pool for pool in self.pools if pool not in away] if away else self.pools

    def _need_open(self) -> None:
        if self._is_closed:
            raise PoolClosed("the manager is closed")

    def _poke(self) -> None:
        if self._wake is not None:
            self._wake()

    def _submit(self, jobs: Sequence[tuple[Job, Settle]]) -> None:
        unsent: Unsent = deque()
        with self._locked():
            for job, settle in jobs:
                self._dispatcher.open(job, settle, self.limits.offload_timeout_s, unsent)
        self._dispatcher.send(unsent)

    def _losing(self, rank: int, reason: str) -> None:
        if not self._is_closed:
            _log.error("executor lost rank=%d reason=%s", rank, reason)
            self._statistics.lost_executors += 1

    def _settling(self, entry: OpenJob) -> None:
        job = entry.job
        entry.is_too_late = self._are_pools_closed
        for presence in self.presences:
            if presence.tier in tiers_of(job):
                presence.answered(entry.results.values())
        self.estimates.observe(entry)
        if isinstance(job, CopyJob):
            if entry.is_draining:
                self._statistics.route(job.source, job.destination).draining -= len(job.hashes)
            if not entry.is_whole and (num_corrupt := int((entry.outcomes == Outcome.CORRUPT).sum())):
                self._statistics.mismatches[job.source.value] += num_corrupt

    def _note_overdue(self) -> list[Job]:
        overdue = self._ledger.overdue(self._clock())
        for entry in overdue:
            if isinstance(entry.job, CopyJob):
                self._statistics.route(entry.job.source, entry.job.destination).draining += len(entry.job.hashes)
            level = self._complaints.level("job overdue")
            _log.log(level, "job overdue job_id=%d kind=%s", entry.job.job_id, type(entry.job).__name__)
        return [entry.job for entry in overdue]
