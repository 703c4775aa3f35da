"""Loading blocks into a tier: which jobs a hit needs, and what their answers mean.

A block that is already on its way is joined, not loaded twice, unless that job's time is much shorter than its own; one
that is being staged below is waited for there.
What arrives whole is registered at once, whether or not its waiter is still there; a copy that is bad is discarded
where it lay. The planner's lock guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.jobs import CopyJob, Outcome
from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.hit import HitPart
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.loads import Load, LoadPlan
from kvbm.planner.onboarding import Onboarding
from kvbm.planner.prefetch import Relay
from kvbm.planner.priorities import carry_priorities
from kvbm.planner.queue import keys_of
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Places, Tier

_log = logging.getLogger("kvbm.planner")
_NOWHERE = -1, 0


class Onboarder:
    """All onboardings into one pool.

    Parameters
    ----------
    top : BlockPool
    limits : Limits
    statistics : PlannerStatistics
    next_id : callable
        Gives job numbers.
    moved : callable
        Told of blocks that were stored in the top tier: route, slots there, hashes, parents.
    clock : callable
        Gives seconds; monotonic.
    complaints : Complaints
    feeder : Onboarder, optional
        What stages blocks in a tier below.
    go_on : callable, optional
        Told, without the planner's lock, of each relay whose prefetch has answered.
    """

    def __init__(
        self,
        top: BlockPool,
        *,
        limits: Limits,
        statistics: PlannerStatistics,
        next_id: Callable[[], int],
        moved: Callable[[tuple[Tier, Tier], IdArray, HashArray, HashArray], None],
        clock: Callable[[], float],
        complaints: Complaints,
        feeder: Onboarder | None = None,
        go_on: Callable[[Relay], None] | None = None,
    ) -> None:
        self.pool = top
        self._feeder = feeder
        self._go_on = go_on
        self._limits = limits
        self._statistics = statistics
        self._next_id = next_id
        self._moved = moved
        self._clock = clock
        self._complaints = complaints
        self._loads: dict[int, Load] = {}  # by job
        self._loading: dict[bytes, tuple[int, int]] = {}  # hash -> job, index in it
        self._unlisted: dict[int, Load] = {}  # not in `_loading` yet: nobody has looked

    def begin(self, onboarding: Onboarding, parts: list[HitPart], timeout_s: float) -> list[CopyJob]:
        """Take over a hit's parts and make the jobs that load what is not in the top tier.

        Raises
        ------
        NotEnoughBlocksAvailable
            The top tier has no room; nothing was taken, the parts are as they were.
        """
        plans = [self._plan(part, onboarding) for part in parts if part.pool is not self.pool]
        target = self.pool.allocate_blocks(sum([plan.num_slots for plan in plans]))
        onboarding.is_begun = True
        for part in parts:
            if part.pool is not self.pool:
                onboarding.sources.append(part)
            elif len(part.places):
                onboarding.add(part.places, part.blocks)
            else:
                part.blocks.release()
        jobs: list[CopyJob] = []
        is_alone = sum([-(-plan.num_slots // self._limits.job_blocks) for plan in plans]) == 1
        for plan in plans:
            for job_id, pairs in plan.joins.items():
                places, indices = (np.array(side, dtype=np.intp) for side in zip(*pairs, strict=True))
                self._loads[job_id].joined.append((onboarding, places, indices))
                onboarding.num_open += 1
                self._statistics.joined += len(places)
            for job_id, pairs in plan.relays.items():
                mine, target = target.split(len(pairs))
                self._relay(plan, job_id, pairs, mine, onboarding)
                is_alone = False
            if plan is not plans[-1]:
                mine, target = target.split(len(plan.indices))
            else:
                mine = target
            jobs += self._load_all(plan, mine, onboarding, timeout_s=timeout_s, is_alone=is_alone)
        return jobs

    def _load_all(
        self, plan: LoadPlan, target: MutableBlocks, onboarding: Onboarding, *, timeout_s: float, is_alone: bool
    ) -> list[CopyJob]:
        """Make the jobs that load the blocks of one part."""
        jobs, size = [], self._limits.job_blocks
        for start in range(0, len(plan.indices), size):
            indices = plan.indices[start : start + size]
            mine = target
            if len(indices) < len(target):
                mine, target = target.split(len(indices))
            jobs.append(self._load(plan, indices, mine, onboarding, timeout_s=timeout_s, is_alone=is_alone))
        return jobs

    def _relay(
        self, plan: LoadPlan, job_id: int, pairs: list[tuple[int, int]], target: MutableBlocks, owner: Onboarding
    ) -> None:
        """Wait for blocks where they are being staged."""
        assert self._feeder is not None
        assert self._go_on is not None
        indices, there = (np.array(side, dtype=np.intp) for side in zip(*pairs, strict=True))
        relay = Relay(self._feeder.pool, owner, plan.part, indices, target=target, go_on=self._go_on)
        relay.num_open = 1
        owner.num_open += 1
        self._feeder._loads[job_id].joined.append((relay, np.arange(len(indices)), there))
        self._statistics.joined += len(indices)

    def resume(self, relay: Relay) -> tuple[list[CopyJob], list[After]]:
        """Take the blocks of a relay from where they were staged to the top; load what has not arrived from below.

        Gives the jobs, and what ends an onboarding that waited for nothing else.
        """
        owner, target = relay.owner, relay.target
        positions, staged = relay.take_pieces()
        timeout_s = owner.deadline - self._clock()
        owner.num_open -= 1
        jobs: list[CopyJob] = []
        if owner.is_over or timeout_s <= 0:
            target.release()
            if staged is not None:
                staged.release()
        else:
            if staged is not None:
                mine, target = target.split(len(staged))
                places = relay.part.places.take(relay.indices.take(positions))
                part = HitPart(relay.pool, staged, places)
                owner.sources.append(part)
                plan = LoadPlan(part, owner.hashes.take(places, axis=0), np.arange(len(places)))
                jobs += self._load_all(plan, mine, owner, timeout_s=timeout_s, is_alone=False)
            names = owner.hashes.take(relay.part.places, axis=0)
            plan = LoadPlan(relay.part, names, np.delete(relay.indices, positions))
            if len(plan.indices):
                jobs += self._load_all(plan, target, owner, timeout_s=timeout_s, is_alone=False)
            else:
                target.release()
        if not owner.is_settled:
            return jobs, []
        self.release(owner, is_used=False)
        return jobs, [owner.finish()]

    def _plan(self, part: HitPart, onboarding: Onboarding) -> LoadPlan:
        hashes = onboarding.hashes
        names = hashes if len(part.places) == len(hashes) else hashes.take(part.places, axis=0)
        feeder = self._feeder if self._feeder is not None and part.pool is not self._feeder.pool else None
        if not self._loads and (feeder is None or not feeder._loads):
            return LoadPlan(part, names, np.arange(len(names)))
        plan = LoadPlan(part, names, np.empty(0, dtype=np.intp))
        indices = []
        for i, (key, place) in enumerate(zip(keys_of(names), part.places.tolist(), strict=True)):
            if (loading := self._find(key, onboarding)) is not None:
                plan.joins.setdefault(loading[0], []).append((place, loading[1]))
            elif feeder is not None and (loading := feeder._find(key, onboarding)) is not None:
                plan.relays.setdefault(loading[0], []).append((i, loading[1]))
            else:
                indices.append(i)
        plan.indices = np.array(indices, dtype=np.intp)
        return plan

    def _find(self, key: bytes, onboarding: Onboarding) -> tuple[int, int] | None:
        """Give the job that loads a block, and the block's index in it; None where that would not help."""
        loading = self.loading_of(key)
        return loading if loading is not None and self._is_in_time(loading[0], onboarding) else None

    def loading_of(self, key: bytes) -> tuple[int, int] | None:
        """Give the job that loads a block, and the block's index in it; None without."""
        for job_id, load in self._unlisted.items():
            self._loading.update((name, (job_id, i)) for i, name in enumerate(keys_of(load.hashes)))
        self._unlisted.clear()
        return self._loading.get(key)

    def _is_in_time(self, job_id: int, onboarding: Onboarding) -> bool:
        """Whether a job has time enough for who wants to join it: an impatient request's would end too early."""
        load, now = self._loads[job_id], self._clock()
        return (
            not (load.is_leaving or load.is_forgotten) and 2 * (load.owner.deadline - now) >= onboarding.deadline - now
        )

    # -- what nobody waits for ---------------------------------------------------------------------------------

    def renounce(self, *, owner: Onboarding | None = None, hashes: HashArray | None = None) -> list[CopyJob]:
        """Give background jobs that may be revoked: of one owner, or that load some of these blocks.

        None that somebody has joined; nobody joins one from now on until `reclaim`.
        """
        wanted = set() if hashes is None else set(keys_of(hashes))
        jobs = []
        for load in self._loads.values():
            if not load.owner.is_background or load.joined or load.job is None:
                continue
            if load.owner is owner or not wanted.isdisjoint(keys_of(load.hashes)):
                load.is_leaving = True
                jobs.append(load.job)
        return jobs

    def reclaim(self, jobs: Iterable[CopyJob]) -> None:
        """Let jobs be joined again that could not be revoked: their bytes move."""
        for job in jobs:
            if (load := self._loads.get(job.job_id)) is not None:
                load.is_leaving = False

    def forget_all(self) -> None:
        """Let nothing be stored that is on its way, and unpublish what is held here for that."""
        for load in self._loads.values():
            load.is_forgotten = True
            for onboarding in load.waiting:
                onboarding.unpublish()
                onboarding.waiter.unpublish()

    def queued(self) -> dict[Tier, tuple[int, float]]:
        """Count blocks on their way that requests wait for, by source, and give when the first job was sent."""
        found: dict[Tier, tuple[int, float]] = {}
        for load in self._loads.values():
            if not load.owner.is_background:
                num_blocks, since = found.get(load.pool.tier, (0, load.sent_at))
                found[load.pool.tier] = num_blocks + len(load.ids), min(since, load.sent_at)
        return found

    # -- jobs --------------------------------------------------------------------------------------------------

    def _load(
        self,
        plan: LoadPlan,
        indices: Places,
        target: MutableBlocks,
        owner: Onboarding,
        *,
        timeout_s: float,
        is_alone: bool,
    ) -> CopyJob:
        pool, job_id = plan.part.pool, self._next_id()
        ids, hashes, places = plan.part.blocks.block_ids, plan.hashes, plan.part.places
        if len(indices) < len(ids):
            ids, hashes, places = ids.take(indices), hashes.take(indices, axis=0), places.take(indices)
        counters = self._statistics.route(pool.tier, self.pool.tier)
        _, parents, priorities = pool.describe_blocks(ids)  # now: another request may discard them meanwhile
        load = Load(pool, counters, ids, hashes, parents, priorities, target, owner, places, self._clock())
        self._loads[job_id] = self._unlisted[job_id] = load
        owner.num_open += 1
        counters.in_flight += len(ids)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "onboard sent job_id=%d source=%s destination=%s num_blocks=%d",
                job_id, pool.tier.value, self.pool.tier.value, len(ids),
            )  # fmt: skip
        load.job = CopyJob(
            job_id=job_id,
            source=pool.tier,
            destination=self.pool.tier,
            source_ids=ids,
            destination_ids=target.block_ids,
            hashes=hashes,
            timeout_s=timeout_s,
            is_urgent=not owner.is_background,
            is_alone=is_alone and not owner.is_background,
        )
        return load.job

    def settle(self, entry: OpenJob) -> Iterable[After]:
        """Register what arrived, hand it to those who wait, discard copies that are bad."""
        load = self._loads.pop(entry.job.job_id)
        if self._unlisted.pop(entry.job.job_id, None) is None:
            for key in keys_of(load.hashes):
                if self._loading.get(key, _NOWHERE)[0] == entry.job.job_id:  # or given twice, or of a newer job
                    del self._loading[key]
        ok = entry.ok
        num_good = int(np.count_nonzero(ok))
        self._count(load, entry, num_good)
        if entry.is_too_late or load.is_forgotten:
            load.target.release()
            return self._ended(load)
        try:
            self._store(load, entry, ok, num_good)
        except Exception:  # of a plugged policy, as a rule; guards that nobody holds any more give their blocks back
            _log.exception("onboard could not be stored job_id=%d", entry.job.job_id)
        return self._ended(load, is_used=True)

    def _store(self, load: Load, entry: OpenJob, ok: npt.NDArray[np.bool_], num_good: int) -> None:
        arrived, hashes, places = load.target, load.hashes, load.places
        parents, priorities = load.parents, load.priorities
        if num_good < len(ok):
            arrived, lost = load.target.partition(ok)
            lost.release()
            hashes, places, parents, priorities = hashes[ok], places[ok], parents[ok], priorities[ok]
            self._discard(load, entry)
        stored = self.pool.register_blocks(arrived.complete(hashes, parents=parents))
        self._moved((load.pool.tier, self.pool.tier), stored.block_ids, hashes, parents)
        carry_priorities(self.pool, hashes, priorities)
        if load.joined:
            self._share(load, ok, stored)
        load.owner.add(places, stored)
        if len(places) and _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "migrated job_id=%d source=%s destination=%s num_blocks=%d nbytes=%d seconds=%.6f",
                entry.job.job_id, load.pool.tier.value, self.pool.tier.value, len(places), entry.nbytes, entry.seconds,
            )  # fmt: skip

    def _share(self, load: Load, ok: npt.NDArray[np.bool_], stored: ImmutableBlocks) -> None:
        """Hand what arrived to those who joined the job."""
        ids = np.full(len(ok), -1, dtype=np.int32)
        ids[ok] = stored.block_ids
        for other, other_places, indices in load.joined:
            good = ok[indices]
            blocks, is_there = self.pool.hold_blocks(ids[indices[good]], load.hashes[indices[good]])
            other.add(other_places[good][is_there], blocks)

    @property
    def loading(self) -> list[Onboarding]:
        """Onboardings that have open jobs."""
        found: dict[int, Onboarding] = {}
        for load in self._loads.values():
            found.update((id(onboarding.waiter), onboarding.waiter) for onboarding in load.waiting)
        return list(found.values())

    def _ended(self, load: Load, *, is_used: bool = False) -> list[After]:
        """Note that a job is settled; give what ends the onboardings that wait for no other."""
        ends: list[After] = []
        for onboarding in load.waiting:
            onboarding.num_open -= 1
            if onboarding.is_settled:
                ends.append(onboarding.finish())
                self.release(onboarding, is_used)
        return ends

    def release(self, onboarding: Onboarding, is_used: bool) -> None:
        """Give the sources back; then the whole prefix becomes young, so that it leaves after its leaves."""
        parts, onboarding.sources = onboarding.sources, []
        for part in reversed(parts):
            part.blocks.release()
        for part in parts if is_used else ():
            if len(part.places) < len(onboarding.hashes):  # otherwise its release was that of the whole prefix
                part.pool.touch_blocks(onboarding.hashes)

    def _discard(self, load: Load, entry: OpenJob) -> None:
        """Unpublish sources that are bad: no other request shall wait for them."""
        is_bad = entry.outcomes >= Outcome.FAILED
        bad, _ = load.pool.hold_blocks(load.ids[is_bad], load.hashes[is_bad])
        load.pool.discard_blocks(bad)
        bad.release()
        _log.log(
            self._complaints.level("onboard incomplete"),
            "onboard incomplete source=%s num_blocks=%d num_good=%d num_corrupt=%d reason=%s",
            load.pool.tier.value, len(load.ids), int(entry.ok.sum()),
            int((entry.outcomes == Outcome.CORRUPT).sum()), entry.reason,
        )  # fmt: skip

    def _count(self, load: Load, entry: OpenJob, num_good: int) -> None:
        counters = load.counters
        counters.in_flight -= len(load.ids)
        counters.blocks += num_good
        counters.nbytes += entry.nbytes
        counters.observe(entry.label, entry.seconds)
        for outcome, num_blocks in entry.losses:
            counters.dropped[outcome] += num_blocks
