"""The disk tier's storage: one preallocated file in a directory of its own, moved by threads, direct where possible."""

from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.counters import DiskCounters
from kvbm.storage.disk.storage import DiskStorage

__all__ = ["DiskCounters", "DiskStorage", "OsCalls"]
