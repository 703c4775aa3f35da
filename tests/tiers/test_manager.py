"""What a manager tells and takes beside moving blocks: events, resets, figures, priorities, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tier_site import BLOCK_NBYTES, MODEL, PATIENCE_S, Site, names

from kvbm._backend import Backend
from kvbm.errors import BlockStateError, ConfigError
from kvbm.events import KvEventType
from kvbm.manager import BlockManager
from kvbm.types import HashArray, Tier

TIERS = ("device", "host", "disk")


# -- events ----------------------------------------------------------------------------------------------------


def told(events: Any, hashes: HashArray) -> list[tuple[str, str, int]]:
    """Give kind, tier and place in the prompt of each event."""
    places = {row.tobytes(): place for place, row in enumerate(hashes)}
    return [(event.event_type.value, event.tier.value, places[bytes(event.sequence_hash)]) for event in events]


def test_events_tell_each_tier_that_a_block_enters_and_leaves_in_order(make_tiers: Site) -> None:
    tiers = make_tiers(device=2, host=4, disk=8)
    hashes = names(2)
    with tiers.manager.subscribe_events() as events:
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
        rows = told(events.poll(), hashes)
        for tier in TIERS:
            assert [row for row in rows if row[:2] == ("created", tier)] == [("created", tier, 0), ("created", tier, 1)]
        for tier in ("host", "disk"):
            moved = [row for row in rows if row[:2] == ("migrated", tier)]
            assert moved == [("migrated", tier, 0), ("migrated", tier, 1)]
            assert rows.index(moved[0]) > rows.index(("created", tier, 0))
        assert len(rows) == 10
        tiers.evict("device")
        assert sorted(told(events.poll(), hashes)) == [("deleted", "device", 0), ("deleted", "device", 1)]
        assert tiers.num_hit(hashes) == 2
        rows = told(events.poll(), hashes)
        assert rows[:2] == [("created", "device", 0), ("created", "device", 1)]
        assert rows[2:] == [("migrated", "device", 0), ("migrated", "device", 1)]
        tiers.manager.flush(PATIENCE_S)
        assert events.poll() == []


def test_block_that_moved_down_is_told_below_before_it_is_told_to_leave(make_tiers: Site) -> None:
    tiers = make_tiers(device=2, host=8)
    with tiers.manager.subscribe_events(kinds=["created", "deleted"]) as events:
        hashes = names(2)
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
        tiers.evict("device")
        rows = told(events.poll(), hashes)
    assert [row[:2] for row in rows] == [("created", "host")] * 2 + [("created", "device")] * 2 + [
        ("deleted", "device")
    ] * 2


def test_migrations_name_their_source_worker_and_model(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, disk=8, settings={"runtime": {"worker_id": "seven"}})
    hashes = names(2)
    with tiers.manager.subscribe_events(kinds="migrated") as events:
        tiers.put_below(hashes, "disk")
        assert tiers.num_hit(hashes) == 2
        down_and_up = events.poll()
    assert [(event.metadata["source"], event.tier.value) for event in down_and_up] == [("device", "disk")] * 2 + [
        ("disk", "device")
    ] * 2
    for event in down_and_up:
        assert (event.event_type, event.worker_id, event.metadata["model"]) == (KvEventType.MIGRATED, "seven", "toy")
    parents = [bytes(event.parent_hash) for event in down_and_up]
    assert parents == [bytes(16), hashes[0].tobytes()] * 2


def test_events_of_one_tier_come_alone(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(2)
    with tiers.manager.subscribe_events(tier="host") as events:
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
        stored = [(kind, "host", block) for kind in ("created", "migrated") for block in (0, 1)]
        assert sorted(told(events.poll(), hashes)) == stored, "what came from above is told too"
        tiers.manager.reset_pool("host")
        assert sorted(told(events.poll(), hashes)) == [("deleted", "host", 0), ("deleted", "host", 1)]


# -- resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_reset_of_a_tier_forgets_all_of_it_and_nothing_else(make_tiers: Site, tier: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.manager.reset_pool(tier) == 3
    assert {name: tiers.lies(name, hashes) for name in TIERS} == {name: [name != tier] * 3 for name in TIERS}
    assert tiers.manager.reset_pool(Tier(tier)) == 0
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


@pytest.mark.parametrize("tier", TIERS)
def test_reset_of_a_tier_in_use_is_refused_and_changes_nothing(make_tiers: Site, tier: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes, others = names(3), names(2)
    tiers.put_below(hashes, tier)
    tiers.put_below(others, tier)
    with tiers.manager.match_sequence_hashes(hashes):
        with pytest.raises(BlockStateError, match="cannot clear: 3 blocks are in use"):
            tiers.manager.reset_pool(tier)
        assert tiers.lies(tier, hashes) == [True] * 3
        response = tiers.manager.reset_blocks(tier, np.concatenate([hashes[:1], others, names(1)]))
        assert (len(response.in_use), len(response.reset), len(response.not_found)) == (1, 2, 1)
    assert tiers.manager.reset_pool(tier) == 3
    tiers.see_idle()


def test_reset_of_all_tiers_forgets_every_block(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.manager.reset_all() == 9
    assert tiers.manager.lookup(hashes) == 0
    assert tiers.num_hit(hashes) == 0
    assert tiers.manager.reset_all() == 0
    tiers.put(hashes)
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


def test_reset_of_all_tiers_raises_where_a_block_is_in_use(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    with tiers.manager.match_sequence_hashes(hashes):
        with pytest.raises(BlockStateError, match="cannot clear: 3 blocks are in use"):
            tiers.manager.reset_all()
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


def test_tier_that_is_not_there_is_refused_with_those_that_are(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    calls: list[Callable[[], Any]] = [
        lambda: tiers.manager.reset_pool("disk"),
        lambda: tiers.manager.reset_blocks("cloud", names(1)),
        lambda: tiers.manager.storage(Tier.DISK),
        lambda: tiers.manager.subscribe_events(tier="disk"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"there is no tier '(disk|cloud)' here, use 'device', 'host'"):
            call()


# -- figures ---------------------------------------------------------------------------------------------------


def test_status_counts_the_blocks_of_each_tier_by_state(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=32)
    hashes = names(3)
    held = tiers.fill(hashes)
    fresh = tiers.manager.allocate_blocks(2)
    tiers.manager.flush(PATIENCE_S)
    status = tiers.manager.status()
    assert list(status) == list(TIERS)
    assert {tier: (s.free, s.mutable, s.active, s.inactive) for tier, s in status.items()} == {
        "device": (3, 2, 3, 0),
        "host": (13, 0, 0, 3),
        "disk": (29, 0, 0, 3),
    }
    assert [s.total_blocks for s in status.values()] == [8, 16, 32]
    held.release()
    fresh.release()
    tiers.see_idle()


def test_statistics_count_hits_misses_and_what_moved(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=32)
    hashes = names(4)
    assert tiers.num_hit(hashes) == 0
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes[:2]) == 2
    tiers.manager.flush(PATIENCE_S)
    assert tiers.num_hit(hashes) == 4
    tiers.manager.flush(PATIENCE_S)
    before = tiers.manager.statistics()
    assert (before.hits, before.misses, before.joined) == ({"device": 2, "disk": 4}, 4, 0)
    assert before.mismatches == {}
    moved = {f"{a.value}-{b.value}": (c.blocks, c.nbytes) for (a, b), c in before.routes.items() if c.blocks}
    assert moved == {
        "device-host": (8, 8 * BLOCK_NBYTES),
        "host-disk": (4, 4 * BLOCK_NBYTES),
        "disk-device": (4, 4 * BLOCK_NBYTES),
    }
    assert tiers.route("disk-device").seconds["ok"].count == 2
    tiers.num_hit(hashes)
    assert before.hits == {"device": 2, "disk": 4}  # a copy


def test_lookup_counts_over_all_tiers_and_changes_no_recency(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=3)
    old, new = names(1), names(1)
    for hashes in (old, new):
        tiers.put_below(hashes, "host")
    third = names(1)
    tiers.put_below(third, "host")
    assert tiers.manager.lookup(np.concatenate([old, new, third, names(1)])) == 3
    for _ in range(5):
        assert tiers.manager.lookup(old) == 1
    tiers.put_below(names(1), "host")
    assert [tiers.manager.lookup(hashes) for hashes in (old, new, third)] == [0, 1, 1]


def test_request_keeps_its_prompt_young_in_the_tiers_below(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=4)
    used, unused = names(2), names(2)
    tiers.put(used)
    tiers.manager.flush(PATIENCE_S)
    tiers.put(unused)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.num_hit(used) == 2  # from the device: host memory is only told
    tiers.put(names(2))
    tiers.manager.flush(PATIENCE_S)
    assert tiers.lies("host", used) == [True] * 2
    assert tiers.lies("host", unused) == [False] * 2


# -- priorities ------------------------------------------------------------------------------------------------


def test_priority_holds_in_every_tier_and_goes_along_down_and_up(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=4, disk=4)
    kept = names(2)
    tiers.put(kept)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.manager.set_priority(kept, 90) == 2
    for _ in range(4):
        tiers.put(names(2))
        tiers.manager.flush(PATIENCE_S)
    assert {tier: tiers.lies(tier, kept) for tier in TIERS} == {tier: [True] * 2 for tier in TIERS}
    tiers.manager.reset_blocks("device", kept)
    tiers.manager.reset_blocks("host", kept)
    assert tiers.num_hit(kept) == 2
    tiers.manager.flush(PATIENCE_S)
    for tier in TIERS:
        pool = tiers.pool(tier)
        assert pool.describe_blocks(pool.lookup(kept))[2].tolist() == [90, 90], tier
    assert tiers.manager.set_priority(names(1), 90) == 0
    with pytest.raises(ConfigError, match=r"priority 101 is outside 0\.\.100"):
        tiers.manager.set_priority(kept, 101)
    tiers.see_idle()


# -- settings that do not go together ----------------------------------------------------------------------------


def test_disk_tier_needs_memory_above_it_and_a_directory(make_tiers: Site, backend: Backend) -> None:
    with pytest.raises(ConfigError, match="the top tier is 'disk', which has no memory to fill"):
        make_tiers(disk=8)
    with pytest.raises(ConfigError, match=r"disk\.path is not given"):
        BlockManager(**_keywords(), device_blocks=4, disk_blocks=8, backend=backend)
    with pytest.raises(ConfigError, match="a manager needs at least one tier, got none"):
        make_tiers()


def test_keywords_make_the_same_tiers_as_a_config(make_tiers: Site, backend: Backend) -> None:
    with BlockManager(
        **_keywords(),
        device_blocks=4,
        host_blocks=8,
        disk_blocks=16,
        disk_path=make_tiers.directory / "keywords",
        model="toy",
        backend=backend,
    ) as manager:
        sequence = manager.sequence(range(12))
        fresh = manager.allocate_blocks(sequence.num_full_blocks)
        for block in fresh:
            for layer in range(3):
                manager.store_kv(block, layer, bytes([layer + 1]) * (BLOCK_NBYTES // 3))
        manager.register_blocks(fresh.complete(sequence.hashes)).release()
        manager.flush(PATIENCE_S)
        manager.reset_pool("device")
        manager.reset_pool("host")
        with manager.onboard(manager.match_sequence_hashes(sequence.hashes)).result(PATIENCE_S) as blocks:
            assert [manager.load_kv(block, 2)[:1] for block in blocks] == [b"\x03"] * 3
        assert [pool.total_blocks for pool in (manager.device, manager.host, manager.disk) if pool] == [4, 8, 16]


def _keywords() -> dict[str, Any]:
    return {"page_size" if name == "block_size" else name: value for name, value in MODEL.items()}
