"""What waits to be offloaded, in order of registration: names, nothing held. The planner's lock guards it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from kvbm.types import HashArray, IdArray, Places


@dataclass
class Batch:
    """Blocks that wait, in order of registration."""

    ids: IdArray
    hashes: HashArray
    parents: HashArray
    seq: int  # of the first block's outbox row

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Places) -> Batch:
        """Give some of the blocks."""
        return Batch(
            self.ids.take(places), self.hashes.take(places, axis=0), self.parents.take(places, axis=0), self.seq
        )

    def split(self, n: int) -> tuple[Batch, Batch]:
        """Give the first n blocks, and the others."""
        return (
            Batch(self.ids[:n], self.hashes[:n], self.parents[:n], self.seq),
            Batch(self.ids[n:], self.hashes[n:], self.parents[n:], self.seq),
        )


class OffloadQueue:
    """Batches by order of registration; how many blocks may wait is the caller's to see to."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self.num_blocks = 0

    @property
    def first_seq(self) -> int | None:
        """Outbox row of the first that waits, None when nothing does."""
        return self._batches[0].seq if self._batches else None

    def push(self, batch: Batch) -> None:
        """Add blocks at the end."""
        self._batches.append(batch)
        self.num_blocks += len(batch)

    def take(self, n: int) -> Batch:
        """Take up to n blocks off the front, at least one, of several requests where one has fewer."""
        parts: list[Batch] = []
        while self._batches and n > 0:
            head = self._batches.popleft()
            if len(head) > n:
                head, rest = head.split(n)
                self._batches.appendleft(rest)
            parts.append(head)
            n -= len(head)
        batch = parts[0]
        if len(parts) > 1:
            batch = Batch(
                np.concatenate([part.ids for part in parts]),
                np.concatenate([part.hashes for part in parts]),
                np.concatenate([part.parents for part in parts]),
                batch.seq,
            )
        self.num_blocks -= len(batch)
        return batch

    def forget(self, gone: set[bytes]) -> int:
        """Drop blocks with these names; give how many there were."""
        former = self.num_blocks
        batches, self._batches, self.num_blocks = self._batches, deque(), 0
        for batch in batches:
            places = np.array([i for i, key in enumerate(keys_of(batch.hashes)) if key not in gone], dtype=np.intp)
            if len(places):
                self.push(batch.take(places))
        return former - self.num_blocks

    def clear(self) -> int:
        """Drop everything; give how many blocks there were."""
        num_blocks, self.num_blocks = self.num_blocks, 0
        self._batches.clear()
        return num_blocks


def keys_of(hashes: HashArray) -> list[bytes]:
    """Give hashes as 16 bytes each, to look up in sets."""
    return np.ascontiguousarray(hashes).view("V16").ravel().tolist()  # type: ignore[no-any-return]
