"""A hypothesis state machine that drives a pool beside a model of plain dicts, and checks it after every step.

Subclass it and override `make_pool` to prove a pool of another kind, then run ``PoolStateMachine.TestCase`` or
hypothesis's ``run_state_machine_as_test``.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm.blocks import CompleteBlocks, ImmutableBlocks, MutableBlocks
from kvbm.pool import BlockPool
from kvbm.types import HashArray

NUM_BLOCKS = 10
NAMES = st.lists(st.integers(0, 14), max_size=5)


class PoolStateMachine(RuleBasedStateMachine):
    """Allocate, complete, register, match, release, reset, touch and discard at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.make_pool()
        self.mutable: list[MutableBlocks] = []
        self.complete: list[tuple[CompleteBlocks, list[int]]] = []
        self.held: list[tuple[ImmutableBlocks, list[int]]] = []
        self.references: dict[int, int] = {}  # registered name -> guards that hold it, counted by entry
        self.order: dict[int, None] = {}  # inactive names, first to be evicted first
        self.num_used = 0  # mutable and complete blocks

    def make_pool(self) -> BlockPool:
        """Give a pool of `NUM_BLOCKS` blocks with the default policy."""
        return BlockPool(NUM_BLOCKS)

    @rule(n=st.integers(0, 6))
    def allocate(self, n: int) -> None:
        """Allocate; the model evicts its oldest names."""
        num_free = NUM_BLOCKS - self.num_used - len(self.references)
        blocks = self.pool.try_allocate_blocks(n)
        if n > num_free + len(self.order):
            assert blocks is None
            return
        assert blocks is not None
        for name in list(self.order)[: max(0, n - num_free)]:
            del self.order[name]
            del self.references[name]
        self.mutable.append(blocks)
        self.num_used += n

    @precondition(lambda self: self.mutable)
    @rule(data=st.data())
    def complete_blocks(self, data: st.DataObject) -> None:
        """Name the blocks of a mutable guard."""
        blocks = self.mutable.pop(data.draw(st.integers(0, len(self.mutable) - 1)))
        names = data.draw(st.lists(st.integers(0, 14), min_size=len(blocks), max_size=len(blocks)))
        self.complete.append((blocks.complete(_hashes(names)), names))

    @precondition(lambda self: self.complete)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        """Publish; a name that is there already folds."""
        blocks, names = self.complete.pop(data.draw(st.integers(0, len(self.complete) - 1)))
        self.held.append((self.pool.register_blocks(blocks), names))
        self.num_used -= len(names)
        for name in names:
            self._hold(name)

    @rule(names=NAMES)
    def match(self, names: list[int]) -> None:
        """Match finds exactly the registered prefix."""
        prefix: list[int] = []
        for name in names:
            if name not in self.references:
                break
            prefix.append(name)
        blocks = self.pool.match_sequence_hashes(_hashes(names))
        assert len(blocks) == len(prefix)
        for name in prefix:
            self._hold(name)
        self.held.append((blocks, prefix))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_dropped=st.booleans())
    def release(self, data: st.DataObject, is_dropped: bool) -> None:
        """Release a guard, or let the garbage collector do it."""
        blocks, names = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if is_dropped:
            del blocks
            assert self.pool.available_blocks >= 0  # any call gives back what was dropped
        else:
            blocks.release()
        for name in reversed(names):
            self.references[name] -= 1
            if self.references[name] == 0:
                self.order[name] = None

    @precondition(lambda self: self.mutable)
    @rule()
    def release_mutable(self) -> None:
        """Give blocks back unfilled."""
        blocks = self.mutable.pop()
        self.num_used -= len(blocks)
        blocks.release()

    @rule(names=NAMES)
    def reset(self, names: list[int]) -> None:
        """Reset tells of each distinct name once."""
        answer = self.pool.reset_blocks(_hashes(names))
        distinct = set(names)
        idle = {name for name in distinct if name in self.order}
        assert len(answer.reset) == len(idle)
        assert len(answer.not_found) == len(distinct - set(self.references))
        assert len(answer.in_use) == len(distinct) - len(answer.reset) - len(answer.not_found)
        for name in idle:
            del self.order[name]
            del self.references[name]

    @rule(names=NAMES)
    def touch(self, names: list[int]) -> None:
        """Touch makes inactive names young, the last entry first."""
        assert self.pool.touch_blocks(_hashes(names)) == sum(name in self.references for name in names)
        for name in reversed(names):
            if name in self.order:
                del self.order[name]
                self.order[name] = None

    @rule()
    def reset_all(self) -> None:
        """Clear only when nothing is held."""
        if self.num_used or len(self.order) != len(self.references):
            return
        assert self.pool.reset() == len(self.order)
        self.order.clear()
        self.references.clear()

    @invariant()
    def pool_equals_model(self) -> None:
        """Compare counts, and check that the store keeps its invariants."""
        self.pool.check()
        status = self.pool.status()
        assert status.inactive == len(self.order)
        assert status.active == len(self.references) - len(self.order)
        assert status.mutable + status.complete == self.num_used
        assert status.free == NUM_BLOCKS - self.num_used - len(self.references)

    def _hold(self, name: int) -> None:
        self.references[name] = self.references.get(name, 0) + 1
        self.order.pop(name, None)


def _hashes(names: list[int]) -> HashArray:
    return np.array([[name, name + 100] for name in names], dtype=np.uint64).reshape(-1, 2)
