"""First in, first out: the worked example of a policy in Python.

The block that became inactive first leaves first; being used again does not help it, only being revived does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvbm.eviction.base import EvictionPolicy
from kvbm.types import HashArray, IdArray


class FifoPolicy(EvictionPolicy):
    """Evict in order of arrival.

    Examples
    --------
    >>> from kvbm.pool import BlockPool
    >>> pool = BlockPool(8, policy=FifoPolicy())
    """

    def __init__(self) -> None:
        self._queue: dict[int, None] = {}  # a dict keeps the order of arrival

    def inserted(self, ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Queue ids at the young end."""
        self._queue.update(dict.fromkeys(ids.tolist()))

    def removed(self, ids: IdArray) -> None:
        """Drop ids from the queue."""
        for block_id in ids.tolist():
            del self._queue[block_id]

    def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
        """Take the n oldest, and walk no further."""
        victims = list(islice((block_id for block_id in self._queue if block_id not in protected), n))
        for block_id in victims:
            del self._queue[block_id]
        return victims
