"""Time to live: blocks of a tier that nobody used for so long leave it.

Each pool that has a limit tells which slots are used (registered, matched, held, released, touched); the moment is kept
in a plain array, four bytes a slot. The pump looks at one window of it at a time, so its cost is bounded whatever the
size of the pool, and each block leaves between one limit and one limit and a sixteenth after its last use, a step of
the pump later at most. No lock: a use that races with the look restarts the time of a block, or comes too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Tier

_TICKS = 256  # a limit is that many: the moment of a use is known to half a percent of it
_LAST_TICK = 1 << 31  # then they are counted from a later moment
_NO_TICK = (1 << 32) - 1  # of a use later than can be counted
_WINDOW = 1 << 16  # slots looked at in one step
_CHUNK = 1024  # blocks that leave in one step
_LOOKS = 16  # in one limit


class Expiry:
    """The limits of a planner's pools.

    Parameters
    ----------
    pools : sequence of BlockPool
    ttls_s : mapping of Tier to float
        Seconds, more than 0; a tier that is not named keeps its blocks for ever.
    statistics : PlannerStatistics
        Counts what left.
    records : RecordKeeper
        Sees to it that no restart finds what left; nobody waits for that.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        ttls_s: Mapping[Tier, float],
        *,
        statistics: PlannerStatistics,
        records: RecordKeeper,
        clock: Callable[[], float],
    ) -> None:
        self._statistics = statistics
        self._records = records
        self._clock = clock
        self._watches = [_Watch(pool, ttls_s[pool.tier], clock) for pool in pools if pool.tier in ttls_s]

    def step(self) -> bool:
        """Look at one window of each pool whose turn it is; return whether there is more to do at once."""
        has_more = False
        for watch in self._watches:
            old = watch.look(self._clock())
            if len(old):
                self._forget(watch.pool, old)
            has_more |= watch.is_looking
        return has_more

    def _forget(self, pool: BlockPool, old: HashArray) -> None:
        # Of a keyed tier only a row goes: the bytes are others' too.
        has_records = pool.tier in self._records.tiers - self._records.keyed_tiers
        if has_records:
            self._records.begin_to_forget(pool.tier, old)
        is_gone = np.zeros(len(old), dtype=np.bool_)
        try:
            was_there = pool.lookup(old) >= 0
            pool.reset_blocks(old)
            is_gone = was_there & (pool.lookup(old) < 0)
        finally:
            if has_records:
                self._records.forget_gone(pool.tier, old, is_gone)
        self._statistics.expired[pool.tier.value] += int(is_gone.sum())

    def next_look(self) -> float | None:
        """When to step again; None where no pool has a limit."""
        return min((watch.looks_at for watch in self._watches), default=None)


class _Watch:
    """When the slots of one pool were last used."""

    def __init__(self, pool: BlockPool, ttl_s: float, clock: Callable[[], float]) -> None:
        if not 0 < ttl_s < math.inf:
            raise ConfigError(f"ttl of tier {pool.tier.value!r} is {ttl_s}, give seconds, more than 0 and finite")
        self.pool = pool
        self.looks_at = clock() + ttl_s
        self._ttl_s = ttl_s
        self._clock = clock
        self._began_at = clock()
        self._used_at: npt.NDArray[np.uint32] = np.zeros(pool.total_blocks, dtype=np.uint32)  # ticks; 0: not used yet
        self._place = 0  # where the next window begins
        pool.watch_uses(self._used)

    @property
    def is_looking(self) -> bool:
        """Whether it is in the middle of a look."""
        return self._place > 0

    def _used(self, ids: IdArray) -> None:
        self._used_at[ids] = self._tick(self._clock())

    def _tick(self, now: float) -> int:
        return min(1 + int((now - self._began_at) * _TICKS / self._ttl_s), _NO_TICK)

    def _begin_later(self, now: float) -> None:
        """Count ticks from a later moment, before they outgrow four bytes; what is old stays old."""
        num_ticks = int((now - self._began_at) * _TICKS / self._ttl_s) - 2 * _TICKS
        self._began_at += num_ticks * self._ttl_s / _TICKS
        used_at = self._used_at.astype(np.int64)
        is_used, is_beyond = used_at > 0, used_at == _NO_TICK
        self._used_at[is_used] = np.maximum(used_at[is_used] - num_ticks, 1)
        self._used_at[is_beyond] = 2 * _TICKS  # not long ago: nobody has looked since

    def look(self, now: float) -> HashArray:
        """Give hashes of old blocks of the next window, at most a chunk: (num_blocks, 2) uint64."""
        if now < self.looks_at and not self.is_looking:
            return np.empty((0, 2), dtype=np.uint64)
        if self._tick(now) > _LAST_TICK:
            self._begin_later(now)
        latest = self._tick(now)
        used_at = self._used_at[self._place : self._place + _WINDOW]
        (places,) = ((used_at > 0) & (used_at < max(0, latest - _TICKS))).nonzero()
        ids = (places[:_CHUNK] + self._place).astype(np.int32)
        if len(places) > _CHUNK:
            self._place = int(ids[-1]) + 1
        else:
            self._place += _WINDOW
        if self._place >= len(self._used_at):
            self._place = 0
            self.looks_at = now + self._ttl_s / _LOOKS
        hashes, _, _ = self.pool.describe_blocks(ids)
        self._used_at[ids] = latest  # free slots, and blocks in use, are not found again before their time
        return hashes[hashes.any(axis=1)]
