"""The two sides of a copy: a storage and its blocks each, and what that says of the copy before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvbm.copyplan import AddressArray
from kvbm.gpu import Gpu
from kvbm.storage.base import Storage
from kvbm.types import IdArray

_NO_SEGMENTS: AddressArray = np.empty(0, dtype=np.uint64)


class Side:
    """One side of a copy: a storage and its blocks.

    Parameters
    ----------
    storage : Storage
    ids : (num_blocks,) int32
        Copied: the caller may reuse its array.

    Attributes
    ----------
    gpu : Gpu or None
        The GPU whose memory this is, None for host memory.
    """

    def __init__(self, storage: Storage, ids: IdArray) -> None:
        self.storage = storage
        self.ids: IdArray = np.array(ids, dtype=np.int32)
        self.gpu: Gpu | None = getattr(storage, "gpu", None) if storage.capabilities.is_gpu else None

    @property
    def segment_starts(self) -> AddressArray:
        """Where allocations of somebody else's begin, which no plain copy may cross: (num_segments,) uint64."""
        starts: AddressArray = getattr(self.storage, "segment_starts", _NO_SEGMENTS)
        return starts

    def wait_pinned(self) -> bool:
        """Tell whether a GPU may use this memory directly, having waited until it is pinned where it will be."""
        if self.gpu is not None:
            return True
        pinned = getattr(self.storage, "pinned", None)
        if pinned is not None and pinned.is_complete:
            return True
        wait = getattr(self.storage, "wait_pinned", None)
        return bool(wait is not None and wait(self.ids))


def memory_of(storage: Storage) -> Any:
    """Give what keeps a storage's bytes alive, to be taken before its addresses are asked for."""
    return getattr(storage, "owners" if storage.capabilities.is_gpu else "buffers", None)


def streams_of(side: Side) -> Sequence[Any]:
    """Give the streams of those who read and write a side's memory, None for the default one: copies wait for them."""
    streams: Sequence[Any] = getattr(side.storage, "streams", ()) if side.gpu is not None else ()
    return streams


def direction_of(source: Side, destination: Side) -> str:
    """Tell which way bytes go: "down", "up" or "across"; one side at least is a GPU's."""
    if destination.gpu is None:
        return "down"
    return "up" if source.gpu is None else "across"


def are_pinned(*sides: Side) -> bool:
    """Tell whether a GPU may use the memory of all sides directly; waits for what is still being pinned."""
    return not [side for side in sides if not side.wait_pinned()]
