"""Events in the process (CONFORMANCE 39)."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep

from kvbm.errors import ConfigError, PoolClosed
from kvbm.events import KvEventType
from kvbm.types import OutboxKind, Tier


def test_events_tell_what_happened_in_order(make_pool: MakePool) -> None:
    pool = make_pool(2, tier=Tier.HOST, worker_id="w7", event_metadata={"model": "m"})
    with pool.subscribe_events() as events:
        keep(pool, [1, 2])
        pool.allocate_blocks(1)
        created, child, deleted = events.poll()
    assert [event.event_type.value for event in (created, child, deleted)] == ["created", "created", "deleted"]
    assert [event.sequence_number for event in (created, child, deleted)] == [1, 2, 3]
    assert child.parent_hash == created.sequence_hash
    assert deleted.sequence_hash == child.sequence_hash, "the leaf leaves first"
    assert (created.worker_id, created.tier, created.metadata) == ("w7", Tier.HOST, {"model": "m"})
    assert created.timestamp > 1_600_000_000 * 10**9


def test_kinds_limit_what_is_read(make_pool: MakePool) -> None:
    pool = make_pool(1)
    deleted = pool.subscribe_events(kinds=[KvEventType.DELETED])
    everything = pool.subscribe_events()
    keep(pool, [1])
    keep(pool, [2])
    assert [event.event_type.value for event in deleted.poll()] == ["deleted"]
    assert len(everything.poll(2)) == 2
    assert len(everything.poll()) == 1
    with pytest.raises(ConfigError, match="event kind 'born' is not known, use created, deleted, migrated, gap"):
        pool.subscribe_events(kinds=["born"])


def test_a_reader_that_falls_behind_gets_one_gap_and_is_right_again(make_pool: MakePool) -> None:
    pool = make_pool(4)
    pool._hub.capacity = 8
    slow, quick = pool.subscribe_events(), pool.subscribe_events()
    for name in range(20):
        keep(pool, [name])
        quick.poll_rows()
    rows = slow.poll_rows()
    assert rows["kind"].tolist().count(OutboxKind.GAP) == 1
    assert rows["kind"][0] == OutboxKind.GAP
    ids, _, _, last_seq = pool.registered()
    assert len(ids) == 4
    assert rows["seq"][-1] <= last_seq
    keep(pool, [77])
    assert slow.poll_rows()["kind"].tolist() == [OutboxKind.DELETED, OutboxKind.CREATED]


def test_a_full_outbox_becomes_one_gap(make_pool: MakePool) -> None:
    pool = make_pool(4)
    store = pool._store
    events = pool.subscribe_events()
    for name in range(70_000 // 2):
        keep(pool, [name])
    rows = events.poll_rows()
    assert rows["kind"].tolist() == [OutboxKind.GAP]
    assert rows["seq"][0] == store.registered()[3]
    keep(pool, [1])
    assert len(events.poll_rows()) == 2


def test_without_a_subscriber_nothing_accumulates(make_pool: MakePool) -> None:
    pool = make_pool(4)
    keep(pool, [1])
    events = pool.subscribe_events()
    assert events.poll() == []
    keep(pool, [2])
    del events
    gc.collect()
    keep(pool, [3])
    assert len(pool._store.drain(100)) == 0
    late = pool.subscribe_events()
    late.close()
    late.close()
    with pytest.raises(PoolClosed, match="this subscription is closed"):
        late.poll()


def test_rows_are_in_order_under_eight_threads(make_pool: MakePool) -> None:
    pool = make_pool(64)
    events = pool.subscribe_events()

    def live(thread: int) -> None:
        for i in range(200):
            keep(pool, [thread * 1000 + i, thread * 1000 + i + 500])

    threads = [threading.Thread(target=live, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = events.poll_rows()
    assert np.array_equal(rows["seq"], np.arange(1, len(rows) + 1))
    alive: dict[bytes, int] = {}
    for row in rows:
        if row["kind"] == OutboxKind.CREATED:
            alive[row["hash"].tobytes()] = int(row["id"])
        else:
            del alive[row["hash"].tobytes()]
    ids, hashes, _, _ = pool.registered()
    assert alive == {name.tobytes(): int(block_id) for name, block_id in zip(hashes, ids, strict=True)}
    assert len(hashes_of([])) == 0
