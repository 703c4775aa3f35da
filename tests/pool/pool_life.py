"""Hashes by name, and shorthand for the life of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from kvbm.pool import BlockPool
from kvbm.types import HashArray

MakePool = Callable[..., BlockPool]


def hashes_of(names: Iterable[int]) -> HashArray:
    return np.array([[name + 1, name + 1000] for name in names], dtype=np.uint64).reshape(-1, 2)


def keep(pool: BlockPool, names: Iterable[int]) -> None:
    """Register names and let go of them as one request."""
    hashes = hashes_of(names)
    pool.register_blocks(pool.allocate_blocks(len(hashes)).complete(hashes)).release()


def present(pool: BlockPool, names: Iterable[int]) -> list[bool]:
    return (pool.lookup(hashes_of(names)) >= 0).tolist()
