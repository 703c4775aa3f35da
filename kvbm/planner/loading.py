"""Everything that goes up: onboardings into the top tier, and prefetches into the tier where blocks are staged.

That is the host tier, or the top tier where there is none. Prefetches give way: their jobs are not urgent, and those
that no executor has begun are taken back when a request wants one of their blocks. The planner's lock guards it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvbm.blocks import ImmutableBlocks
from kvbm.errors import BlockStateError, NotEnoughBlocksAvailable
from kvbm.jobs import CopyJob, Transfer
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.dispatch import Dispatcher, Unsent, run_all
from kvbm.planner.hit import Hit, HitPart, find_sources
from kvbm.planner.ledger import After
from kvbm.planner.limits import Limits
from kvbm.planner.onboard import Onboarder
from kvbm.planner.onboarding import Onboarding
from kvbm.planner.prefetch import Prefetch, Relay, Staging
from kvbm.planner.presence import Presence
from kvbm.planner.queue import keys_of
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Places, Tier, hash_array

_FAR_S = 1.0  # before a deadline: longer than a copy of one job takes


class Loader:
    """Brings blocks up.

    Parameters
    ----------
    pools : callable
        Gives the pools that can be used, from the top tier down.
    limits : Limits
    dispatcher : Dispatcher
    need_open : callable
        Raises `PoolClosed` once the planner is closed.
    poke : callable
        Wakes whoever pumps.
    clock : callable
        Gives seconds; monotonic.
    presence : Presence, optional
        Of the tier that a prefetch asks for what no tier is known to have.
    **parts
        What each `Onboarder` needs besides.

    Attributes
    ----------
    looks_at : float
        When whoever pumps will do so at the latest.
    """

    def __init__(
        self,
        pools: Callable[[], Sequence[BlockPool]],
        *,
        limits: Limits,
        dispatcher: Dispatcher,
        need_open: Callable[[], None],
        poke: Callable[[], None],
        clock: Callable[[], float],
        presence: Presence | None = None,
        **parts: Any,
    ) -> None:
        self._pools = pools
        self._limits = limits
        self._dispatcher = dispatcher
        self._need_open = need_open
        self._poke = poke
        self._clock = clock
        self._presence = presence
        self.looks_at = math.inf
        self._statistics: PlannerStatistics = parts["statistics"]
        self._top = pools()[0]
        self._staging = next((pool for pool in pools() if pool.tier is Tier.HOST), self._top)
        parts |= {"limits": limits, "clock": clock}
        stager = None if self._staging is self._top else Onboarder(self._staging, **parts)
        self._onboarder = Onboarder(self._top, **parts, feeder=stager, go_on=self._go_on)
        self._stager = stager or self._onboarder
        self._both = [self._onboarder] if stager is None else [self._onboarder, stager]
        self._stagings: dict[int, tuple[Staging, int]] = {}  # those that are not settled, and blocks they take

    # -- for a request -----------------------------------------------------------------------------------------

    def onboard(self, hit: Hit, timeout_s: float | None = None) -> Transfer[ImmutableBlocks]:
        """Bring the blocks of a hit into the top tier; see `BlockManager.onboard`."""
        parts = hit.take()
        if parts[0].pool is not self._top:
            hit.give_back(parts)
            raise BlockStateError("this hit is of another manager, which alone can onboard it")
        if len(parts) == 1:
            return Transfer.completed(parts[0].blocks)
        timeout_s = self._limits.onboard_timeout_s if timeout_s is None else timeout_s
        transfer: Transfer[ImmutableBlocks] = Transfer(
            deadline_s=timeout_s,
            clock=self._clock,
            on_deadline=lambda: self._expire(onboarding),
            on_wait=lambda: self._run_here(jobs, onboarding),
        )
        onboarding = Onboarding(self._top, hit.hashes, transfer, deadline=self._clock() + timeout_s)
        jobs: list[CopyJob] = []
        unsent: Unsent = deque()
        try:
            if self._stagings:
                self._overtake(hit.hashes)
            with self._dispatcher.locked():
                self._need_open()
                jobs += self._onboarder.begin(onboarding, parts, timeout_s)
                self._open(self._onboarder, jobs, timeout_s, unsent)
            if onboarding.is_settled:  # everything lay in the top tier
                self._expire(onboarding)
            transfer.add_done_callback(lambda _: self._ended(onboarding))
        except BaseException:
            if not onboarding.is_begun:
                hit.give_back(parts)
            self._dispatcher.give_up(unsent)
            raise
        self._send(onboarding, unsent)
        return transfer

    # -- for nobody yet ----------------------------------------------------------------------------------------

    def prefetch(self, hashes: HashArray, timeout_s: float | None = None, *, source: Tier | None = None) -> Prefetch:
        """Bring blocks up in the background; see `BlockManager.prefetch`.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64
        timeout_s : float, optional
        source : Tier, optional
            To measure a route: only what lies in this tier is brought, into the top tier where it is staged already.
        """
        names = hash_array(hashes)
        timeout_s = self._limits.offload_timeout_s if timeout_s is None else timeout_s
        to_top = source is self._staging.tier
        onboarder = self._onboarder if to_top else self._stager
        prefetch = Prefetch(deadline_s=timeout_s, clock=self._clock, on_deadline=lambda: self._expire(staging))
        unsent: Unsent = deque()
        staging = Staging(onboarder.pool, names[:0], prefetch, deadline=self._clock() + timeout_s)
        staging.settled = lambda: self._settle(staging)
        try:
            with self._dispatcher.locked():
                self._need_open()
                self._stagings[id(staging)] = staging, 0
                self._bring(staging, names, onboarder, source, unsent)
                if source is None:
                    self._ask(staging, names)
                prefetch.rejected = len(names) - prefetch.accepted - prefetch.clipped - prefetch.asked
                self._count(prefetch, 0, 0, 0)
            if staging.is_settled:
                self._expire(staging)
            prefetch.add_done_callback(lambda _: self._ended(staging))
        except BaseException:
            self._dispatcher.give_up(unsent)
            if staging.is_settled:
                self._expire(staging)
            raise
        self._send(staging, unsent)
        if prefetch.asked:
            self._poke()
        return prefetch

    def _bring(
        self, staging: Staging, names: HashArray, onboarder: Onboarder, source: Tier | None, unsent: Unsent
    ) -> None:
        """Open the jobs that bring what lies below and has room, under the lock; count that and what has none."""
        prefetch, former = staging.prefetch, staging.hashes
        timeout_s = staging.deadline - self._clock()
        hashes, parts, num_clipped = self._choose(names, onboarder, source)
        for part in parts:
            part.places = part.places + len(former)
        staging.hashes, staging.is_begun = np.concatenate([former, hashes]), False
        num_accepted = sum([len(part.places) for part in parts])
        jobs: list[CopyJob] = []
        try:
            if parts:
                jobs = onboarder.begin(staging, parts, timeout_s)
        except NotEnoughBlocksAvailable:  # somebody took them since we looked
            num_clipped += num_accepted
            num_accepted = 0
        finally:
            if not staging.is_begun:
                staging.hashes = former
                for part in parts:
                    part.blocks.release()
        prefetch.accepted += num_accepted
        prefetch.clipped += num_clipped
        _, num_blocks = self._stagings[id(staging)]
        self._stagings[id(staging)] = staging, num_blocks + sum([len(job.hashes) for job in jobs])
        self._open(onboarder, jobs, timeout_s, unsent)

    def _choose(
        self, names: HashArray, onboarder: Onboarder, source: Tier | None
    ) -> tuple[HashArray, list[HitPart], int]:
        """Hold what can be brought; give its names, where they lie, and how many have no room."""
        pools = self._pools()
        where, ids = find_sources(pools, names)
        lowest = next((index for index, pool in enumerate(pools) if pool is onboarder.pool), len(pools))
        is_below = where > lowest
        if source is not None:
            is_below &= np.array([pool.tier is source for pool in pools] + [False])[where]
        (places,) = is_below.nonzero()
        wanted: dict[bytes, int] = {}
        for key, place in zip(keys_of(names.take(places, axis=0)), places.tolist(), strict=True):
            wanted.setdefault(key, place)
        room, num_clipped = self._room(onboarder.pool), 0
        kept: list[int] = []
        for key, place in wanted.items():
            if onboarder is not self._onboarder and self._onboarder.loading_of(key) is not None:
                continue
            if onboarder.loading_of(key) is None:
                if not room:
                    num_clipped += 1
                    continue
                room -= 1
            kept.append(place)
        chosen: Places = np.array(kept, dtype=np.intp)
        hashes, parts = names.take(chosen, axis=0), []
        for index in np.unique(where.take(chosen)).tolist():
            (indices,) = (where.take(chosen) == index).nonzero()
            blocks, is_there = pools[index].hold_blocks(ids.take(chosen[indices]), hashes.take(indices, axis=0))
            parts.append(HitPart(pools[index], blocks, indices[is_there]))
        return hashes, parts, num_clipped

    # -- what only a store may have ----------------------------------------------------------------------------

    def _ask(self, staging: Staging, names: HashArray) -> None:
        """Ask the keyed tier for what is in no tier as far as is known, under the lock."""
        if self._presence is None:
            return
        where, _ = find_sources(self._pools(), names)
        unknown = {key: place for place, key in reversed(list(enumerate(keys_of(names)))) if where[place] < 0}
        hashes = names.take(np.array(sorted(unknown.values()), dtype=np.intp), axis=0)
        parts, num_left = self._presence.ask(
            hashes, partial(self._hear, staging), is_wanted=lambda: not staging.is_over, until=staging.deadline
        )
        staging.num_questions = len(parts)
        staging.prefetch.asked = sum([len(part) for part in parts])
        staging.prefetch.clipped += num_left

    def _hear(self, staging: Staging, asked: HashArray, found: HashArray) -> None:
        """Bring what the keyed tier turned out to have."""
        prefetch = staging.prefetch
        unsent: Unsent = deque()
        try:
            with self._dispatcher.locked():
                staging.num_questions -= 1
                if staging.is_over:
                    return
                before = prefetch.accepted, prefetch.clipped, prefetch.rejected
                prefetch.asked -= len(asked)
                self._bring(staging, found, self._stager, None, unsent)
                prefetch.rejected += len(asked) - (prefetch.accepted + prefetch.clipped - before[0] - before[1])
                self._count(prefetch, *before)
        except BaseException:
            self._dispatcher.give_up(unsent)
            raise
        if staging.is_settled:
            self._expire(staging)
        self._send(staging, unsent)

    def _count(self, prefetch: Prefetch, accepted: int, clipped: int, rejected: int) -> None:
        """Count what a prefetch was answered beyond this."""
        self._statistics.prefetched.update(
            accepted=prefetch.accepted - accepted,
            clipped=prefetch.clipped - clipped,
            rejected=prefetch.rejected - rejected,
        )

    def _settle(self, staging: Staging) -> None:
        if self._stagings.pop(id(staging), None) is not None:
            self._statistics.prefetched["arrived"] += staging.num_arrived

    def _room(self, pool: BlockPool) -> int:
        """Count the blocks that may still be staged in a pool."""
        num_moving = sum([num_blocks for _, num_blocks in self._stagings.values()])
        bound = min(self._limits.prefetch_blocks, max(1, int(self._limits.in_flight_share * pool.total_blocks)))
        return max(0, min(bound - num_moving, pool.available_blocks))

    def _overtake(self, hashes: HashArray) -> None:
        """Take back the background jobs that load some of these blocks and that nobody has begun."""
        with self._dispatcher.locked():
            jobs = [job for onboarder in self._both for job in onboarder.renounce(hashes=hashes)]
        if jobs:
            self._dispatcher.revoke(jobs)
            with self._dispatcher.locked():
                for onboarder in self._both:
                    onboarder.reclaim(jobs)

    # -- for the planner ---------------------------------------------------------------------------------------

    def loading(self) -> list[Onboarding]:
        """Give onboardings that have open jobs, under the lock."""
        found = {id(onboarding): onboarding for part in self._both for onboarding in part.loading}
        found.update({id(staging): staging for staging, _ in self._stagings.values()})
        return list(found.values())

    def stop_prefetches(self) -> None:
        """Take back what nobody waits for, as far as nobody has begun it; without the lock."""
        with self._dispatcher.locked():
            prefetches = [staging.prefetch for staging, _ in self._stagings.values()]
        for prefetch in prefetches:
            prefetch.cancel()

    def forget_all(self) -> None:
        """Let nothing arrive that is on its way, under the lock."""
        for onboarder in self._both:
            onboarder.forget_all()

    def end_all(self, error: BaseException) -> list[After]:
        """Give what ends every onboarding with this error, under the lock."""
        ends = []
        for onboarding in self.loading():
            ends.append(onboarding.finish(error))
            self._let_go_of_sources(onboarding)
        return ends

    def expired(self, now: float) -> list[Onboarding]:
        """Give those whose time is over and that were not ended yet, under the lock."""
        return [onboarding for onboarding in self.loading() if onboarding.deadline <= now and not onboarding.is_over]

    def next_deadline(self) -> float | None:
        """When the time of the next one is over, under the lock; None without one."""
        return min((onboarding.deadline for onboarding in self.loading() if not onboarding.is_over), default=None)

    def queued(self) -> dict[Tier, tuple[int, float]]:
        """Count blocks on their way to the top that requests wait for; see `Onboarder.queued`."""
        with self._dispatcher.locked():
            self._need_open()
            return self._onboarder.queued()

    # -- private -----------------------------------------------------------------------------------------------

    def _open(self, onboarder: Onboarder, jobs: Sequence[CopyJob], timeout_s: float, unsent: Unsent) -> None:
        for job in jobs:
            self._dispatcher.open(job, onboarder.settle, timeout_s, unsent)

    def _send(self, onboarding: Onboarding, unsent: Unsent) -> None:
        self._dispatcher.send(unsent)
        if onboarding.deadline < self.looks_at and not onboarding.transfer.done():
            self._poke()  # whoever pumps would come too late to end it

    def _go_on(self, relay: Relay) -> None:
        """Take what was staged on to the top, for the request that waits for it."""
        unsent: Unsent = deque()
        try:
            with self._dispatcher.locked():
                jobs, ends = self._onboarder.resume(relay)
                for job in jobs:
                    self._dispatcher.open(job, self._onboarder.settle, job.timeout_s or 0.0, unsent)
        except BaseException:
            self._dispatcher.give_up(unsent)
            raise
        run_all(ends)
        self._dispatcher.send(unsent)

    def _run_here(self, jobs: Sequence[CopyJob], onboarding: Onboarding) -> None:
        """Make copies in the thread that waits for them, as long as its deadline is far."""
        for job in jobs:
            if onboarding.deadline - self._clock() < _FAR_S:
                return
            self._dispatcher.run_here(job)

    def _expire(self, onboarding: Onboarding) -> None:
        with self._dispatcher.locked():
            end: After = onboarding.finish()
            self._let_go_of_sources(onboarding)
        end()

    def _ended(self, onboarding: Onboarding) -> None:
        if not onboarding.transfer.cancelled():
            return
        end: After | None = None
        with self._dispatcher.locked():
            onboarding.abandon()
            jobs = [job for part in self._both for job in part.renounce(owner=onboarding)]
            if onboarding.is_settled:  # it waited for nothing but an answer of a store
                end = onboarding.finish()
                self._let_go_of_sources(onboarding)
        if end is not None:
            end()
        self._dispatcher.revoke(jobs)

    def _let_go_of_sources(self, onboarding: Onboarding) -> None:
        """Release what is loaded from where nothing moves any more and no answer will come that would see to it."""
        if onboarding.is_settled:
            self._stager.release(onboarding, is_used=True)
