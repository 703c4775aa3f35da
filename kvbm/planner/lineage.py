"""Which blocks came before a block, for those seen lately.

A tier evicts the block that was released first; blocks reach a lower tier in several jobs, the head of a request
before its tail. Whoever commits a job makes the blocks before it young again, so that leaves still leave first. The
planner's lock guards it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np

from kvbm.types import HashArray


class _Chain:
    """Hashes from a first block on, grown in place; several ends may lie in it."""

    def __init__(self, hashes: HashArray) -> None:
        self.data = hashes.copy()
        self.length = len(hashes)
        self.num_ends = 0

    def grow(self, hashes: HashArray) -> None:
        length = self.length + len(hashes)
        if length > len(self.data):
            room = np.empty((2 * length, 2), dtype=np.uint64)  # views of the former array stay as they are
            room[: self.length] = self.data[: self.length]
            self.data = room
        self.data[self.length : length] = hashes
        self.length = length


class Lineages:
    """Chains of hashes by the hashes where jobs ended, at most `max_blocks` in all, the oldest end forgotten first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._ends: OrderedDict[bytes, tuple[_Chain, int]] = OrderedDict()  # hash -> its chain and place in it, from 1

    def before(self, parents: HashArray) -> HashArray:
        """Give the chain that ends with the first of these parents; empty where it is not known."""
        end = self._ends.get(parents[0].tobytes()) if len(parents) else None
        return parents[:0] if end is None else end[0].data[: end[1]]

    def add(self, chain: HashArray) -> None:
        """Remember a chain: (num_blocks, 2) uint64, each the child of the one before."""
        if not len(chain) or len(chain) > self._max_blocks:
            return
        known = self._ends.get(chain[-1].tobytes())
        if known is not None and known[1] >= len(chain):
            self._ends.move_to_end(chain[-1].tobytes())
            return
        self._num_blocks += len(chain)
        self._note(_Chain(chain))

    def extend(self, parents: HashArray, hashes: HashArray) -> HashArray:
        """Remember blocks, of several requests perhaps, behind what is known of them; give what is known, in order."""
        starts = [0, *(np.flatnonzero((parents[1:] != hashes[:-1]).any(axis=1)) + 1).tolist(), len(hashes)]
        known = [self._extend(parents[start:end], hashes[start:end]) for start, end in itertools.pairwise(starts)]
        return np.concatenate(known)

    def _extend(self, parents: HashArray, hashes: HashArray) -> HashArray:
        before = self.before(parents)
        end = self._ends.get(parents[0].tobytes()) if len(parents) else None
        if end is None or end[0].length > end[1] or end[1] + len(hashes) > self._max_blocks:  # the first, or a branch
            self.add(np.concatenate([before, hashes]))
            return before
        chain = end[0]
        chain.grow(hashes)
        self._num_blocks += len(hashes)
        self._note(chain)
        return before

    def _note(self, chain: _Chain) -> None:
        """Name the end of a chain, and forget the oldest ends while there is too much."""
        key = chain.data[chain.length - 1].tobytes()
        chain.num_ends += 1  # first: the end that gives way may be its own
        self._forget(self._ends.pop(key, None))
        self._ends[key] = chain, chain.length
        while self._num_blocks > self._max_blocks or len(self._ends) > self._max_blocks:
            self._forget(self._ends.popitem(last=False)[1])

    def _forget(self, end: tuple[_Chain, int] | None) -> None:
        if end is not None:
            end[0].num_ends -= 1
            if not end[0].num_ends:
                self._num_blocks -= end[0].length
