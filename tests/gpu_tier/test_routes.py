"""The plan of few blocks, made by the way, is the one that `plan_copy` makes; the path of one block is chosen once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_site import KINDS, NUM_BLOCKS, layout_of
from hypothesis import given
from hypothesis import strategies as st

from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.errors import LayoutError
from kvbm.gpu import Gpu
from kvbm.layout import BoundLayout
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell, PathTable
from kvbm.transfer.queueing import GpuMeans
from kvbm.transfer.routes import RouteCache
from kvbm.transfer.scratch import ScratchPool

_FIELDS = ("source_blocks", "destination_blocks", "source_pieces", "destination_pieces")


def bound(kind: str, base: int, **changes: Any) -> BoundLayout:
    layout = layout_of(kind, **changes)
    return layout.bind([base + (i << 32) for i in range(layout.num_buffers)])


def means_of(gpu: Any, *path: str) -> GpuMeans:
    table = PathTable(tuple(Cell(direction, 0, 1, path or PATHS) for direction in DIRECTIONS))
    return GpuMeans(gpu, table, ScratchPool(gpu))


def outcome(ask: Callable[[], CopyPlan]) -> Any:
    """Give the plan, or what is said against it."""
    try:
        return ask()
    except LayoutError as error:
        return str(error)


_SOME = st.lists(st.integers(-1, NUM_BLOCKS), max_size=11)


@given(kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), here=_SOME, there=_SOME, wide=st.booleans())
def test_plan_of_a_route_is_that_of_plan_copy(
    kinds: tuple[str, str], here: list[int], there: list[int], wide: bool
) -> None:
    ends = bound(kinds[0], 4096), bound(kinds[1], 1 << 40)
    blocks = [np.array(numbers, dtype=np.int64 if wide else np.int32) for numbers in (here, there)]
    gpu: Any = None  # planning asks no device
    route = RouteCache(means_of(gpu)).between(*ends)
    expected, plan = (outcome(ask) for ask in (lambda: plan_copy(*ends, *blocks), lambda: route.plan(*blocks)))
    if isinstance(expected, str):
        assert plan == expected
        return
    assert (plan.kind, plan.piece_nbytes) == (expected.kind, expected.piece_nbytes)
    for name in _FIELDS:
        mine, theirs = getattr(plan, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        assert mine.tolist() == theirs.tolist()


def test_path_of_one_block_is_that_of_any_other(simulated: SimulatedGpu) -> None:
    gpu: Gpu = simulated.gpu
    table = PathTable((Cell("up", 0, 1, ("memcpy",)), Cell("up", 0, 7, ("kernel",))))
    means = GpuMeans(gpu, table, ScratchPool(gpu))
    route = RouteCache(means).between(bound("contiguous", 0), bound("outer_first", 1 << 40))
    for block in (0, 5, 0):
        plan = route.plan(np.array([block]), np.array([7 - block]))
        assert route.path_of(plan, "up") == means.path_of(plan, "up", is_pinned=True) == "memcpy"
    many = route.plan(np.array([0, 3]), np.array([3, 1]))
    assert route.path_of(many, "up") == means.path_of(many, "up", is_pinned=True) == "kernel"


def test_routes_are_kept_by_layout_and_not_without_end() -> None:
    gpu: Any = None
    cache = RouteCache(means_of(gpu))
    here, there = bound("contiguous", 0), bound("contiguous", 1 << 40)
    route = cache.between(here, there)
    assert cache.between(here, there) is route
    assert cache.between(there, here) is not route
    for i in range(200):
        cache.between(bound("contiguous", i << 20), there)
    assert len(cache._routes) <= 64
    with pytest.raises(LayoutError, match="not the same block"):
        cache.between(here, bound("contiguous", 0, num_layers=2))
