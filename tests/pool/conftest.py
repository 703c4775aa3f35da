"""Pools on each twin."""

from __future__ import annotations

import pytest
from pool_life import MakePool

from kvbm._backend import Backend
from kvbm.pool import BlockPool


@pytest.fixture
def make_pool(backend: Backend) -> MakePool:
    def make(num_blocks: int, **options: object) -> BlockPool:
        return BlockPool(num_blocks, backend=backend, **options)  # type: ignore[arg-type]

    return make
