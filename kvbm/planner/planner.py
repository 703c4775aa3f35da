"""Planner: the half that decides. It sees pools, hashes and slots, and speaks to the bytes only in jobs.

It takes registered blocks out of the pools' outboxes and offloads them, finds hits over all tiers, and onboards them.
One lock guards its books; it is taken before any pool's, and never held while a job is sent or a callback runs.
Nothing here waits for bytes except `flush` and `close`. `pump` does what there is to do; a thread calls it when
something was registered, or a test does.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from kvbm.blocks import ImmutableBlocks
from kvbm.errors import ConfigError, PluginError, PoolClosed, TransferTimeout
from kvbm.events import MigrationLog
from kvbm.jobs import CopyJob, Job, JobChannel, JobResult, Outcome, Transfer
from kvbm.jobs.messages import num_blocks_of
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.hit import Hit, find_hit, find_sources
from kvbm.planner.ledger import After, Ledger, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.lineage import Lineages
from kvbm.planner.offload import OffloadRoute
from kvbm.planner.onboard import Onboarder
from kvbm.planner.onboarding import Onboarding
from kvbm.planner.policies import AlwaysPolicy, OffloadPolicy
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Tier, hash_array

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
    limits : Limits, optional
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        channels: Sequence[JobChannel] = (),
        *,
        policies: Sequence[OffloadPolicy] | None = None,
        recording_tiers: Iterable[Tier] = (),
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(pools) > 1 and not channels:
            raise ConfigError(f"a planner over {len(pools)} tiers needs a channel to each rank's executor, got none")
        self.pools = tuple(pools)
        self.limits = limits or Limits()
        self._channels = tuple(channels)
        self._clock = clock
        self._lock: Any = threading.RLock()  # the planner's one; for it tells its owner, nobody ever holds it twice
        self._changed = threading.Condition(self._lock)  # told of every settled job
        self._ledger = Ledger()
        self.records = RecordKeeper(
            recording_tiers,
            next_id=self._ledger.next_id,
            submit=self._submit,
            timeout_s=self.limits.offload_timeout_s,
            clock=clock,
        )
        self._statistics = PlannerStatistics()
        self._lost: dict[int, str] = {}  # rank -> why
        self._touches: deque[HashArray] = deque(maxlen=self.limits.touch_calls)
        self._logs: tuple[MigrationLog, ...] = ()
        self._wake: Callable[[], None] | None = None
        self._is_closed = self._are_pools_closed = False
        self._lineages = Lineages(self.limits.lineage_blocks)
        pairs = list(itertools.pairwise(pools))
        chosen = policies if policies is not None else [AlwaysPolicy() for _ in pairs]
        self._routes = [
            OffloadRoute(
                source,
                destination,
                policy,
                limits=self.limits,
                counters=self._statistics.route(source.tier, destination.tier),
                lineages=self._lineages,
                next_id=self._ledger.next_id,
                moved=self._moved,
            )
            for (source, destination), policy in zip(pairs, chosen, strict=True)
        ]
        self._used = [route for route, policy in zip(self._routes, chosen, strict=True) if _reads_uses(policy)]
        self._onboarder = Onboarder(
            pools[0], limits=self.limits, statistics=self._statistics, next_id=self._ledger.next_id, moved=self._moved
        )
        for rank, channel in enumerate(self._channels):
            channel.open(partial(self._receive, rank), partial(self._lose, rank))

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call this when there is something to pump, from whichever thread learns of it."""
        self._wake = wake
        for pool in self.pools[:-1]:
            pool.add_listener(wake)

    # -- requests ----------------------------------------------------------------------------------------------

    def match(self, hashes: HashArray) -> Hit:
        """Hold the longest prefix of a sequence that lies in any tier."""
        names = hash_array(hashes)
        hit = find_hit(self._usable_pools(), names)
        with self._locked():
            for tier, num_blocks in hit.tiers.items():
                self._statistics.hits[tier] += num_blocks
            self._statistics.misses += len(names) - len(hit)
        if self._routes and len(hit):
            self._touches.append(hit.hashes)  # spread with the next registration, or now where a policy counts uses
            if self._used:
                self._poke()
        return hit

    def lookup(self, hashes: HashArray) -> int:
        """Count the leading blocks that lie in any tier; holds nothing and changes no recency."""
        where, _ = find_sources(self._usable_pools(), hash_array(hashes))
        is_absent = where < 0
        return int(is_absent.argmax()) if is_absent.any() else len(where)

    def onboard(self, hit: Hit, timeout_s: float | None = None) -> Transfer[ImmutableBlocks]:
        """Bring the blocks of a hit into the top tier; see `BlockManager.onboard`."""
        parts = hit.take()
        if len(parts) == 1:
            return Transfer.completed(parts[0].blocks)
        timeout_s = self.limits.onboard_timeout_s if timeout_s is None else timeout_s
        transfer: Transfer[ImmutableBlocks] = Transfer(
            deadline_s=timeout_s, clock=self._clock, on_deadline=lambda: self._expire(onboarding)
        )
        onboarding = Onboarding(self.pools[0], hit.hashes, transfer, deadline=self._clock() + timeout_s)
        ends: list[After] = []
        try:
            with self._locked():
                if self._is_closed:
                    raise PoolClosed("the manager is closed")
                jobs = self._onboarder.begin(onboarding, parts, timeout_s)
                for job in jobs:
                    self._open(job, self._onboarder.settle, timeout_s)
                if onboarding.is_settled:  # everything lay in the top tier
                    ends.append(onboarding.finish())
        except BaseException:
            hit.give_back(parts)
            raise
        for end in ends:
            end()
        transfer.add_done_callback(lambda _: self._ended(onboarding))
        self._send(jobs)
        return transfer

    def prioritise(self, hashes: HashArray, priority: int) -> int:
        """Set how long blocks are kept, in every tier; return how many the top tier has."""
        names = hash_array(hashes)
        found = [pool.set_priority(names, priority) for pool in self.pools]
        with self._locked():
            for route in self._routes:
                route.prioritised(names)
        self._poke()
        return found[0]

    # -- moving ------------------------------------------------------------------------------------------------

    def pump(self) -> bool:
        """Do what there is to do now; return whether there was anything."""
        jobs: list[Job] = []
        with self._locked():
            if self._is_closed:
                return False
            self._note_overdue()
            expired = self._onboarder.expired(self._clock())
            touched = self._spread_touches()
            has_news = [route.collect() for route in self._routes]
            for route in self._routes:
                while not self._lost and (job := route.emit()) is not None:
                    self._open(job, route.settle, self.limits.offload_timeout_s)
                    jobs.append(job)
                if self._lost:
                    route.drop_queue("executor_lost")
        self._send(jobs)
        for onboarding in expired:
            onboarding.transfer.done()  # looks at its deadline, for a waiter that only asked to be called back
        for pool in self.pools[1:]:
            self.records.touch(pool, touched)
        return bool(jobs) or any(has_news)

    def seconds_to_deadline(self) -> float | None:
        """How long until the time of an open job or of its waiter is over; None without one."""
        with self._locked():
            if self._is_closed:
                return None
            moments = [self._ledger.next_due_at(), self._onboarder.next_deadline()]
        due_at = min((moment for moment in moments if moment is not None), default=None)
        return None if due_at is None else max(0.0, due_at - self._clock())

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything that was registered before has gone as far down as it goes, or was dropped.

        Raises
        ------
        TransferTimeout
            It takes longer; the work goes on.
        """
        give_up = None if timeout_s is None else self._clock() + timeout_s
        for route in self._routes:
            with self._locked():
                route.collect(everything=True)
                seq = route.last_seq
            while True:
                self.pump()  # each settled job makes room for what still waits
                with self._locked():
                    if self._is_closed or route.is_done(seq):
                        break
                    remaining_s = None if give_up is None else give_up - self._clock()
                    if remaining_s is not None and remaining_s <= 0:
                        raise TransferTimeout(
                            f"offloads from {route.key[0].value} to {route.key[1].value} did not end within "
                            f"{timeout_s} s; they go on"
                        )
                    if len(self._ledger):
                        self._changed.wait(remaining_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Drop what waits, end every transfer, wait for what moves, close the pools; return whether it ended in time.

        What is answered later is let go of.
        """
        with self._locked():
            if self._is_closed:
                return not len(self._ledger)
            self._is_closed = True
            for route in self._routes:
                route.close()
            error = PoolClosed("the manager was closed while blocks were on their way")
            ends = [onboarding.finish(error) for onboarding in self._onboarder.loading]
            ends.append(partial(self.records.close, error))
            self._changed.notify_all()
        for end in ends:
            end()
        are_ended = [channel.close(timeout_s) for channel in self._channels]  # every one is given its time
        if not all(are_ended):
            _log.warning("close: executors still work num_jobs=%d; what they write into stays held", len(self._ledger))
        with self._locked():
            self._are_pools_closed = True
            for pool in self.pools:
                pool.close()
        return all(are_ended)

    # -- events ------------------------------------------------------------------------------------------------

    def add_log(self, log: MigrationLog) -> None:
        """Note in this log what is stored in another tier, from now on until it is closed."""
        with self._locked():
            self._logs = (*self._logs, log)

    def _moved(self, route: tuple[Tier, Tier], ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        if not all(log.is_open for log in self._logs):
            self._logs = tuple(log for log in self._logs if log.is_open)
        for log in self._logs:
            log.add(route, ids, hashes, parents)

    # -- looking -----------------------------------------------------------------------------------------------

    def statistics(self) -> PlannerStatistics:
        """Give the counts of this moment."""
        with self._locked():
            self._note_overdue()
            return self._statistics.copy()

    @property
    def num_open_jobs(self) -> int:
        """Jobs that were sent and are not settled."""
        return len(self._ledger)

    # -- private -----------------------------------------------------------------------------------------------

    def _usable_pools(self) -> Sequence[BlockPool]:
        return self.pools[:1] if self._lost else self.pools

    def _locked(self) -> AbstractContextManager[Any]:
        if self._lock._is_owned():
            raise PluginError("a policy, or a finaliser inside it, must not call back into the manager")
        return self._lock  # type: ignore[no-any-return]

    def _poke(self) -> None:
        if self._wake is not None:
            self._wake()

    def _open(self, job: Job, settle: Callable[[OpenJob], Iterable[After]], timeout_s: float) -> None:
        self._ledger.open(job, range(len(self._channels)), settle, now=self._clock(), timeout_s=timeout_s)

    def _send(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            for rank, channel in enumerate(self._channels):
                try:
                    channel.send(job)
                except PoolClosed as error:
                    outcomes = np.full(num_blocks_of(job), Outcome.FAILED, dtype=np.uint8)
                    self._receive(rank, JobResult(job_id=job.job_id, outcomes=outcomes, reason=str(error)))

    def _submit(self, jobs: Sequence[tuple[Job, Callable[[OpenJob], Iterable[After]]]]) -> None:
        with self._locked():
            for job, settle in jobs:
                self._open(job, settle, self.limits.offload_timeout_s)
        self._send(job for job, _ in jobs)

    def _receive(self, rank: int, result: JobResult) -> None:
        with self._locked():
            entry = self._ledger.answer(rank, result)
            ends = [] if entry is None else self._settle(entry)
        self._finish(ends)

    def _lose(self, rank: int, reason: str) -> None:
        with self._locked():
            if not self._is_closed:
                _log.error("executor lost rank=%d reason=%s", rank, reason)
                self._statistics.lost_executors += 1
                self._lost[rank] = reason
            ends = [end for entry in self._ledger.lose(rank, reason) for end in self._settle(entry)]
        self._finish(ends)

    def _settle(self, entry: OpenJob) -> list[After]:
        job = entry.job
        if isinstance(job, CopyJob):
            if entry.is_draining:
                self._statistics.route(job.source, job.destination).draining -= len(job.hashes)
            if num_corrupt := int((entry.outcomes == Outcome.CORRUPT).sum()):
                self._statistics.mismatches[job.source.value] += num_corrupt
        entry.is_too_late = self._are_pools_closed
        return list(entry.settle(entry))

    def _finish(self, ends: Iterable[After]) -> None:
        with self._locked():
            self._changed.notify_all()
        for end in ends:
            end()
        if any(route.counters.queued for route in self._routes):
            self._poke()

    def _note_overdue(self) -> None:
        for entry in self._ledger.overdue(self._clock()):
            if isinstance(entry.job, CopyJob):
                self._statistics.route(entry.job.source, entry.job.destination).draining += len(entry.job.hashes)
            _log.warning("job overdue job_id=%d kind=%s", entry.job.job_id, type(entry.job).__name__)

    def _spread_touches(self) -> list[HashArray]:
        """Tell lower tiers, and policies that count uses, what requests have found; give it."""
        touched = []
        while self._touches:
            hashes = self._touches.popleft()
            self._lineages.add(hashes)
            for pool in self.pools[1:]:
                pool.touch_blocks(hashes)
            for route in self._used:
                route.used(hashes)
            touched.append(hashes)
        return touched

    def _expire(self, onboarding: Onboarding) -> None:
        with self._locked():
            end = onboarding.finish()
        end()

    def _ended(self, onboarding: Onboarding) -> None:
        if onboarding.transfer.cancelled():
            with self._locked():
                onboarding.abandon()


def _reads_uses(policy: OffloadPolicy) -> bool:
    return type(policy).used is not OffloadPolicy.used
