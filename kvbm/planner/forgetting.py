"""Forgetting everything without waiting for anybody: for callers whose executors answer only when they go on.

The books forget at once, so that nobody finds a block again. What moves into a pool is let go of when it arrives. Tiers
with records are told when the last write to them has landed, and nothing new is sent there until they have answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kvbm.planner.dispatch import Dispatcher
from kvbm.planner.foreign import ForeignTier
from kvbm.planner.loading import Loader
from kvbm.planner.offload import OffloadRoute
from kvbm.planner.pins import Pins
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import Tier


class Forgetter:
    """Forgets every block of a planner's.

    Parameters
    ----------
    pools : sequence of BlockPool
    routes : sequence of OffloadRoute
    foreign : ForeignTier, optional
    loader : Loader
    pins : Pins
    records : RecordKeeper
    dispatcher : Dispatcher
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        routes: Sequence[OffloadRoute],
        *,
        foreign: ForeignTier | None,
        loader: Loader,
        pins: Pins,
        records: RecordKeeper,
        dispatcher: Dispatcher,
    ) -> None:
        self._pools = tuple(pools)
        self._routes = tuple(routes)
        self._foreign = foreign
        self._loader = loader
        self._pins = pins
        self._records = records
        self._dispatcher = dispatcher
        self._waiting: set[Tier] = set()  # tiers to be told once nothing moves there

    def can_forget(self) -> bool:
        """Whether no request waits for blocks: those that are being loaded for one cannot be forgotten.

        Raises
        ------
        BlockStateError
            Blocks are pinned.
        """
        for pool in self._pools:
            self._pins.refuse_reset(pool)
        with self._dispatcher.locked():
            is_waited_for = any(not (one.is_background or one.is_over) for one in self._loader.loading())
            return not is_waited_for and (self._foreign is None or not self._foreign.is_loading)

    def forget_all(self) -> bool:
        """Forget every block of every tier; return whether it was done, see `can_forget`.

        Blocks that others hold stay until those let go of them. A process that ends before the executors of tiers
        with records have answered (`is_forgetting`) may find their blocks when it starts again.
        """
        if not self.can_forget():
            return False
        self._loader.stop_prefetches()
        with self._dispatcher.locked():
            self._loader.forget_all()
            if self._foreign is not None:
                self._foreign.forget_all()
            for route in self._routes:
                route.forget_all()
            for pool in self._pools:
                _, hashes, _, _ = pool.registered()
                pool.reset_blocks(hashes)
            for tier in self._records.tiers - self._records.shut:
                self._pause(tier, 1)
                self._waiting.add(tier)
                self._records.shut.add(tier)
        self.step()
        return True

    @property
    def is_forgetting(self) -> bool:
        """Whether executors have yet to be told, or to answer."""
        return bool(self._records.shut)

    def step(self) -> None:
        """Tell the executors of tiers that nothing moves to any more."""
        if not self._waiting:
            return
        with self._dispatcher.locked():
            moving = {route.destination.tier for route in self._routes if route.counters.in_flight}
            quiet, self._waiting = self._waiting - moving, self._waiting & moving
        for tier in quiet:
            self._records.forget_all_later(tier, partial(self._open, tier))

    def _open(self, tier: Tier) -> None:
        """Take a tier into use again, under the lock."""
        for pool in self._pools:
            if pool.tier is tier:
                _, hashes, _, _ = pool.registered()  # what was learnt meanwhile of a store that others share
                pool.reset_blocks(hashes)
        self._pause(tier, -1)
        self._records.shut.discard(tier)

    def _pause(self, tier: Tier, change: int) -> None:
        for route in self._routes:
            if route.destination.tier is tier:
                route.pauses += change
