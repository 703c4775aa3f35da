"""Pins: blocks held for some time in the tier they lie in, whatever else needs the room.

One reference a pinned block. A bounded share of each pool can be pinned, so that pins never stop a request for good.
What is over is let go by the planner's pump. The planner's lock guards it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks
from kvbm.errors import BlockStateError, ConfigError
from kvbm.planner.hit import find_sources
from kvbm.planner.queue import keys_of
from kvbm.pool import BlockPool
from kvbm.types import HashArray, hash_array

_SPARE_ENDS = 4  # of batches without blocks, that are left in the heap


@dataclass(eq=False)
class _Batch:
    """Blocks of one pool that were pinned together, as far as they are pinned still."""

    pool: BlockPool
    blocks: ImmutableBlocks
    until: float  # moment of the planner's clock


class Pins:
    """Every pin of a planner.

    Parameters
    ----------
    pools : sequence of BlockPool
        From the top tier down.
    share : float
        Part of each pool that may be pinned, rounded down.
    locked : callable
        Gives the planner's lock, to be entered.
    need_open : callable
        Raises `PoolClosed` once the planner is closed.
    poke : callable
        Wakes whoever pumps: there is a new moment to wait for.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        *,
        share: float,
        locked: Callable[[], AbstractContextManager[Any]],
        need_open: Callable[[], None],
        poke: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._pools = tuple(pools)
        self._room = {id(pool): int(share * pool.total_blocks) for pool in pools}  # blocks that may still be pinned
        self._locked = locked
        self._need_open = need_open
        self._poke = poke
        self._clock = clock
        self._batch_of: dict[bytes, _Batch] = {}  # hash -> the one batch that pins it
        self._ends: list[tuple[float, int, _Batch]] = []  # a heap; a batch without blocks is passed over
        self._num_dead = 0  # of those
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._batch_of)

    def num_pinned(self, pool: BlockPool) -> int:
        """Count the pinned blocks of a pool."""
        with self._locked():
            return self._count(pool)

    def pin(self, hashes: HashArray, ttl_s: float) -> int:
        """Hold blocks in the highest tier that has each; see `BlockManager.pin`."""
        if not 0 < ttl_s < math.inf:
            raise ConfigError(f"ttl is {ttl_s}, give seconds, more than 0 and finite; unpin to let go before")
        names = hash_array(hashes)
        with self._locked():
            self._need_open()
            until = self._clock() + ttl_s
            names, num_pinned = self._without_longer(names, until)
            where, ids = find_sources(self._pools, names)
            for index, pool in enumerate(self._pools):
                (places,) = (where == index).nonzero()
                if len(places):
                    places = places[self._have_room(pool, names.take(places, axis=0))]
                    blocks, _ = pool.hold_blocks(ids.take(places), names.take(places, axis=0))
                    self._let_go(set(keys_of(blocks.hashes)) & self._batch_of.keys())  # held anew before
                    self._add(_Batch(pool, blocks, until))
                    num_pinned += len(blocks)
        self._poke()
        return num_pinned

    def unpin(self, hashes: HashArray | None = None) -> int:
        """Let go of these blocks, or of all; return how many were pinned."""
        with self._locked():
            if hashes is None:
                num_blocks = sum([self._drop(batch) for batch in self._batches()])
            else:
                keys = keys_of(hash_array(hashes))
                num_blocks = self._let_go({key for key in keys if key in self._batch_of})
            self._compact()
            return num_blocks

    def expire(self) -> int:
        """Let go of what is over; return how many blocks."""
        num_blocks = 0
        with self._locked():
            while self._ends and self._ends[0][0] <= self._clock():
                num_blocks += self._drop(self._ends[0][2])
                self._pop()
        return num_blocks

    def next_end(self) -> float | None:
        """When the next pin is over, under the lock; None without one."""
        while self._ends and not self._ends[0][2].blocks.is_live:
            self._pop()
        return self._ends[0][0] if self._ends else None

    def refuse_reset(self, pool: BlockPool) -> None:
        """Raise `BlockStateError` where blocks of a pool are pinned."""
        num_pinned = self.num_pinned(pool)
        if num_pinned:
            raise BlockStateError(
                f"cannot reset pool {pool.name!r}: {num_pinned} blocks are pinned, unpin() them first or wait until "
                "their time is over"
            )

    # -- private, under the lock -------------------------------------------------------------------------------

    def _count(self, pool: BlockPool) -> int:
        return sum([len(batch.blocks) for batch in self._batches() if batch.pool is pool])

    def _batches(self) -> list[_Batch]:
        return list({id(batch): batch for batch in self._batch_of.values()}.values())

    def _without_longer(self, names: HashArray, until: float) -> tuple[HashArray, int]:
        """Give each name once that is not pinned for that long yet, in order, and count the others."""
        wanted = {key: place for place, key in reversed(list(enumerate(keys_of(names))))}
        longer = [key for key in wanted if (batch := self._batch_of.get(key)) is not None and batch.until >= until]
        for key in longer:
            del wanted[key]
        return names.take(np.array(sorted(wanted.values()), dtype=np.intp), axis=0), len(longer)

    def _have_room(self, pool: BlockPool, names: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which of these blocks of a pool may be pinned: those that are already, and the first others."""
        batches = [self._batch_of.get(key) for key in keys_of(names)]
        is_new = np.array([batch is None or batch.pool is not pool for batch in batches], dtype=np.bool_)
        mask: npt.NDArray[np.bool_] = ~is_new | (np.cumsum(is_new) <= self._room[id(pool)])
        return mask

    def _add(self, batch: _Batch) -> None:
        keys = keys_of(batch.blocks.hashes)
        if not keys:
            batch.blocks.release()
            return
        self._batch_of.update(dict.fromkeys(keys, batch))
        self._room[id(batch.pool)] -= len(keys)
        self._compact()
        heapq.heappush(self._ends, (batch.until, next(self._numbers), batch))

    def _pop(self) -> None:
        """Take the next end off the heap; its batch has no blocks any more."""
        heapq.heappop(self._ends)
        self._num_dead -= 1

    def _compact(self) -> None:
        """Forget the ends of batches that were let go of before their time, once most are of that kind."""
        if self._num_dead > _SPARE_ENDS and 2 * self._num_dead > len(self._ends):
            self._ends = [end for end in self._ends if end[2].blocks.is_live]
            heapq.heapify(self._ends)
            self._num_dead = 0

    def _let_go(self, keys: set[bytes]) -> int:
        """Let go of some pinned blocks; those of a batch as one guard, so that leaves leave first."""
        if not keys:
            return 0
        for batch in list({id(self._batch_of[key]): self._batch_of[key] for key in keys}.values()):
            gone = np.array([key in keys for key in keys_of(batch.blocks.hashes)], dtype=np.bool_)
            leaving, batch.blocks = batch.blocks.partition(gone)
            self._room[id(batch.pool)] += len(leaving)
            leaving.release()
            if not len(batch.blocks):
                batch.blocks.release()
                self._num_dead += 1
        for key in keys:
            del self._batch_of[key]
        return len(keys)

    def _drop(self, batch: _Batch) -> int:
        if not batch.blocks.is_live:
            return 0
        keys = keys_of(batch.blocks.hashes)
        for key in keys:
            del self._batch_of[key]
        self._room[id(batch.pool)] += len(keys)
        batch.blocks.release()
        self._num_dead += 1
        return len(keys)
