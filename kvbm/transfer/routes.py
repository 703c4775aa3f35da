"""What copies between the same two storages have in common: how a block is cut, and which path one block takes.

A copy of one small block costs about as much as its checks, so what does not depend on the blocks is found out once.
The few-block plan here is that of `plan_copy`, which also says what is wrong where something is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.layout import BoundLayout
from kvbm.transfer.queueing import GpuMeans
from kvbm.types import IdArray

_FEW = 8  # blocks up to which Python's integers are quicker than NumPy's calls
_MOST_ROUTES = 64
_NOTHING: IdArray = np.empty(0, dtype=np.int32)


class Route:
    """Copies from one bound layout to another.

    Parameters
    ----------
    means : GpuMeans
    source, destination : BoundLayout

    Raises
    ------
    LayoutError
        They hold different blocks.
    """

    def __init__(self, means: GpuMeans, source: BoundLayout, destination: BoundLayout) -> None:
        self._means = means
        self._ends = source, destination
        self._empty = plan_copy(source, destination, _NOTHING, _NOTHING)
        self._num_blocks = source.layout.num_blocks, destination.layout.num_blocks
        self._strides = source.layout.strides.block, destination.layout.strides.block
        self._path = ""  # of one block in pinned memory, once it was chosen

    def plan(self, source_ids: IdArray, destination_ids: IdArray) -> CopyPlan:
        """Plan a copy; as `plan_copy`, with the same errors."""
        if not (_are_few(source_ids) and _are_few(destination_ids)):
            return plan_copy(*self._ends, source_ids, destination_ids)
        here, there = source_ids.tolist(), destination_ids.tolist()
        is_right = (
            len(here) == len(there) == len(set(there))
            and 0 <= min(here) <= max(here) < self._num_blocks[0]
            and 0 <= min(there) <= max(there) < self._num_blocks[1]
        )
        if not is_right:
            return plan_copy(*self._ends, source_ids, destination_ids)
        step, pace = self._strides
        return CopyPlan(
            self._empty.kind,
            source_blocks=np.array([i * step for i in here], dtype=np.uint64),
            destination_blocks=np.array([i * pace for i in there], dtype=np.uint64),
            source_pieces=self._empty.source_pieces,
            destination_pieces=self._empty.destination_pieces,
            piece_nbytes=self._empty.piece_nbytes,
        )

    def path_of(self, plan: CopyPlan, direction: str) -> str:
        """Choose how to copy a plan of this route between memories that the device may use directly."""
        if plan.num_blocks != 1:
            return self._means.path_of(plan, direction, is_pinned=True)
        if not self._path:  # where a block lies does not matter to the shape of its copy
            self._path = self._means.path_of(plan, direction, is_pinned=True)
        return self._path


class RouteCache:
    """The routes of an engine, by the pair of layouts.

    Parameters
    ----------
    means : GpuMeans
    """

    def __init__(self, means: GpuMeans) -> None:
        self._means = means
        self._routes: dict[tuple[int, int], Route] = {}  # a route holds its layouts, so their numbers stay theirs

    def between(self, source: BoundLayout, destination: BoundLayout) -> Route:
        """Give the route between two layouts; the same objects have the same one. Raises as `Route`."""
        key = id(source), id(destination)
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes = {}
            route = self._routes[key] = Route(self._means, source, destination)
        return route


def _are_few(ids: Any) -> bool:
    return isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu" and 0 < len(ids) <= _FEW
