"""One route of offloading: from a pool's outbox through a bounded queue into jobs, and into the pool below.

What waits is held weakly: evicted meanwhile, it is dropped and counted, and its descendants in that job with it. What
moves is held on both sides until it is settled. Nothing here ever waits. The planner's lock guards it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.jobs import CopyJob, Outcome
from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import RouteCounters
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.lineage import Lineages
from kvbm.planner.loads import OffloadLoad
from kvbm.planner.policies import Candidates, OffloadPolicy
from kvbm.planner.priorities import carry_priorities
from kvbm.planner.queue import Batch, OffloadQueue, keys_of
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, OutboxKind, Tier

_log = logging.getLogger("kvbm.planner")

_ROWS_AT_ONCE = 1024  # so that the lock is never held for long
_YOUNG_BATCHES = 4096  # the oldest are forgotten

_GAP = int(OutboxKind.GAP)
Mask = npt.NDArray[np.bool_]
Moved = Callable[[tuple[Tier, Tier], IdArray, HashArray, HashArray], None]


class OffloadRoute:
    """Moves registered blocks from one pool to the one below.

    Parameters
    ----------
    source, destination : BlockPool
    policy : OffloadPolicy
    limits : Limits
    counters : RouteCounters
    lineages : Lineages
    next_id : callable
        Gives job numbers.
    moved : callable
        Told of blocks that were stored below: route, slots there, hashes, parents.
    complaints : Complaints
    records : RecordKeeper
    """

    def __init__(
        self,
        source: BlockPool,
        destination: BlockPool,
        policy: OffloadPolicy,
        *,
        limits: Limits,
        counters: RouteCounters,
        lineages: Lineages,
        next_id: Callable[[], int],
        moved: Moved,
        complaints: Complaints,
        records: RecordKeeper,
    ) -> None:
        self.source = source
        self.destination = destination
        self.counters = counters
        self._policy = policy
        self._limits = limits
        self._lineages = lineages
        self._next_id = next_id
        self._moved = moved
        self._complaints = complaints
        self._records = records
        self.young: deque[HashArray] = deque(maxlen=_YOUNG_BATCHES)  # above what arrived, to be told to executors
        self._events = source.subscribe_events(["created"])
        self.pauses = 0  # who keeps it from emitting
        self._last_seq: int | None = None  # of the rows read so far
        self._queue = OffloadQueue()
        self._in_flight: dict[bytes, None] = {}
        self._loads: dict[int, OffloadLoad] = {}  # by job
        self._max_in_flight = max(1, int(limits.in_flight_share * min(source.total_blocks, destination.total_blocks)))

    @property
    def key(self) -> tuple[Tier, Tier]:
        """The tiers of the route."""
        return self.source.tier, self.destination.tier

    # -- what comes in -----------------------------------------------------------------------------------------

    def collect(self, *, everything: bool = False) -> bool:
        """Take registered blocks out of the outbox; return whether there were any.

        Parameters
        ----------
        everything : bool
            Also what the queue has no room for, to drop and count it; otherwise that stays in the outbox, which is
            bounded too.
        """
        room = self._limits.queue_blocks - self.counters.queued
        if room <= 0 and not everything:
            return False
        rows = self._events.poll_rows(None if everything else min(room, _ROWS_AT_ONCE))
        if not len(rows):
            return False
        is_gap = rows["kind"] == _GAP
        if np.count_nonzero(is_gap):
            # A gap carries the number of the last row lost; how many of those were registrations is lost too.
            self._drop("lost_events", max(1, int(rows["seq"][is_gap][-1]) - max(0, self.last_seq)))
            self._last_seq = int(rows["seq"][-1])
            rows = rows[~is_gap]
        else:
            self._last_seq = int(rows["seq"][-1])
        if len(rows):
            batch = Batch(
                np.ascontiguousarray(rows["id"]),
                np.ascontiguousarray(rows["hash"]),
                np.ascontiguousarray(rows["parent"]),
                int(rows["seq"][0]),
            )
            self._choose(batch, self._policy.registered)
        return True

    def skip(self) -> None:
        """Pass over what was registered so far."""
        if len(rows := self._events.poll_rows(None)):
            self._last_seq = int(rows["seq"][-1])

    def used(self, hashes: HashArray) -> None:
        """Offer blocks of the source that a request has found."""
        self._offer(hashes, self._policy.used)

    def prioritised(self, hashes: HashArray) -> None:
        """Offer blocks of the source that have a new priority."""
        self._offer(hashes, self._policy.prioritised)

    def _offer(self, hashes: HashArray, choose: Callable[[Candidates], Mask]) -> None:
        ids = self.source.lookup(hashes)
        places = np.flatnonzero(ids >= 0)
        if len(places):
            _, parents, _ = self.source.describe_blocks(ids[places])
            seq = -1 if self._last_seq is None else self._last_seq
            self._choose(Batch(ids[places], hashes[places], parents, seq), choose)

    def _choose(self, batch: Batch, choose: Callable[[Candidates], Mask]) -> None:
        _, _, priorities = self.source.describe_blocks(batch.ids)
        candidates = Candidates(*self.key, batch.hashes, batch.parents, priorities)
        try:
            mask = np.asarray(choose(candidates), dtype=np.bool_)
            if mask.shape != (len(candidates),):
                raise ValueError(f"answered {mask.shape} for {len(candidates)} blocks")
        except Exception:
            _log.exception("offload policy failed policy=%s num_blocks=%d", type(self._policy).__name__, len(batch.ids))
            self._drop("policy_failed", len(batch.ids))
            return
        if choose != self._policy.registered:  # of a block that was there before: it may be below long since
            mask = mask & (self.destination.lookup(batch.hashes) < 0)
        (places,) = mask.nonzero()
        room = max(0, self._limits.queue_blocks - self.counters.queued)
        self._drop("queue_full", len(places) - room)
        places = places[:room]
        if not len(places):
            return
        self._queue.push(batch if len(places) == len(batch) else batch.take(places))
        self.counters.queued = self._queue.num_blocks

    # -- what goes out -----------------------------------------------------------------------------------------

    def emit(self) -> CopyJob | None:
        """Make the next job and hold its blocks; None when nothing waits, too much moves, or it is paused."""
        while self._may_emit():
            batch = self._queue.take(min(self._limits.job_blocks, self._max_in_flight - self.counters.in_flight))
            self.counters.queued = self._queue.num_blocks
            load = self._hold(batch)
            if load is not None:
                job_id = self._next_id()
                self._loads[job_id] = load
                self._in_flight.update(dict.fromkeys(load.keys))
                self.counters.in_flight += len(load.keys)
                _log.debug(
                    "offload sent job_id=%d source=%s destination=%s num_blocks=%d",
                    job_id, *(tier.value for tier in self.key), len(load.keys),
                )  # fmt: skip
                return CopyJob(
                    job_id=job_id,
                    source=self.source.tier,
                    destination=self.destination.tier,
                    source_ids=load.source.block_ids,
                    destination_ids=load.target.block_ids,
                    hashes=load.hashes,
                    parents=load.parents,
                    priorities=load.priorities,
                    timeout_s=self._limits.offload_timeout_s,
                )
        return None

    def _may_emit(self) -> bool:
        has_room = self.counters.in_flight < self._max_in_flight and len(self._loads) < self._limits.route_jobs
        return self._queue.num_blocks > 0 and has_room and not self.pauses

    def _hold(self, batch: Batch) -> OffloadLoad | None:
        """Hold what still has to be moved and is still there, on both sides."""
        (absent,) = (self.destination.lookup(batch.hashes) < 0).nonzero()
        wanted: dict[bytes, int] = {}  # hash -> place, each hash once
        for key, i in zip(keys_of(batch.hashes.take(absent, axis=0)), absent.tolist(), strict=True):
            if key not in self._in_flight:
                wanted.setdefault(key, i)
        self.counters.present += len(batch.ids) - len(wanted)
        shut_out = self._records.shut_out(self.destination.tier)
        expiring = [key for key in wanted if key in shut_out]
        self._drop("expiring", len(expiring))
        for key in expiring:
            del wanted[key]
        if not wanted:
            return None
        places = np.array(list(wanted.values()), dtype=np.intp)
        ids, hashes = batch.ids.take(places), batch.hashes.take(places, axis=0)
        parents = batch.parents.take(places, axis=0)
        source, is_there = self.source.hold_blocks(ids, hashes)
        if not is_there.all():
            source, is_there = self._without_orphans(source, hashes, parents, is_there)
        source = self._without_unaffordable(source)
        target = self._find_room(len(source))
        if target is None:
            self._drop("no_room", len(source))
            source.release()
            return None
        if len(target) < len(source):
            self._drop("no_room", len(source) - len(target))
            source, rest = source.split(len(target))
            rest.release()
        hashes, parents, priorities = self.source.describe_blocks(source.block_ids)
        before = self._lineages.extend(parents, hashes)
        return OffloadLoad(source, target, hashes, parents, priorities, before, keys_of(hashes), batch.seq)

    def _without_orphans(
        self, source: ImmutableBlocks, hashes: HashArray, parents: HashArray, is_there: Mask
    ) -> tuple[ImmutableBlocks, Mask]:
        """Let go of the descendants of blocks that are gone: without those they could not be found."""
        gone = {key for key, there in zip(keys_of(hashes), is_there, strict=True) if not there}
        self._drop("evicted", len(gone))
        is_kept = is_there.copy()
        for i, (key, parent) in enumerate(zip(keys_of(hashes), keys_of(parents), strict=True)):
            if is_there[i] and parent in gone:
                gone.add(key)
                is_kept[i] = False
        if (is_kept == is_there).all():
            return source, is_there
        kept, orphans = source.partition(is_kept[is_there])
        self._drop("orphaned", len(orphans))
        orphans.release()
        return kept, is_kept

    def _without_unaffordable(self, source: ImmutableBlocks) -> ImmutableBlocks:
        """Let go of what the policy's budget has no room for; the leading blocks stay, others are found by them."""
        num_blocks = len(source)
        try:
            num_affordable = min(num_blocks, max(0, int(self._policy.afford(num_blocks))))
        except Exception:
            _log.exception("offload policy failed policy=%s num_blocks=%d", type(self._policy).__name__, num_blocks)
            reason, num_affordable = "policy_failed", 0
        else:
            reason = "write_budget"
        if num_affordable == num_blocks:
            return source
        self._drop(reason, num_blocks - num_affordable)
        source, rest = source.split(num_affordable)
        rest.release()
        return source

    def _find_room(self, n: int) -> MutableBlocks | None:
        if n == 0:
            return None
        try:
            target = self.destination.try_allocate_blocks(n)
            if target is None and (available := min(n, self.destination.available_blocks)):
                target = self.destination.try_allocate_blocks(available)
        except Exception as error:  # of a plugged eviction policy, as a rule
            _log.error("no room below, the allocation failed destination=%s error=%r", self.key[1].value, error)
            return None
        return target

    # -- what came of it ---------------------------------------------------------------------------------------

    def settle(self, entry: OpenJob) -> Iterable[After]:
        """Register what arrived, let go of the rest."""
        load = self._loads.pop(entry.job.job_id)
        for key in load.keys:
            del self._in_flight[key]
        self.counters.in_flight -= len(load.keys)
        self.counters.observe(entry.label, entry.seconds)
        if entry.is_too_late:
            load.target.release()
            load.source.release()
            return ()
        ok = entry.ok
        unwanted, unwanted_ids = load.hashes[:0], load.target.block_ids[:0]
        if load.unwanted:
            is_unwanted = np.array([key in load.unwanted for key in load.keys])
            unwanted, unwanted_ids = load.hashes[is_unwanted], load.target.block_ids[is_unwanted]
            self._drop("reset", int((ok & is_unwanted).sum()))
            ok &= ~is_unwanted
        arrived, hashes, parents, priorities = load.target, load.hashes, load.parents, load.priorities
        if not ok.all():
            for outcome, num_blocks in entry.losses:
                self._drop(outcome, num_blocks)
            arrived, lost = load.target.partition(ok)
            lost.release()
            hashes, parents, priorities = hashes[ok], parents[ok], priorities[ok]
        num_arrived = len(arrived)
        if num_arrived:
            stored = self.destination.register_blocks(arrived.complete(hashes, parents=parents))
            self._moved(self.key, stored.block_ids, hashes, parents)
            carry_priorities(self.destination, hashes, priorities)
            stored.release()
            self.destination.touch_blocks(load.before)
            if self.destination.tier in self._records.tiers and len(load.before):
                self.young.append(load.before)
            self.counters.blocks += num_arrived
            self.counters.nbytes += entry.nbytes
            _log.debug(
                "migrated job_id=%d source=%s destination=%s num_blocks=%d nbytes=%d seconds=%.6f",
                entry.job.job_id, *(tier.value for tier in self.key), num_arrived, entry.nbytes, entry.seconds,
            )  # fmt: skip
        corrupt = entry.outcomes == Outcome.CORRUPT
        if not entry.is_whole and corrupt.any():
            bad, load.source = load.source.partition(corrupt)
            self.source.discard_blocks(bad)
            bad.release()
        load.source.release()
        self.source.touch_blocks(load.before)
        if not entry.is_whole:
            _log.log(
                self._complaints.level("offload incomplete"),
                "offload incomplete source=%s destination=%s num_blocks=%d num_moved=%d reason=%s",
                *(tier.value for tier in self.key), len(ok), num_arrived, entry.reason,
            )  # fmt: skip
        return [partial(self._records.forget_later, self.key[1], unwanted_ids, unwanted)] if len(unwanted) else ()

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def last_seq(self) -> int:
        """Number of the last outbox row that was taken out; -1 before the first."""
        return -1 if self._last_seq is None else self._last_seq

    def is_done(self, seq: int) -> bool:
        """Whether nothing that was registered up to this outbox row waits or moves."""
        is_waiting = (first_seq := self._queue.first_seq) is not None and first_seq <= seq
        return not is_waiting and all(load.seq > seq for load in self._loads.values())

    def carries(self, hashes: HashArray) -> bool:
        """Whether any of these blocks moves."""
        return not self._in_flight.keys().isdisjoint(keys_of(hashes))

    def forget(self, hashes: HashArray) -> None:
        """Let none of these blocks arrive below: neither what waits nor what moves."""
        gone = set(keys_of(hashes))
        for load in self._loads.values():
            load.unwanted.update(gone.intersection(load.keys))
        self._drop("reset", self._queue.forget(gone))
        self.counters.queued = self._queue.num_blocks

    def forget_all(self) -> None:
        """Let nothing arrive below that was registered so far, and unpublish what is held here for that."""
        self.collect(everything=True)
        self.drop_queue("reset")
        for load in self._loads.values():
            load.unwanted.update(load.keys)
            self.source.discard_blocks(load.source)

    def drop_queue(self, reason: str) -> None:
        """Drop what waits; what moves is settled when it is answered."""
        self._drop(reason, self._queue.clear())
        self.counters.queued = 0

    def close(self) -> None:
        """Drop what waits, and read no more."""
        self.drop_queue("closed")
        self._events.close()

    def _drop(self, reason: str, num_blocks: int) -> None:
        if num_blocks > 0:
            self.counters.dropped[reason] += num_blocks
            _log.debug(
                "offload dropped source=%s destination=%s num_blocks=%d reason=%s",
                *(tier.value for tier in self.key), num_blocks, reason,
            )  # fmt: skip
