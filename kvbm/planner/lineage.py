"""Which blocks came before a block, for those seen lately.

A tier evicts the block that was released first; blocks reach a lower tier in several jobs, the head of a request
before its tail. Whoever commits a job makes the blocks before it young again, so that leaves still leave first. The
planner's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from kvbm.types import HashArray


class Lineages:
    """Chains of hashes by their last hash, at most `max_blocks` hashes in all, the oldest chain forgotten first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._chains: OrderedDict[bytes, HashArray] = OrderedDict()  # last hash -> the chain that ends with it

    def before(self, parents: HashArray) -> HashArray:
        """Give the chain that ends with the first of these parents; empty where it is not known."""
        chain = self._chains.get(parents[0].tobytes()) if len(parents) else None
        return parents[:0] if chain is None else chain

    def add(self, chain: HashArray) -> None:
        """Remember a chain: (num_blocks, 2) uint64, each the child of the one before."""
        if not len(chain) or len(chain) > self._max_blocks:
            return
        key = chain[-1].tobytes()
        known = self._chains.pop(key, chain[:0])
        kept = chain if len(chain) >= len(known) else known
        self._num_blocks += len(kept) - len(known)
        self._chains[key] = kept
        while self._num_blocks > self._max_blocks:
            self._num_blocks -= len(self._chains.popitem(last=False)[1])

    def extend(self, parents: HashArray, hashes: HashArray) -> HashArray:
        """Remember hashes behind what is known of them; give what is known."""
        before = self.before(parents)
        self.add(np.concatenate([before, hashes]) if len(before) else hashes)
        return before
