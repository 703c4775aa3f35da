"""Loading blocks into the top tier: which jobs a hit needs, and what their answers mean.

A block that is already on its way is joined, not loaded twice, unless that job's time is much shorter than its own.
What arrives whole is registered at once, whether or not its waiter is still there; a copy that is bad is discarded
where it lay. The planner's lock guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.jobs import CopyJob, Outcome
from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.planner.hit import HitPart
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.onboarding import Onboarding
from kvbm.planner.priorities import carry_priorities
from kvbm.planner.queue import keys_of
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Places, Tier

_log = logging.getLogger("kvbm.planner")


@dataclass
class _Load:
    """One open job; its sources are held by its owner."""

    pool: BlockPool  # that the sources lie in
    counters: RouteCounters
    ids: IdArray
    hashes: HashArray
    parents: HashArray
    priorities: npt.NDArray[np.uint8]
    target: MutableBlocks
    owner: Onboarding
    places: Places
    joined: list[tuple[Onboarding, Places, Places]] = field(default_factory=list)  # whose, its places, indices here

    @property
    def waiting(self) -> list[Onboarding]:
        """Whose onboardings need this job."""
        return [self.owner, *(other for other, _, _ in self.joined)]


@dataclass
class _Plan:
    """What must be done for one part of a hit, before anything is."""

    part: HitPart
    hashes: HashArray
    indices: Places  # into the part: to be loaded
    joins: dict[int, list[tuple[int, int]]]  # job -> (place, index in that job)


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
    records : RecordKeeper
        Told of copies that are bad.
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
        records: RecordKeeper,
    ) -> None:
        self._top = top
        self._limits = limits
        self._statistics = statistics
        self._next_id = next_id
        self._moved = moved
        self._clock = clock
        self._complaints = complaints
        self._records = records
        self._loads: dict[int, _Load] = {}  # by job
        self._loading: dict[bytes, tuple[int, int]] = {}  # hash -> job, index in it
        self._unlisted: dict[int, _Load] = {}  # not in `_loading` yet: nobody has looked

    def begin(self, onboarding: Onboarding, parts: list[HitPart], timeout_s: float) -> list[CopyJob]:
        """Take over a hit's parts and make the jobs that load what is not in the top tier.

        Raises
        ------
        NotEnoughBlocksAvailable
            The top tier has no room; nothing was taken, the parts are as they were.
        """
        plans = [self._plan(part, onboarding) for part in parts if part.pool is not self._top]
        target = self._top.allocate_blocks(sum([len(plan.indices) for plan in plans]))
        onboarding.is_begun = True
        for part in parts:
            if part.pool is not self._top:
                onboarding.sources.append(part)
            elif len(part.places):
                onboarding.add(part.places, part.blocks)
            else:
                part.blocks.release()
        jobs = []
        size = self._limits.job_blocks
        is_alone = sum([-(-len(plan.indices) // size) for plan in plans]) == 1
        for plan in plans:
            for job_id, pairs in plan.joins.items():
                places, indices = (np.array(side, dtype=np.intp) for side in zip(*pairs, strict=True))
                self._loads[job_id].joined.append((onboarding, places, indices))
                onboarding.num_open += 1
                self._statistics.joined += len(places)
            for start in range(0, len(plan.indices), size):
                indices = plan.indices[start : start + size]
                mine = target
                if len(indices) < len(target):
                    mine, target = target.split(len(indices))
                jobs.append(self._load(plan, indices, mine, onboarding, timeout_s=timeout_s, is_alone=is_alone))
        return jobs

    def _plan(self, part: HitPart, onboarding: Onboarding) -> _Plan:
        hashes = onboarding.hashes
        names = hashes if len(part.places) == len(hashes) else hashes.take(part.places, axis=0)
        if not self._loads:
            return _Plan(part, names, np.arange(len(names)), {})
        for job_id, load in self._unlisted.items():
            self._loading.update((key, (job_id, i)) for i, key in enumerate(keys_of(load.hashes)))
        self._unlisted.clear()
        joins: dict[int, list[tuple[int, int]]] = {}
        indices = []
        for i, (key, place) in enumerate(zip(keys_of(names), part.places.tolist(), strict=True)):
            loading = self._loading.get(key)
            if loading is None or not self._is_in_time(loading[0], onboarding):
                indices.append(i)
            else:
                joins.setdefault(loading[0], []).append((place, loading[1]))
        return _Plan(part, names, np.array(indices, dtype=np.intp), joins)

    def _is_in_time(self, job_id: int, onboarding: Onboarding) -> bool:
        """Whether a job has time enough for who wants to join it: an impatient request's would end too early."""
        now = self._clock()
        return 2 * (self._loads[job_id].owner.deadline - now) >= onboarding.deadline - now

    def _load(
        self,
        plan: _Plan,
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
        counters = self._statistics.route(pool.tier, self._top.tier)
        _, parents, priorities = pool.describe_blocks(ids)  # now: another request may discard them meanwhile
        load = _Load(pool, counters, ids, hashes, parents, priorities, target, owner, places)
        self._loads[job_id] = self._unlisted[job_id] = load
        owner.num_open += 1
        counters.in_flight += len(ids)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "onboard sent job_id=%d source=%s destination=%s num_blocks=%d",
                job_id, pool.tier.value, self._top.tier.value, len(ids),
            )  # fmt: skip
        return CopyJob(
            job_id=job_id,
            source=pool.tier,
            destination=self._top.tier,
            source_ids=ids,
            destination_ids=target.block_ids,
            hashes=hashes,
            timeout_s=timeout_s,
            is_urgent=True,
            is_alone=is_alone,
        )

    def settle(self, entry: OpenJob) -> Iterable[After]:
        """Register what arrived, hand it to those who wait, discard copies that are bad."""
        load = self._loads.pop(entry.job.job_id)
        if self._unlisted.pop(entry.job.job_id, None) is None:
            for key in keys_of(load.hashes):
                self._loading.pop(key, None)  # a hit may name a block twice
        ok = entry.ok
        num_good = int(np.count_nonzero(ok))
        self._count(load, entry, num_good)
        if entry.is_too_late:
            load.target.release()
            return self._ended(load)
        try:
            self._store(load, entry, ok, num_good)
        except Exception:  # of a plugged policy, as a rule; guards that nobody holds any more give their blocks back
            _log.exception("onboard could not be stored job_id=%d", entry.job.job_id)
        ends = self._ended(load, is_used=True)
        if num_good < len(ok) and len(bad := load.hashes[entry.outcomes >= Outcome.FAILED]):
            ends.append(partial(self._records.forget_later, load.pool.tier, bad))
        return ends

    def _store(self, load: _Load, entry: OpenJob, ok: npt.NDArray[np.bool_], num_good: int) -> None:
        arrived, hashes, places = load.target, load.hashes, load.places
        parents, priorities = load.parents, load.priorities
        if num_good < len(ok):
            arrived, lost = load.target.partition(ok)
            lost.release()
            hashes, places, parents, priorities = hashes[ok], places[ok], parents[ok], priorities[ok]
            self._discard(load, entry)
        stored = self._top.register_blocks(arrived.complete(hashes, parents=parents))
        self._moved((load.pool.tier, self._top.tier), stored.block_ids, hashes, parents)
        carry_priorities(self._top, hashes, priorities)
        if load.joined:
            self._share(load, ok, stored)
        load.owner.add(places, stored)
        if len(places) and _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "migrated job_id=%d source=%s destination=%s num_blocks=%d nbytes=%d seconds=%.6f",
                entry.job.job_id, load.pool.tier.value, self._top.tier.value, len(places), entry.nbytes, entry.seconds,
            )  # fmt: skip

    def _share(self, load: _Load, ok: npt.NDArray[np.bool_], stored: ImmutableBlocks) -> None:
        """Hand what arrived to those who joined the job."""
        ids = np.full(len(ok), -1, dtype=np.int32)
        ids[ok] = stored.block_ids
        for other, other_places, indices in load.joined:
            good = ok[indices]
            blocks, is_there = self._top.hold_blocks(ids[indices[good]], load.hashes[indices[good]])
            other.add(other_places[good][is_there], blocks)

    @property
    def loading(self) -> list[Onboarding]:
        """Onboardings that have open jobs."""
        found: dict[int, Onboarding] = {}
        for load in self._loads.values():
            found.update((id(onboarding), onboarding) for onboarding in load.waiting)
        return list(found.values())

    def expired(self, now: float) -> list[Onboarding]:
        """Onboardings whose time is over and that were not ended yet."""
        return [onboarding for onboarding in self.loading if onboarding.deadline <= now and not onboarding.is_over]

    def next_deadline(self) -> float | None:
        """When the time of the next onboarding is over; None without one."""
        return min((onboarding.deadline for onboarding in self.loading if not onboarding.is_over), default=None)

    def _ended(self, load: _Load, *, is_used: bool = False) -> list[After]:
        """Note that a job is settled; give what ends the onboardings that wait for no other."""
        ends: list[After] = []
        for onboarding in load.waiting:
            onboarding.num_open -= 1
            if onboarding.is_settled:
                ends.append(onboarding.finish())
                self._release(onboarding, is_used)
        return ends

    def _release(self, onboarding: Onboarding, is_used: bool) -> None:
        """Give the sources back; then the whole prefix becomes young, so that it leaves after its leaves."""
        parts, onboarding.sources = onboarding.sources, []
        for part in reversed(parts):
            part.blocks.release()
        for part in parts if is_used else ():
            if len(part.places) < len(onboarding.hashes):  # otherwise its release was that of the whole prefix
                part.pool.touch_blocks(onboarding.hashes)

    def _discard(self, load: _Load, entry: OpenJob) -> None:
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

    def _count(self, load: _Load, entry: OpenJob, num_good: int) -> None:
        counters = load.counters
        counters.in_flight -= len(load.ids)
        counters.blocks += num_good
        counters.nbytes += entry.nbytes
        counters.observe(entry.label, entry.seconds)
        for outcome, num_blocks in entry.losses:
            counters.dropped[outcome] += num_blocks
