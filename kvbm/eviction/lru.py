"""Least recently used, within the lowest priority first: the default policy.

Both stores have it built in, where it costs no call into Python; the class here does the same in plain Python, is what
the name ``lru`` loads, and is what tests compare the built-in one with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvbm.eviction.base import EvictionPolicy
from kvbm.types import HashArray, IdArray


class LruPolicy(EvictionPolicy):
    """Evict the lowest priority's least recently released block, deeper blocks of one release before shallower.

    Parameters
    ----------
    is_builtin : bool
        True lets the store use its own implementation; False makes it call this one.
    """

    def __init__(self, *, is_builtin: bool = True) -> None:
        self.is_builtin = is_builtin
        self._queues: dict[int, dict[int, None]] = {}  # priority -> ids, oldest first
        self._priority_of: dict[int, int] = {}

    def inserted(self, ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Queue ids at the young end of their priority."""
        for block_id, priority in zip(ids.tolist(), priorities.tolist(), strict=True):
            self._queues.setdefault(priority, {})[block_id] = None
            self._priority_of[block_id] = priority

    def removed(self, ids: IdArray) -> None:
        """Drop ids."""
        for block_id in ids.tolist():
            del self._queues[self._priority_of.pop(block_id)][block_id]

    def touched(self, ids: IdArray) -> None:
        """Move ids to the young end."""
        for block_id in ids.tolist():
            queue = self._queues[self._priority_of[block_id]]
            del queue[block_id]
            queue[block_id] = None

    def prioritised(self, ids: IdArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Move ids to the young end of another priority."""
        for block_id, priority in zip(ids.tolist(), priorities.tolist(), strict=True):
            if self._priority_of[block_id] != priority:
                del self._queues[self._priority_of[block_id]][block_id]
                self._queues.setdefault(priority, {})[block_id] = None
                self._priority_of[block_id] = priority

    def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
        """Take the n that leave first, and walk no further."""
        in_order = (block_id for priority in sorted(self._queues) for block_id in self._queues[priority])
        victims = list(islice((block_id for block_id in in_order if block_id not in protected), n))
        for block_id in victims:
            del self._queues[self._priority_of.pop(block_id)][block_id]
        return victims
