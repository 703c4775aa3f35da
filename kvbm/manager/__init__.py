"""BlockManager: the facade that introduces bookkeeping to bytes.

For each tier it has a pool and a storage; a planner decides what moves, an executor moves it, and both work in the
background. Safe to use from several threads: everything mutable lives in the pools, the planner and the storages.
"""

from kvbm.manager.facade import BlockManager

__all__ = ["BlockManager"]
