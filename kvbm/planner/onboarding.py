"""One onboarding: from a Hit to the leading blocks in the top tier, whatever becomes of each of them on the way.

Blocks lie in the top tier already, are loaded by jobs of this onboarding, or are joined where another one loads them.
It ends when all of them are settled, or at its deadline with what is there by then; jobs that are still open go on, and
their blocks stay in the top tier for the next request. The planner's lock guards it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from kvbm.blocks import ImmutableBlocks
from kvbm.jobs import Transfer, TransferState
from kvbm.planner.hit import HitPart, first_true
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Places


class Onboarding:
    """Collects the blocks of one hit in the top tier.

    Parameters
    ----------
    top : BlockPool
    hashes : (num_blocks, 2) uint64
    transfer : Transfer of ImmutableBlocks
    deadline : float
        Moment of the planner's clock.
    """

    def __init__(
        self, top: BlockPool, hashes: HashArray, transfer: Transfer[ImmutableBlocks], *, deadline: float
    ) -> None:
        self.hashes = hashes
        self.deadline = deadline
        self.transfer = transfer
        self.num_open = 0  # jobs, own and joined, that are not settled
        self.sources: list[HitPart] = []  # held until all is settled
        self._top = top
        self._pieces: list[tuple[Places, ImmutableBlocks]] = []
        self.is_begun = False  # it has taken over the parts of its hit
        self.is_over = False  # nobody waits any more

    def add(self, places: Places, blocks: ImmutableBlocks) -> None:
        """Take over blocks that are in the top tier; let go of them at once when nobody waits any more."""
        if self.is_over:
            blocks.release()
            return
        self._pieces.append((places, blocks))

    @property
    def is_settled(self) -> bool:
        """Whether no job of it is open."""
        return self.num_open == 0

    def finish(self, error: BaseException | None = None) -> Callable[[], None]:
        """Stop collecting; give what ends the transfer, to be called once the planner's lock is free."""
        if self.is_over:
            if self.is_settled:
                return self.transfer.set_landed
            return _nothing
        self.is_over = True
        has_landed = self.is_settled
        if error is not None:
            for _, blocks in self._pieces:
                blocks.release()
            self._pieces.clear()
            return partial(_fail, self.transfer, error, has_landed)
        blocks = self._assemble()

        def end() -> None:
            if not self.transfer.set_result(blocks, has_landed=has_landed):
                blocks.release()  # it was cancelled meanwhile
                if has_landed:
                    self.transfer.set_landed()

        return end

    def abandon(self) -> None:
        """Let go of everything: the transfer was cancelled."""
        if not self.is_over and self.transfer.state is TransferState.CANCELLED:
            self.is_over = True
            for _, blocks in self._pieces:
                blocks.release()
            self._pieces.clear()

    def _assemble(self) -> ImmutableBlocks:
        """Make one guard over the leading blocks, in order; let go of those behind a hole."""
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return ImmutableBlocks(self._top, np.empty(0, dtype=np.int32), self.hashes[:0])
        places, whole = pieces[0]
        if len(places) == len(self.hashes):  # each place once, rising
            return whole
        for more, blocks in pieces[1:]:
            places, whole = np.concatenate([places, more]), whole + blocks
        if len(pieces) > 1 and (places[:-1] > places[1:]).any():  # those of one piece rise
            order = np.argsort(places)
            places, whole = places[order], whole.reordered(order)
        num_leading = first_true(places != np.arange(len(places)))
        if num_leading < len(whole):
            whole, rest = whole.split(num_leading)
            rest.release()
        return whole


def _fail(transfer: Transfer[ImmutableBlocks], error: BaseException, has_landed: bool) -> None:
    transfer.set_exception(error, has_landed=has_landed)


def _nothing() -> None:
    pass
