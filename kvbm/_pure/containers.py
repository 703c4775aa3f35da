"""The parts of the reference store: block records, free list, LRU queue, outbox.

Plain and separate so that each can be read alone; the native store holds the same four in one piece of memory. None
of them locks: the store that owns them does.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.types import DEFAULT_PRIORITY, OUTBOX_DTYPE, BlockState, OutboxKind

ZERO = bytes(16)


@dataclass(slots=True)
class BlockRecord:
    """What a store knows of one block."""

    state: BlockState = BlockState.FREE
    references: int = 0
    priority: int = DEFAULT_PRIORITY
    hash: bytes = ZERO
    parent: bytes = ZERO
    is_discarded: bool = False  # unpublished while still referenced


class FreeList:
    """First-in first-out queue of free ids; ids never used yet are a watermark, not entries."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._next_unused = 0
        self._returned: deque[int] = deque()

    def __len__(self) -> int:
        return self.num_blocks - self._next_unused + len(self._returned)

    def __iter__(self) -> Iterator[int]:
        yield from range(self._next_unused, self.num_blocks)
        yield from self._returned

    def take(self, n: int) -> list[int]:
        """Take the n ids that have been free longest."""
        unused = min(n, self.num_blocks - self._next_unused)
        ids = list(range(self._next_unused, self._next_unused + unused))
        self._next_unused += unused
        ids.extend(self._returned.popleft() for _ in range(n - unused))
        return ids

    def put(self, ids: Sequence[int]) -> None:
        """Append ids that became free."""
        self._returned.extend(ids)

    def remove(self, ids: Sequence[int]) -> None:
        """Take exactly these ids out; cost grows with the free list (warm restart only)."""
        wanted = set(ids)
        remaining = [block_id for block_id in self if block_id not in wanted]
        self._next_unused = self.num_blocks
        self._returned = deque(remaining)


class LruQueue:
    """Inactive ids by priority, then by age; the lowest priority's oldest leaves first."""

    def __init__(self) -> None:
        self._queues: dict[int, OrderedDict[int, None]] = {}
        self._priority_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._priority_of)

    def __iter__(self) -> Iterator[int]:
        """Give the ids in eviction order."""
        for priority in sorted(self._queues):
            yield from self._queues[priority]

    def priority_of(self, block_id: int) -> int:
        """Give the priority under which an id is queued."""
        return self._priority_of[block_id]

    def inserted(self, ids: Sequence[int], priorities: Sequence[int]) -> None:
        """Add ids at the young end, oldest first."""
        for block_id, priority in zip(ids, priorities, strict=True):
            self._queues.setdefault(priority, OrderedDict())[block_id] = None
            self._priority_of[block_id] = priority

    def removed(self, ids: Sequence[int]) -> None:
        """Take ids out."""
        for block_id in ids:
            priority = self._priority_of.pop(block_id)
            queue = self._queues[priority]
            del queue[block_id]
            if not queue:
                del self._queues[priority]

    def touched(self, ids: Sequence[int]) -> None:
        """Move ids to the young end of their priority, oldest first."""
        for block_id in ids:
            self._queues[self._priority_of[block_id]].move_to_end(block_id)

    def prioritised(self, ids: Sequence[int], priorities: Sequence[int]) -> None:
        """Move ids to the young end of another priority; those that have it already stay in place."""
        for block_id, priority in zip(ids, priorities, strict=True):
            if self._priority_of[block_id] != priority:
                self.removed([block_id])
                self.inserted([block_id], [priority])

    def pop(self, n: int) -> list[int]:
        """Take out the n ids that are to be evicted first; n is at most len(self)."""
        ids: list[int] = []
        while len(ids) < n:
            priority = min(self._queues)
            queue = self._queues[priority]
            while queue and len(ids) < n:
                block_id, _ = queue.popitem(last=False)
                del self._priority_of[block_id]
                ids.append(block_id)
            if not queue:
                del self._queues[priority]
        return ids


class Outbox:
    """Bounded rows of what changed; a reader that falls behind finds one GAP instead.

    While a GAP waits, further rows are dropped and only move its sequence number on: after it the reader takes the
    whole set of registered blocks anyway.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: deque[tuple[int, bytes, bytes, int, int]] = deque()
        self._num_subscribers = 0
        self._has_gap = False
        self.last_seq = 0

    @property
    def is_read(self) -> bool:
        """Whether anybody subscribes."""
        return self._num_subscribers > 0

    def subscribe(self) -> None:
        """Count one more reader."""
        self._num_subscribers += 1

    def unsubscribe(self) -> None:
        """Count one reader less; without readers nothing is kept."""
        self._num_subscribers = max(0, self._num_subscribers - 1)
        if not self.is_read:
            self._rows.clear()
            self._has_gap = False

    def append(self, kind: OutboxKind, block_id: int, sequence_hash: bytes, parent: bytes) -> None:
        """Add a row while somebody subscribes."""
        if not self.is_read:
            return
        self.last_seq += 1
        if not self._has_gap and len(self._rows) < self._capacity:
            self._rows.append((self.last_seq, sequence_hash, parent, block_id, kind))
            return
        self._has_gap = True
        self._rows.clear()
        self._rows.append((self.last_seq, ZERO, ZERO, -1, OutboxKind.GAP))

    def drain(self, max_rows: int) -> npt.NDArray[Any]:
        """Take out up to max_rows rows, oldest first."""
        taken = [self._rows.popleft() for _ in range(min(max_rows, len(self._rows)))]
        if not self._rows:
            self._has_gap = False
        rows = np.zeros(len(taken), dtype=OUTBOX_DTYPE)
        for row, (seq, sequence_hash, parent, block_id, kind) in zip(rows, taken, strict=True):
            row["seq"], row["id"], row["kind"] = seq, block_id, kind
            row["hash"] = np.frombuffer(sequence_hash, dtype="<u8")
            row["parent"] = np.frombuffer(parent, dtype="<u8")
        return rows
