"""What the tests of a slab's index share: a file that indexes are opened on, blocks that say their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT, Header
from kvbm.storage.disk.index import SlabIndex
from kvbm.types import HashArray, IdArray

HEADER = Header(150, 288, 4096, 1, 0, 0, "a model")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class IndexFile:
    """A file that indexes are opened on, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.clock = Clock()

    def open(
        self, header: Header = HEADER, *, on_mismatch: str = "refuse", os_calls: OsCalls | None = None
    ) -> SlabIndex:
        """Open it as a slab does; whoever had it before is gone without a word."""
        index = SlabIndex(
            self.fd,
            header,
            on_mismatch=on_mismatch,
            os_calls=os_calls or OsCalls(),
            path=str(self.path),
            clock=self.clock,
        )
        os.ftruncate(self.fd, RECORDS_AT + header.num_slots * RECORD_NBYTES)
        index.begin()
        return index

    def close(self) -> None:
        os.close(self.fd)


def ids(*slots: int) -> IdArray:
    return np.array(slots, dtype=np.int32)


def names(*numbers: int) -> HashArray:
    """Name blocks so that both halves of a name matter."""
    return np.array([[number // 2, number % 2] for number in numbers], dtype=np.uint64).reshape(-1, 2)


def put(index: SlabIndex, slots: Sequence[int], numbers: Sequence[int], priority: int = 50) -> None:
    hashes = names(*numbers)
    levels = np.full(len(slots), priority, dtype=np.uint8)
    index.put(ids(*slots), hashes, hashes + np.uint64(1000), checksums_of(numbers), levels)


def checksums_of(numbers: Sequence[int]) -> Any:
    return np.array([number * 7919 for number in numbers], dtype=np.uint64)


def found(index: SlabIndex) -> list[tuple[int, int]]:
    """Give (slot, number) of each block, used longest ago first; all it says of them is right."""
    slots, records = index.live()
    numbers = [int(high) * 2 + int(low) for high, low in records["hash"]]
    assert records["checksum"].tolist() == checksums_of(numbers).tolist()
    assert records["parent"].tolist() == (records["hash"] + np.uint64(1000)).tolist()
    assert index.holds(slots, np.ascontiguousarray(records["hash"])).all()
    return list(zip(slots.tolist(), numbers, strict=True))
