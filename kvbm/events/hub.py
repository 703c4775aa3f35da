"""One outbox, any number of readers.

The store's outbox has one reader, the hub; the hub hands its rows to each subscription when any of them polls. Each
subscription is bounded like the outbox: one that does not poll loses its rows and finds one GAP. The hub's lock is
taken before the store's, never the other way round. Closing takes neither, for a finaliser may close while its thread
holds both: it leaves a note, which the pool's next call or the next poll works off.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, PluginError, PoolClosed
from kvbm.events.types import KvEvent, KvEventType
from kvbm.types import OUTBOX_DTYPE, OutboxKind, SequenceHash, Tier

Rows = npt.NDArray[Any]

_KIND_OF = {
    KvEventType.CREATED: OutboxKind.CREATED,
    KvEventType.DELETED: OutboxKind.DELETED,
    KvEventType.GAP: OutboxKind.GAP,
}
_TYPE_OF = {kind: event_type for event_type, kind in _KIND_OF.items()}


class OutboxStore(Protocol):
    """The part of a store that the hub reads."""

    def subscribe(self) -> None:
        """Start keeping rows."""

    def unsubscribe(self) -> None:
        """Stop keeping rows."""

    def drain(self, max_rows: int) -> Rows:
        """Take rows out."""


class EventHub:
    """Hands the rows of one store to its subscriptions.

    Parameters
    ----------
    store : OutboxStore
    tier : Tier
    worker_id : str
    metadata : dict of str to str
        Put into every event.
    capacity : int
        Rows a subscription keeps before it finds a GAP.
    clock : callable
        Gives nanoseconds since the epoch.
    """

    def __init__(
        self,
        store: OutboxStore,
        *,
        tier: Tier,
        worker_id: str = "0",
        metadata: dict[str, str] | None = None,
        capacity: int = 65536,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tier = tier
        self.worker_id = worker_id
        self.metadata = dict(metadata or {})
        self.capacity = capacity
        self.clock = clock
        self._store = store
        self._lock = threading.Lock()
        self._subscriptions: list[weakref.ref[EventSubscription]] = []
        self.dropped: deque[None] = deque()  # one entry for each subscription that was closed or collected

    def subscribe(self, kinds: Iterable[KvEventType | str] | None = None) -> EventSubscription:
        """Read every row from now on; `kinds` limits them (gaps always come)."""
        wanted = _outbox_kinds(kinds)
        self.reap()
        with self._lock:
            self._pump()  # rows of before now go to the others only
            self._store.subscribe()
            subscription = EventSubscription(self, wanted)
            self._subscriptions.append(weakref.ref(subscription))
        return subscription

    def reap(self) -> None:
        """Account for subscriptions that were closed or collected."""
        while self.dropped:
            try:
                self.dropped.pop()
            except IndexError:
                return
            try:
                self._store.unsubscribe()
            except PluginError:  # called from inside a store call: the next caller does it
                self.dropped.append(None)
                raise

    def drop(self) -> None:
        """Note that a subscription has ended; takes no lock, so a finaliser may call it."""
        self.dropped.append(None)

    def pump_into(self, subscription: EventSubscription, max_rows: int) -> Rows:
        """Move what waits in the outbox to all subscriptions, and take this one's rows."""
        self.reap()
        with self._lock:
            self._pump()
            return subscription.take(max_rows)

    def _pump(self) -> None:
        readers = [reader for ref in self._subscriptions if (reader := ref()) is not None and reader.is_open]
        self._subscriptions = [weakref.ref(reader) for reader in readers]
        if not readers:
            return
        while len(rows := self._store.drain(self.capacity)):
            for reader in readers:
                reader.put(rows)


class EventSubscription:
    """A reader's place in the stream; a context manager.

    Examples
    --------
    >>> import kvbm
    >>> pool = kvbm.BlockPool(4)
    >>> with pool.subscribe_events(kinds=["deleted"]) as events:
    ...     events.poll()
    []
    """

    def __init__(self, hub: EventHub, kinds: frozenset[int] | None) -> None:
        self._hub = hub
        self._kinds = kinds
        self._is_wanted = np.zeros(256, dtype=np.bool_)  # by kind; many times as fast as numpy.isin
        self._is_wanted[list(kinds or ())] = True
        self._chunks: deque[Rows] = deque()
        self._num_rows = 0
        self._live = [True]  # popped by the one call that closes: list.pop is atomic

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return bool(self._live)

    def poll(self, max_events: int | None = None) -> list[KvEvent]:
        """Take the events that wait, oldest first; never blocks for new ones."""
        rows = self.poll_rows(max_events)
        now = self._hub.clock()
        return [self._event(row, now) for row in rows]

    def poll_rows(self, max_rows: int | None = None) -> Rows:
        """Take the rows that wait as one `kvbm.types.OUTBOX_DTYPE` array: the fast form of `poll`."""
        if not self._live:
            raise PoolClosed("this subscription is closed")
        return self._hub.pump_into(self, self._hub.capacity if max_rows is None else max_rows)

    def __iter__(self) -> Iterator[KvEvent]:
        """Give the events that wait now."""
        return iter(self.poll())

    def close(self) -> None:
        """Stop reading; may be called twice.

        Notes
        -----
        Takes no lock, so that a finaliser may call it. The outbox learns of it at the pool's next call.
        """
        try:
            self._live.pop()
        except IndexError:
            return
        self._hub.drop()

    def __enter__(self) -> EventSubscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def put(self, rows: Rows) -> None:
        """Queue rows; called by the hub under its lock."""
        if self._kinds is not None:
            rows = rows[self._is_wanted[rows["kind"]]]
        if self._num_rows + len(rows) > self._hub.capacity:
            gap = np.zeros(1, dtype=OUTBOX_DTYPE)
            gap["seq"], gap["id"], gap["kind"] = rows["seq"][-1], -1, OutboxKind.GAP
            self._chunks.clear()
            self._num_rows = 0
            rows = gap
        if len(rows):
            self._chunks.append(rows)
            self._num_rows += len(rows)

    def take(self, max_rows: int) -> Rows:
        """Take up to max_rows rows; called by the hub under its lock."""
        taken: list[Rows] = []
        while self._chunks and max_rows > 0:
            chunk = self._chunks.popleft()
            if len(chunk) > max_rows:
                self._chunks.appendleft(chunk[max_rows:])
                chunk = chunk[:max_rows]
            taken.append(chunk)
            max_rows -= len(chunk)
            self._num_rows -= len(chunk)
        if len(taken) == 1:
            return taken[0]
        return np.concatenate(taken) if taken else np.zeros(0, dtype=OUTBOX_DTYPE)

    def _event(self, row: Any, now: int) -> KvEvent:
        return KvEvent(
            event_type=_TYPE_OF[OutboxKind(int(row["kind"]))],
            block_id=int(row["id"]),
            worker_id=self._hub.worker_id,
            timestamp=now,
            sequence_number=int(row["seq"]),
            sequence_hash=SequenceHash(row["hash"].tobytes()),
            parent_hash=SequenceHash(row["parent"].tobytes()),
            tier=self._hub.tier,
            metadata=self._hub.metadata,
        )


def _outbox_kinds(kinds: Iterable[KvEventType | str] | None) -> frozenset[int] | None:
    if kinds is None:
        return None
    if isinstance(kinds, str):
        kinds = [kinds]
    wanted = {int(OutboxKind.GAP)}
    for kind in kinds:
        try:
            event_type = KvEventType(kind)
        except ValueError:
            known = ", ".join(event_type.value for event_type in KvEventType)
            raise ConfigError(f"event kind {kind!r} is not known, use {known}") from None
        if event_type in _KIND_OF:
            wanted.add(int(_KIND_OF[event_type]))
    return frozenset(wanted)
