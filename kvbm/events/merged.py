"""One subscription over several pools, and over what moves between them.

Pools are read from the top down and their events given from the bottom up: a block that moved down is seen in its new
tier before it is seen to leave the old one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from kvbm.errors import PoolClosed
from kvbm.events.hub import EventSubscription
from kvbm.events.types import KvEvent, KvEventType
from kvbm.types import ZERO_HASH, HashArray, IdArray, SequenceHash, Tier


class MigrationLog:
    """Events of one reader about blocks that were stored in another tier.

    Parameters
    ----------
    worker_id : str
    metadata : dict of str to str
        Put into every event, beside ``"source"``, the tier the block came from.
    capacity : int
        Events kept; when a reader falls behind it finds one GAP.
    tier : Tier, optional
        Only what is stored there.
    clock : callable
        Gives nanoseconds since the epoch.
    """

    def __init__(
        self,
        *,
        worker_id: str = "0",
        metadata: dict[str, str] | None = None,
        capacity: int = 65536,
        tier: Tier | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tier = tier
        self._worker_id = worker_id
        self._metadata = dict(metadata or {})
        self._clock = clock
        self._capacity = capacity
        self._lock = threading.Lock()
        self._events: deque[KvEvent] = deque()
        self._num_seen = 0
        self._has_lost = False
        self.is_open = True

    def add(self, route: tuple[Tier, Tier], ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        """Note blocks that were stored; called under the planner's lock."""
        if self._tier not in (None, route[1]):
            return
        with self._lock:
            for i, block_id in enumerate(ids.tolist()):
                self._num_seen += 1
                name, parent = SequenceHash(hashes[i].tobytes()), SequenceHash(parents[i].tobytes())
                event = self._event(KvEventType.MIGRATED, route, block_id, name, parent, sequence_number=self._num_seen)
                self._events.append(event)
                if len(self._events) > self._capacity:
                    self._events.popleft()
                    self._has_lost = True

    def poll(self) -> list[KvEvent]:
        """Take what waits."""
        with self._lock:
            taken, self._events = list(self._events), deque()
            has_lost, self._has_lost = self._has_lost, False
        if has_lost:
            first = taken[0]
            route, last_lost = (Tier(first.metadata["source"]), first.tier), first.sequence_number - 1
            taken.insert(0, self._event(KvEventType.GAP, route, -1, sequence_number=last_lost))
        return taken

    def close(self) -> None:
        """Say that nobody reads any more; takes no lock, so that a finaliser may call it."""
        self.is_open = False

    def _event(
        self,
        kind: KvEventType,
        route: tuple[Tier, Tier],
        block_id: int,
        name: SequenceHash = ZERO_HASH,
        parent: SequenceHash = ZERO_HASH,
        *,
        sequence_number: int,
    ) -> KvEvent:
        return KvEvent(
            event_type=kind,
            block_id=block_id,
            worker_id=self._worker_id,
            timestamp=self._clock(),
            sequence_number=sequence_number,
            sequence_hash=name,
            parent_hash=parent,
            tier=route[1],
            metadata={**self._metadata, "source": route[0].value},
        )


class Migrations:
    """Tells every open log what is stored in another tier.

    Parameters
    ----------
    locked : callable
        Gives the context of the planner's lock, which guards the list.
    """

    def __init__(self, locked: Callable[[], AbstractContextManager[Any]]) -> None:
        self._locked = locked
        self._logs: tuple[MigrationLog, ...] = ()

    def add(self, log: MigrationLog) -> None:
        """Note in this log what moves from now on, until it is closed."""
        with self._locked():
            self._logs = (*(known for known in self._logs if known.is_open), log)

    def moved(self, route: tuple[Tier, Tier], ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        """Tell of blocks that were stored, under the lock: route, slots there, hashes, parents."""
        if not all(log.is_open for log in self._logs):
            self._logs = tuple(log for log in self._logs if log.is_open)
        for log in self._logs:
            log.add(route, ids, hashes, parents)


class MergedSubscription:
    """A reader of several pools; a context manager.

    Parameters
    ----------
    subscriptions : sequence of EventSubscription
        From the top tier down.
    migrations : MigrationLog, optional
        None: moves between tiers are not wanted.
    """

    def __init__(
        self,
        subscriptions: Sequence[EventSubscription],
        *,
        migrations: MigrationLog | None = None,
    ) -> None:
        self._subscriptions = tuple(subscriptions)
        self._migrations = migrations
        self._left: deque[KvEvent] = deque()  # by a poll that wanted fewer
        self._is_closed = False

    def poll(self, max_events: int | None = None) -> list[KvEvent]:
        """Take the events that wait, at most `max_events`; never blocks for new ones."""
        if self._is_closed:
            raise PoolClosed("this subscription is closed")
        if max_events is None or len(self._left) < max_events:
            migrated = [] if self._migrations is None else self._migrations.poll()
            by_tier = [subscription.poll() for subscription in self._subscriptions]
            self._left.extend(event for events in reversed(by_tier) for event in events)
            self._left.extend(migrated)
        num_taken = len(self._left) if max_events is None else min(max_events, len(self._left))
        return [self._left.popleft() for _ in range(num_taken)]

    def __iter__(self) -> Iterator[KvEvent]:
        """Give the events that wait now."""
        return iter(self.poll())

    def close(self) -> None:
        """Stop reading; may be called twice, and by a finaliser: it takes no lock."""
        if not self._is_closed:
            self._is_closed = True
            for subscription in self._subscriptions:
                subscription.close()
            if self._migrations is not None:
                self._migrations.close()

    def __enter__(self) -> MergedSubscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
