"""Prefetch: blocks on their way to a tier where nobody waits for them yet; and how a request joins them there.

A `Staging` is an onboarding without a request: it holds what has arrived until all has, and then lets go of it in one
piece, so that leaves leave first. A `Relay` is the other way round: a request that found a block being staged waits for
it there, and goes on from there to the top. The planner's lock guards both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.jobs import Transfer
from kvbm.planner.hit import HitPart
from kvbm.planner.ledger import After
from kvbm.planner.onboarding import Onboarding
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Places


class Prefetch(Transfer[int]):
    """Blocks that are being brought up in the background; its result is how many have arrived.

    `cancel` stops what has not begun; what moves arrives all the same. At its deadline it ends with what is there. It
    stays open while an object store is asked for blocks that are not known to be there.

    Attributes
    ----------
    accepted : int
        Blocks that will be brought: they lie below, and have room.
    asked : int
        Blocks that only an object store may have, and that it has not answered for yet; then each counts as one of the
        others. What is left of them at the end was not answered in time.
    clipped : int
        Blocks that lie below and will not be brought, because as many as may be are on their way
        (``offload.prefetch_blocks``, and a quarter of the tier), or because the tier has no room; and those that an
        object store might have and is not asked for, because it is asked for as many. Ask again later.
    rejected : int
        Blocks that need not or cannot be brought: they are in the tier or above it, or on their way there, or in no
        tier at all, or given twice.
    """

    def __init__(
        self,
        *,
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_deadline: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(deadline_s=deadline_s, clock=clock, on_deadline=on_deadline)
        self.accepted = self.asked = self.clipped = self.rejected = 0

    def __repr__(self) -> str:
        counts = f"accepted={self.accepted}, clipped={self.clipped}, rejected={self.rejected}"
        if self.asked:
            counts += f", asked={self.asked}"
        return f"Prefetch({self.state.value}, {counts})"


class Staging(Onboarding):
    """Collects what a prefetch brings, holding it only until all is there.

    Parameters
    ----------
    pool : BlockPool
        Where the blocks come to.
    hashes : (num_blocks, 2) uint64
    transfer : Prefetch
    deadline : float
        Moment of the planner's clock.
    """

    is_background = True

    def __init__(self, pool: BlockPool, hashes: HashArray, transfer: Prefetch, *, deadline: float) -> None:
        super().__init__(pool, hashes, transfer, deadline=deadline)
        self.prefetch = transfer
        self.num_questions = 0  # to object stores, that are not answered
        self.num_arrived = 0
        self.settled: Callable[[], object] = _nothing  # told once nothing of it moves

    def add(self, places: Places, blocks: ImmutableBlocks) -> None:
        """Count blocks that have arrived, and hold them while others are on their way."""
        self.num_arrived += len(blocks)
        super().add(places, blocks)

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it moves, and nothing more may come."""
        return not self.num_open and (self.is_over or not self.num_questions)

    def finish(self, error: BaseException | None = None) -> After:
        """Let go of what has arrived; give what ends the transfer."""
        end = super().finish(error)
        if self.is_settled:
            self.settled()
        return end

    def _collect(self) -> int:
        self.let_go()
        return self.num_arrived

    def _end_with(self, result: int) -> None:
        self.transfer.set_result(result, has_landed=self.is_settled)

    def let_go(self) -> None:
        """Release what has arrived, the deepest block first."""
        places, blocks = self.take_pieces()
        if blocks is not None:
            blocks.reordered(np.argsort(places)).release()


class Relay(Onboarding):
    """Blocks of an onboarding that a prefetch brings half of the way.

    Parameters
    ----------
    pool : BlockPool
        Where the prefetch brings them.
    owner : Onboarding
        Has counted this as one open job.
    part : HitPart
        Where they lie: from there they are loaded where the prefetch fails.
    indices : (num_blocks,) int
        Which blocks of the part.
    target : MutableBlocks
        Slots in the top tier, one for each.
    go_on : callable
        Told, without the planner's lock, when the prefetch has answered.
    """

    def __init__(
        self,
        pool: BlockPool,
        owner: Onboarding,
        part: HitPart,
        indices: Places,
        *,
        target: MutableBlocks,
        go_on: Callable[[Relay], None],
    ) -> None:
        super().__init__(pool, owner.hashes, owner.transfer, deadline=owner.deadline)
        self.owner = owner
        self.part = part
        self.indices = indices
        self.target = target
        self._go_on = go_on

    @property
    def waiter(self) -> Onboarding:
        """The onboarding that waits."""
        return self.owner

    def finish(self, error: BaseException | None = None) -> After:
        """Give what goes on with the way up."""
        return partial(self._go_on, self)


def _nothing() -> None:
    pass
