"""One onboarding: from a Hit to the leading blocks in the top tier, whatever becomes of each of them on the way.

Blocks lie in the top tier already, are loaded by jobs of this onboarding, or are joined where another one loads them.
It ends when all of them are settled, or at its deadline with what is there by then; jobs that are still open go on, and
their blocks stay in the top tier for the next request. The planner's lock guards it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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

    is_background = False  # no request waits for it

    def __init__(self, top: BlockPool, hashes: HashArray, transfer: Transfer[Any], *, deadline: float) -> None:
        self.hashes = hashes
        self.deadline = deadline
        self.transfer = transfer
        self.num_open = 0  # jobs, own and joined, that are not settled
        self.sources: list[HitPart] = []  # held until all is settled
        self.pool = top
        self._end: Callable[[], None] | None = None  # what ends the transfer, until somebody does
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
    def waiter(self) -> Onboarding:
        """The onboarding whose transfer somebody waits for: this one."""
        return self

    @property
    def is_settled(self) -> bool:
        """Whether no job of it is open."""
        return self.num_open == 0

    def finish(self, error: BaseException | None = None) -> Callable[[], None]:
        """Stop collecting; give what ends the transfer, to be called once the planner's lock is free."""
        if not self.is_over:
            if error is None:
                self._end = partial(self._end_with, self._collect())
            else:
                self.let_go()
                self._end = partial(self._fail, error)
            self.is_over = True  # last: whoever is interrupted on the way leaves it to the next
        return self._end_again

    def _end_again(self) -> None:
        """End the transfer; whoever should have may have been interrupted, or be about to."""
        end = self._end
        if end is not None:
            end()
            self._end = None
        if self.is_settled and self.transfer.done():
            self.transfer.set_landed()

    def _collect(self) -> Any:
        """Give the result: what is there, in order."""
        return self._assemble()

    def _end_with(self, result: Any) -> None:
        has_ended = self.transfer.set_result(result, has_landed=self.is_settled)
        if not has_ended and self.transfer.state is not TransferState.DONE:  # it was cancelled meanwhile
            result.release()

    def _fail(self, error: BaseException) -> None:
        self.transfer.set_exception(error, has_landed=self.is_settled)

    def abandon(self) -> None:
        """Let go of everything: the transfer was cancelled."""
        if not self.is_over and self.transfer.state is TransferState.CANCELLED:
            self.is_over = True
            self.let_go()

    def let_go(self) -> None:
        """Release what has arrived."""
        for _, blocks in self._pieces:
            blocks.release()
        self._pieces.clear()

    def unpublish(self) -> None:
        """Have nobody find the blocks that are held here."""
        for part in self.sources:
            part.pool.discard_blocks(part.blocks)
        for _, blocks in self._pieces:
            self.pool.discard_blocks(blocks)

    def take_pieces(self) -> tuple[Places, ImmutableBlocks | None]:
        """Take out what has arrived, as one guard, and the place of each block; None where nothing has."""
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return np.empty(0, dtype=np.intp), None
        places, whole = pieces[0]
        for more, blocks in pieces[1:]:
            places, whole = np.concatenate([places, more]), whole + blocks
        return places, whole

    def _assemble(self) -> ImmutableBlocks:
        """Make one guard over the leading blocks, in order; let go of those behind a hole."""
        is_one = len(self._pieces) == 1
        places, whole = self.take_pieces()
        if whole is None:
            return ImmutableBlocks(self.pool, np.empty(0, dtype=np.int32), self.hashes[:0])
        if is_one and len(places) == len(self.hashes):  # each place once, rising
            return whole
        if not is_one and (places[:-1] > places[1:]).any():  # those of one piece rise
            order = np.argsort(places)
            places, whole = places[order], whole.reordered(order)
        num_leading = first_true(places != np.arange(len(places)))
        if num_leading < len(whole):
            whole, rest = whole.split(num_leading)
            rest.release()
        return whole
