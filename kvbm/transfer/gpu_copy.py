"""One copy of whole blocks on a GPU: what it queues, and how its checksums are compared with those that are kept.

Checksums are always computed on the device's side, in the source's order of bytes: memory there is some hundred times
faster to read than over the bus. A copy that permutes has the destination's own computed anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.transfer.engine import CopyResult
from kvbm.transfer.queueing import Checksums, Queueing
from kvbm.transfer.routes import Route
from kvbm.transfer.sides import Side, are_pinned, direction_of
from kvbm.types import HashArray

if TYPE_CHECKING:
    from kvbm._backend import Stream


class CopyJob:
    """One copy: what is queued for it, and what becomes of its checksums.

    Parameters
    ----------
    plan : CopyPlan
    source, destination : Side
        One of them at least is a GPU's. Making this waits for host memory that is still being pinned.
    names : (num_blocks, 2) uint64, optional
        Sequence hashes; None computes no checksums.
    route : Route, optional
        Of the two storages: remembers what the copy of one block need not find out again.
    """

    def __init__(
        self, plan: CopyPlan, source: Side, destination: Side, names: HashArray | None, route: Route | None = None
    ) -> None:
        self.plan = plan
        self.source = source
        self.destination = destination
        self.direction = direction_of(source, destination)
        self._is_pinned = are_pinned(source, destination)
        self._route = route
        self._names = names if names is not None and _uses_checksums(source, destination) else None
        self._found: Checksums | None = None  # in the source's order
        self._kept: Checksums | None = None  # in the destination's, where that differs

    def queue(self, stream: Stream, parts: Queueing) -> None:
        """Queue everything."""
        plan, names = self.plan, self._names
        is_permute = plan.kind == "permute"
        if is_permute and self._is_pinned:
            parts.permute(stream, self.source, self.destination, range(self.source.storage.layout.num_layers))
            if names is not None:
                self._found = checksum_on_device(stream, parts, self.source, self.destination, names)
        else:
            sides, path = (self.source, self.destination), None
            if self._route is not None and self._is_pinned:
                path = self._route.path_of(plan, self.direction)
            self._found = parts.copy(stream, plan, sides, is_pinned=self._is_pinned, hashes=names, path=path)
        if is_permute and names is not None and self.destination.storage.keeps_checksums:
            self._kept = checksum_on_device(stream, parts, self.destination, self.source, names)

    def conclude(self) -> CopyResult:
        """Compare what was found with what the source keeps, and let the destination keep it."""
        return conclude(self.plan, self.source, self.destination, self._found, self._kept)


def _uses_checksums(source: Side, destination: Side) -> bool:
    """Tell whether there is one to compare with, or a place to keep it."""
    if destination.storage.keeps_checksums:
        return True
    return source.storage.keeps_checksums and bool(source.storage.has_checksum[source.ids].any())


def checksum_on_device(stream: Stream, parts: Queueing, order: Side, other: Side, hashes: HashArray) -> Checksums:
    """Queue the checksums of blocks in one side's order, read on whichever side is the device's."""
    at = order if order.gpu is not None else other
    plan = plan_copy(order.storage.bound, at.storage.bound, order.ids, at.ids)
    return parts.checksum(stream, plan.destination_blocks, plan.destination_pieces, plan.piece_nbytes, hashes)


def conclude(
    plan: CopyPlan, source: Side, destination: Side, found: Checksums | None, kept: Checksums | None
) -> CopyResult:
    """Compare checksums in the source's order with those it keeps; the destination keeps its own where all is good."""
    good = np.ones(plan.num_blocks, dtype=np.bool_)
    if found is not None:
        if source.storage.keeps_checksums:
            has_one = source.storage.has_checksum[source.ids]
            good = ~has_one | (source.storage.checksums[source.ids] == found)
        if destination.storage.keeps_checksums:
            checksums = found if kept is None else kept
            destination.storage.checksums[destination.ids[good]] = checksums[good]
            destination.storage.has_checksum[destination.ids[good]] = True
    return CopyResult(plan.num_blocks, plan.nbytes, good)
