"""An eviction policy of your own: segmented LRU, which lets a one-time flood pass by blocks that were used twice.

A policy sees blocks that nobody holds: it hears of those that come and go, and says which leave next. To have it found
by name, register the class as an entry point of the group ``kvbm.eviction``. Run it:
``python examples/custom_eviction_policy.py``.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

import kvbm
from kvbm.eviction.base import EvictionPolicy
from kvbm.types import HashArray, IdArray


class SegmentedLru(EvictionPolicy):
    """Evict blocks used once before blocks used again, each oldest first."""

    def __init__(self) -> None:
        self._once: dict[int, bytes] = {}  # id -> hash, oldest first
        self._again: dict[int, bytes] = {}
        self._revived: dict[int, bytes] = {}  # taken by a request: they come back, or are gone for good

    def inserted(self, ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        for block_id, name in zip(ids.tolist(), hashes, strict=True):
            was_here = self._revived.pop(block_id, None) == name.tobytes()
            (self._again if was_here else self._once)[block_id] = name.tobytes()

    def removed(self, ids: IdArray) -> None:
        for block_id in ids.tolist():
            segment = self._once if block_id in self._once else self._again
            self._revived[block_id] = segment.pop(block_id)

    def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
        in_order = (block_id for segment in (self._once, self._again) for block_id in segment)
        victims = list(islice((block_id for block_id in in_order if block_id not in protected), n))
        for block_id in victims:
            (self._once if block_id in self._once else self._again).pop(block_id)
        return victims


def request(manager: kvbm.BlockManager, token_ids: range) -> int:
    """Match, compute what is missing, release; give the number of blocks that were cached."""
    sequence = manager.sequence(token_ids)
    blocks = manager.onboard(manager.match_sequence_hashes(sequence.hashes)).result()
    num_hits = len(blocks)
    parent = blocks[-1].sequence_hash if blocks else None
    fresh = manager.allocate_blocks(sequence.num_full_blocks - num_hits)
    (blocks + manager.register_blocks(fresh.complete(sequence.hashes[num_hits:], parent=parent))).release()
    return num_hits


def cached_after_flood(policy: str | EvictionPolicy) -> int:
    """Use a prefix of 8 blocks twice, push 32 other blocks through a pool of 24, and look for the prefix."""
    with kvbm.BlockManager(num_layers=1, page_size=16, inner_dim=8, device_blocks=24, policy=policy) as manager:
        prefix = range(128)
        request(manager, prefix)
        request(manager, prefix)
        for start in range(10_000, 14_000, 1000):
            request(manager, range(start, start + 128))
        manager.check()
        return request(manager, prefix)


lru, segmented = cached_after_flood("lru"), cached_after_flood(SegmentedLru())
print(f"cached blocks of the prefix after a flood: lru {lru} of 8, segmented lru {segmented} of 8")
assert (lru, segmented) == (0, 8)
