"""Eviction policies: the base class to inherit, and one policy a file.

A policy sees ids, hashes and priorities of blocks that nobody holds, and says which leave next. It never sees bytes.
"""

from kvbm.eviction.base import EvictionPolicy
from kvbm.eviction.fifo import FifoPolicy
from kvbm.eviction.lru import LruPolicy

__all__ = ["EvictionPolicy", "FifoPolicy", "LruPolicy"]
