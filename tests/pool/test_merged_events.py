"""One subscription over several tiers: order, gaps, and ending in a finaliser."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep

from kvbm._backend import Backend
from kvbm.errors import PoolClosed
from kvbm.events import KvEvent, MergedSubscription, MigrationLog
from kvbm.manager import BlockManager
from kvbm.types import Tier

PATIENCE_S = 60.0
DOWN, TO_DISK = (Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK)


def add(log: MigrationLog, names: list[int], route: tuple[Tier, Tier] = DOWN) -> None:
    ids = np.array(names, dtype=np.int32) + 10
    log.add(route, ids, hashes_of(names), hashes_of([name + 100 for name in names]))


def told(events: list[KvEvent]) -> list[tuple[str, str]]:
    return [(event.tier.value, event.event_type.value) for event in events]


def make_manager(backend: Backend, **settings: Any) -> BlockManager:
    sizes: dict[str, Any] = {"num_layers": 1, "page_size": 4, "inner_dim": 8, "dtype": "uint8"}
    return BlockManager(**sizes, **{"device_blocks": 4, "host_blocks": 8, **settings}, backend=backend)


def offload(manager: BlockManager, names: list[int]) -> None:
    manager.register_blocks(manager.allocate_blocks(len(names)).complete(hashes_of(names))).release()
    manager.flush(PATIENCE_S)


def test_block_is_seen_in_its_new_tier_before_it_leaves_the_old_one(make_pool: MakePool) -> None:
    device, host = make_pool(1, tier=Tier.DEVICE), make_pool(4, tier=Tier.HOST)
    log = MigrationLog()
    with MergedSubscription([device.subscribe_events(), host.subscribe_events()], migrations=log) as events:
        keep(device, [1])
        keep(host, [1])
        add(log, [1])
        keep(device, [2])
        assert told(events.poll()) == [
            ("host", "created"),
            ("device", "created"),
            ("device", "deleted"),
            ("device", "created"),
            ("host", "migrated"),
        ]
        assert events.poll() == []


def test_pools_are_read_from_the_top_down_and_what_moved_before_them() -> None:
    """A block that moves down between two reads is then seen twice, never in no tier."""
    read: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def poll(self) -> list[str]:  # events are only handed on
            read.append(self.name)
            return [f"{self.name} 1", f"{self.name} 2"]

        def close(self) -> None:
            read.append(f"close {self.name}")

    fakes: Any = [Fake("device"), Fake("host"), Fake("disk")]
    log: Any = Fake("moves")
    events = MergedSubscription(fakes, migrations=log)
    assert list(events) == [f"{name} {i}" for name in ("disk", "host", "device", "moves") for i in (1, 2)]
    assert read == ["moves", "device", "host", "disk"]
    events.close()
    events.close()
    assert read[4:] == ["close device", "close host", "close disk", "close moves"]


@pytest.mark.parametrize("max_events", [1, 2, 3, 100])
def test_reading_a_few_at_a_time_gives_the_same_events_in_order(make_pool: MakePool, max_events: int) -> None:
    device, host = make_pool(4, tier=Tier.DEVICE), make_pool(4, tier=Tier.HOST)
    log = MigrationLog()
    events = MergedSubscription([device.subscribe_events(), host.subscribe_events()], migrations=log)
    keep(device, [1, 2])
    keep(host, [1])
    add(log, [1])
    assert events.poll(0) == []
    taken: list[KvEvent] = []
    while some := events.poll(max_events):
        assert len(some) <= max_events
        taken += some
    assert told(taken) == [("host", "created"), ("device", "created"), ("device", "created"), ("host", "migrated")]
    keep(host, [2])
    assert told(events.poll(max_events)) == [("host", "created")]


def test_what_moved_says_what_whence_and_whither() -> None:
    log = MigrationLog(worker_id="w3", metadata={"model": "m"}, clock=lambda: 77)
    add(log, [5, 6], TO_DISK)
    first, second = log.poll()
    assert (first.event_type.value, first.tier, first.block_id) == ("migrated", Tier.DISK, 15)
    assert (first.metadata, first.worker_id, first.timestamp) == ({"model": "m", "source": "host"}, "w3", 77)
    assert first.sequence_hash == hashes_of([5]).tobytes()
    assert first.parent_hash == hashes_of([105]).tobytes()
    assert [first.sequence_number, second.sequence_number] == [1, 2]
    assert log.poll() == []


def test_reader_that_falls_behind_finds_one_gap_and_is_right_again() -> None:
    log = MigrationLog(capacity=3)
    add(log, [1, 2], TO_DISK)
    add(log, [3, 4, 5])
    events = log.poll()
    assert [(event.event_type.value, event.sequence_number) for event in events] == [
        ("gap", 2),  # the last that was lost
        ("migrated", 3),
        ("migrated", 4),
        ("migrated", 5),
    ]
    assert (events[0].block_id, int(events[0].sequence_hash)) == (-1, 0)
    add(log, [6])
    assert [(event.event_type.value, event.sequence_number) for event in log.poll()] == [("migrated", 6)]


def test_gap_of_a_pool_comes_through_with_its_tier(make_pool: MakePool) -> None:
    device, host = make_pool(4, tier=Tier.DEVICE), make_pool(4, tier=Tier.HOST)
    host._hub.capacity = 2
    events = MergedSubscription([device.subscribe_events(), host.subscribe_events()])
    others = host.subscribe_events()
    keep(device, [1])
    for name in range(4):
        keep(host, [name])
        others.poll()
    assert told(events.poll()) == [("host", "gap"), ("host", "created"), ("device", "created")]


def test_closed_subscription_is_read_no_more(backend: Backend) -> None:
    with make_manager(backend) as manager:
        events = manager.subscribe_events()
        offload(manager, [1])
        assert ("host", "migrated") in told(events.poll())
        events.close()
        events.close()
        with pytest.raises(PoolClosed, match="this subscription is closed"):
            events.poll()
        offload(manager, [2])
        assert manager._planner.migrations._logs == ()


def test_collected_subscription_is_noted_in_no_more(backend: Backend) -> None:
    with make_manager(backend) as manager:
        events = manager.subscribe_events()
        offload(manager, [1])
        assert len(manager._planner.migrations._logs) == 1
        del events
        gc.collect()
        offload(manager, [2])
        assert manager._planner.migrations._logs == (), "or it would keep events for a reader that is gone"


def test_reader_collected_while_a_move_is_noted_does_not_deadlock(backend: Backend) -> None:
    """A generator that reads events is collected, and closes its subscription, under the planner's and the log's lock.

    The garbage collector may run wherever an object is made; here it runs where an event gets its time.
    """

    def read(manager: BlockManager) -> Iterator[Any]:
        with manager.subscribe_events():
            myself = yield
            yield myself
            closed.append(False)

    closed: list[bool] = []
    collected_by: list[str] = []
    with make_manager(backend) as manager:
        kept = manager.subscribe_events()
        reader: Any = read(manager)
        next(reader)
        reader.send(reader)  # a cycle: only the garbage collector ends it
        first, second = manager._planner.migrations._logs

        def collect() -> int:
            gc.collect()
            collected_by.append(threading.current_thread().name)
            return 5

        first._clock = collect
        del reader
        assert second.is_open
        gc.disable()
        try:
            thread = threading.Thread(target=offload, args=(manager, [1, 2]), daemon=True)
            thread.start()
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "deadlock"
        finally:
            gc.enable()
        assert len(collected_by) == 2
        assert not second.is_open
        assert [event for event in told(kept.poll()) if event[1] == "migrated"] == [("host", "migrated")] * 2
        offload(manager, [3])
        assert manager._planner.migrations._logs == (first,)
    assert closed == []
