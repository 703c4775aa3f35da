"""Copies between the top pool and memory whose slots an engine owns: the engine names its slots, we name ours.

Nothing here takes, frees or remembers a slot of the engine's: it holds them until the transfer of a copy has landed.
What comes in is registered in the top pool, and goes down from there as everything does. The planner's lock guards it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.errors import ConfigError, length_mismatch
from kvbm.jobs import CopyJob, Outcome, Transfer
from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.dispatch import Dispatcher, Unsent
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.queue import keys_of
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Places, Tier, hash_array, id_array

_log = logging.getLogger("kvbm.planner")

Mask = npt.NDArray[np.bool_]


class EngineCopy(Transfer[Mask]):
    """A copy from or to an engine's memory.

    Attributes
    ----------
    job_ids : list of int
        Of the jobs that move its blocks; empty where nothing is to be moved.
    """

    def __init__(self, *, deadline_s: float | None = None, clock: Callable[[], float]) -> None:
        super().__init__(deadline_s=deadline_s, clock=clock)
        self.job_ids: list[int] = []


class _Errand:
    """What one call asked for: the jobs that are open, and what came of the others."""

    def __init__(self, num_blocks: int, transfer: EngineCopy) -> None:
        self.transfer = transfer
        self.good: Mask = np.zeros(num_blocks, dtype=np.bool_)
        self.num_open = 0

    def fail(self, error: BaseException) -> None:
        """End the transfer with an error, while its bytes may move."""
        self.transfer.set_exception(error, has_landed=False)

    def end(self) -> None:
        """End the transfer; its waiter may have gone."""
        self.transfer.set_landed()
        self.transfer.set_result(self.good)


@dataclass
class _Out:
    """One open job to the engine's memory."""

    errand: _Errand
    places: Places
    blocks: ImmutableBlocks
    hashes: HashArray


@dataclass
class _In:
    """One open job from the engine's memory."""

    errand: _Errand
    places: Places
    target: MutableBlocks
    hashes: HashArray
    parents: HashArray
    keys: list[bytes]
    is_unwanted: bool = False  # forgotten meanwhile


class ForeignTier:
    """An engine's memory above the top pool.

    Parameters
    ----------
    pool : BlockPool
        The top pool.
    tier : Tier
        Name of the engine's memory in jobs and counters; above the pool's.
    dispatcher : Dispatcher
    limits : Limits
    statistics : PlannerStatistics
    next_id : callable
        Gives job numbers.
    need_open : callable
        Raises `PoolClosed` once the planner is closed.
    moved : callable
        Told of blocks that were stored in the pool: route, slots there, hashes, parents.
    complaints : Complaints
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        tier: Tier = Tier.DEVICE,
        dispatcher: Dispatcher,
        limits: Limits,
        statistics: PlannerStatistics,
        next_id: Callable[[], int],
        need_open: Callable[[], None],
        moved: Callable[[tuple[Tier, Tier], IdArray, HashArray, HashArray], None],
        complaints: Complaints,
        clock: Callable[[], float],
    ) -> None:
        if pool.tier is tier:
            raise ConfigError(f"the top pool is {tier.value!r} itself, give an engine's memory another tier")
        self.tier = tier
        self._pool = pool
        self._dispatcher = dispatcher
        self._limits = limits
        self._statistics = statistics
        self._next_id = next_id
        self._need_open = need_open
        self._moved = moved
        self._complaints = complaints
        self._clock = clock
        self._out: dict[int, _Out] = {}
        self._in: dict[int, _In] = {}
        self._saving: dict[bytes, _In] = {}  # names on their way into the pool

    # -- from the pool -----------------------------------------------------------------------------------------

    def load(self, blocks: ImmutableBlocks, slots: IdArray, *, timeout_s: float | None = None) -> EngineCopy:
        """Copy blocks of the pool into slots of the engine's, and take over their guard.

        Parameters
        ----------
        blocks : ImmutableBlocks
            Of the top pool.
        slots : (num_blocks,) int32
        timeout_s : float, optional
            Default: ``runtime.onboard_timeout_s``.

        Returns
        -------
        EngineCopy
            Of a (num_blocks,) bool mask: where the bytes are good. A slot is the engine's to reuse once it has landed,
            whenever it ended for its waiter. Copies whose source was bad are discarded there.
        """
        ids: IdArray = id_array(slots).astype(np.int32)
        if len(ids) != len(blocks):
            raise length_mismatch("slots", len(ids), len(blocks))
        timeout_s = self._limits.onboard_timeout_s if timeout_s is None else timeout_s
        errand = _Errand(len(ids), EngineCopy(deadline_s=timeout_s, clock=self._clock))
        if not len(ids):
            blocks.release()
            errand.end()
            return errand.transfer
        unsent: Unsent = deque()
        try:
            with self._dispatcher.locked():
                self._need_open()
                for start in range(0, len(ids), self._limits.job_blocks):
                    part = slice(start, min(start + self._limits.job_blocks, len(ids)))
                    mine = blocks
                    if part.stop < len(ids):
                        mine, blocks = blocks.split(part.stop - start)
                    self._open_out(
                        errand, mine, np.arange(part.start, part.stop), ids[part], timeout_s=timeout_s, unsent=unsent
                    )
        except BaseException:
            self._dispatcher.give_up(unsent)
            raise
        self._dispatcher.send(unsent)
        return errand.transfer

    def _open_out(
        self,
        errand: _Errand,
        blocks: ImmutableBlocks,
        places: Places,
        slots: IdArray,
        *,
        timeout_s: float,
        unsent: Unsent,
    ) -> None:
        ids = blocks.block_ids
        hashes, _, _ = self._pool.describe_blocks(ids)
        job = CopyJob(
            job_id=self._next_id(),
            source=self._pool.tier,
            destination=self.tier,
            source_ids=ids,
            destination_ids=slots,
            hashes=hashes,
            timeout_s=timeout_s,
            is_urgent=True,
        )
        self._out[job.job_id] = _Out(errand, places, blocks, hashes)
        errand.num_open += 1
        errand.transfer.job_ids.append(job.job_id)
        self._statistics.route(job.source, job.destination).in_flight += len(ids)
        self._dispatcher.open(job, self._settle_out, timeout_s, unsent)

    def _settle_out(self, entry: OpenJob) -> Iterable[After]:
        load = self._out.pop(entry.job.job_id)
        ok = entry.ok
        self._count(entry, self._pool.tier, self.tier, len(ok), int(np.count_nonzero(ok)))
        load.errand.good[load.places] = ok
        if not entry.is_too_late:
            if not ok.all():
                self._discard(load, entry)
            load.blocks.release()
        return self._ended(load.errand)

    def _discard(self, load: _Out, entry: OpenJob) -> None:
        """Unpublish copies that are bad; those that could not be brought in time may be good."""
        is_bad = entry.outcomes == Outcome.CORRUPT
        if is_bad.any():
            bad, _ = self._pool.hold_blocks(load.blocks.block_ids[is_bad], load.hashes[is_bad])
            self._pool.discard_blocks(bad)
            bad.release()
        _log.log(
            self._complaints.level("load incomplete"),
            "load incomplete source=%s num_blocks=%d num_good=%d num_corrupt=%d reason=%s",
            self._pool.tier.value, len(load.places), int(entry.ok.sum()), int(is_bad.sum()), entry.reason,
        )  # fmt: skip

    # -- into the pool -----------------------------------------------------------------------------------------

    def save(
        self,
        slots: IdArray,
        hashes: HashArray,
        parents: HashArray,
        *,
        timeout_s: float | None = None,
    ) -> EngineCopy:
        """Copy slots of the engine's into the pool, as many of the leading ones as have room, and register them there.

        Parameters
        ----------
        slots : (num_blocks,) int32
        hashes, parents : (num_blocks, 2) uint64
        timeout_s : float, optional
            Default: ``runtime.offload_timeout_s``.

        Returns
        -------
        EngineCopy
            Of a (num_blocks,) bool mask: which were brought by this call. What is there already, or on its way, is not
            brought again. The slots are the engine's to reuse once it has landed.
        """
        ids: IdArray = id_array(slots).astype(np.int32)
        names, before = hash_array(hashes), hash_array(parents)
        if not len(ids) == len(names) == len(before):
            raise length_mismatch("slots", len(ids), len(names))
        timeout_s = self._limits.offload_timeout_s if timeout_s is None else timeout_s
        errand = _Errand(len(ids), EngineCopy(deadline_s=timeout_s, clock=self._clock))
        unsent: Unsent = deque()
        try:
            with self._dispatcher.locked():
                self._need_open()
                places = self._wanted(names)
                target = self._room_for(len(places))
                places = places[: 0 if target is None else len(target)]
                while target is not None and len(places):
                    num_blocks = min(len(places), self._limits.job_blocks)
                    mine, target = target.split(num_blocks) if num_blocks < len(places) else (target, None)
                    now, places = places[:num_blocks], places[num_blocks:]
                    load = _In(errand, now, mine, names[now], before[now], keys_of(names[now]))
                    self._open_in(load, ids[now], timeout_s, unsent)
        except BaseException:
            self._dispatcher.give_up(unsent)
            raise
        if not errand.num_open:
            errand.end()
        self._dispatcher.send(unsent)
        return errand.transfer

    def is_saving(self, hashes: HashArray) -> Mask:
        """Tell which blocks are on their way into the pool."""
        with self._dispatcher.locked():
            return np.array([key in self._saving for key in keys_of(hash_array(hashes))], dtype=np.bool_)

    def _wanted(self, names: HashArray) -> Places:
        """Give the places of what is neither there nor on its way, each name once."""
        counters = self._statistics.route(self.tier, self._pool.tier)
        (absent,) = (self._pool.lookup(names) < 0).nonzero()
        wanted: dict[bytes, int] = {}
        for key, place in zip(keys_of(names[absent]), absent.tolist(), strict=True):
            if key not in self._saving:
                wanted.setdefault(key, place)
        counters.present += len(names) - len(wanted)
        return np.array(list(wanted.values()), dtype=np.intp)

    def _room_for(self, n: int) -> MutableBlocks | None:
        """Take blocks to fill, at most a part of the pool at once; what has no room is dropped and counted."""
        counters = self._statistics.route(self.tier, self._pool.tier)
        most = max(1, int(self._limits.in_flight_share * self._pool.total_blocks)) - counters.in_flight
        room = max(0, min(n, most, self._pool.available_blocks))
        target = self._pool.try_allocate_blocks(room) if room else None
        if num_dropped := n - (0 if target is None else len(target)):
            counters.dropped["no_room"] += num_dropped
        return target

    def _open_in(self, load: _In, slots: IdArray, timeout_s: float, unsent: Unsent) -> None:
        job = CopyJob(
            job_id=self._next_id(),
            source=self.tier,
            destination=self._pool.tier,
            source_ids=slots,
            destination_ids=load.target.block_ids,
            hashes=load.hashes,
            timeout_s=timeout_s,
        )
        self._in[job.job_id] = load
        self._saving.update(dict.fromkeys(load.keys, load))
        load.errand.num_open += 1
        load.errand.transfer.job_ids.append(job.job_id)
        self._statistics.route(job.source, job.destination).in_flight += len(slots)
        self._dispatcher.open(job, self._settle_in, timeout_s, unsent)

    def _settle_in(self, entry: OpenJob) -> Iterable[After]:
        load = self._in.pop(entry.job.job_id)
        for key in load.keys:
            if self._saving.get(key) is load:
                del self._saving[key]
        ok = entry.ok
        num_good = int(np.count_nonzero(ok))
        self._count(entry, self.tier, self._pool.tier, len(ok), num_good)
        if entry.is_too_late or load.is_unwanted:
            load.target.release()
            return self._ended(load.errand)
        arrived, hashes, parents = load.target, load.hashes, load.parents
        if num_good < len(ok):
            arrived, lost = load.target.partition(ok)
            lost.release()
            hashes, parents = hashes[ok], parents[ok]
        if num_good:
            stored = self._pool.register_blocks(arrived.complete(hashes, parents=parents))
            self._moved((self.tier, self._pool.tier), stored.block_ids, hashes, parents)
            stored.release()
        load.errand.good[load.places] = ok
        return self._ended(load.errand)

    def forget_all(self) -> None:
        """Let nothing of what is on its way into the pool be registered there, under the lock."""
        for load in self._in.values():
            load.is_unwanted = True
        self._saving.clear()  # it may be saved anew meanwhile

    # -- both --------------------------------------------------------------------------------------------------

    @property
    def is_loading(self) -> bool:
        """Whether blocks are on their way to the engine."""
        return bool(self._out)

    @property
    def num_open(self) -> int:
        """Jobs that were sent and are not settled."""
        return len(self._out) + len(self._in)

    def end_all(self, error: BaseException) -> list[After]:
        """Give what ends every transfer with this error, under the lock; the bytes may move on."""
        open_ones = [load.errand for load in self._out.values()] + [load.errand for load in self._in.values()]
        errands = {id(errand): errand for errand in open_ones}
        return [partial(errand.fail, error) for errand in errands.values()]

    def _count(self, entry: OpenJob, source: Tier, destination: Tier, num_blocks: int, num_good: int) -> None:
        counters = self._statistics.route(source, destination)
        counters.in_flight -= num_blocks
        counters.blocks += num_good
        counters.nbytes += entry.nbytes
        counters.observe(entry.label, entry.seconds)
        for outcome, num_lost in entry.losses:
            counters.dropped[outcome] += num_lost

    def _ended(self, errand: _Errand) -> Iterable[After]:
        errand.num_open -= 1
        return [errand.end] if not errand.num_open else []
