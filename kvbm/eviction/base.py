"""The contract of an eviction policy.

The store calls a policy in batches while it holds its lock. A policy must not call the pool back (`PluginError`), and
need not lock. What it forgets or invents is caught: ``pop`` is checked before anything is evicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray, IdArray


class EvictionPolicy(ABC):
    """Decides which inactive block leaves next."""

    is_builtin = False  # True where the store's own LRU does this policy's work

    @abstractmethod
    def inserted(self, ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Take note of blocks that became inactive.

        Parameters
        ----------
        ids : (num_blocks,) int32, host
            In the order in which they should leave: the deepest block of a request comes first.
        hashes : (num_blocks, 2) uint64, host
        priorities : (num_blocks,) uint8, host
            0 to 100; higher is kept longer.
        """

    @abstractmethod
    def removed(self, ids: IdArray) -> None:
        """Forget blocks that were revived, reset or discarded; (num_blocks,) int32, host."""

    @abstractmethod
    def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
        """Choose and forget exactly n distinct inactive blocks, first to leave first, none of them protected.

        Notes
        -----
        A wrong answer raises `PluginError` at the caller of the pool; the blocks that were named are given back by
        `inserted` in the order returned.
        """

    def touched(self, ids: IdArray) -> None:  # noqa: B027  (a policy may ignore recency)
        """Take note of inactive blocks that were used again, oldest first; ignored unless overridden."""

    def prioritised(self, ids: IdArray, priorities: npt.NDArray[np.uint8]) -> None:  # noqa: B027
        """Take note of new priorities of inactive blocks; ignored unless overridden."""
