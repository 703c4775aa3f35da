"""Blocks go down through every tier and come back as they were (CONFORMANCE 27, 28, 31)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tier_site import BLOCK_NBYTES, PATIENCE_S, Site, content_of, names

from kvbm.config import LAYOUTS
from kvbm.errors import ConfigError

LAYER_NBYTES = BLOCK_NBYTES // 3


@pytest.mark.parametrize("device", LAYOUTS)
@pytest.mark.parametrize("host", LAYOUTS)
def test_block_comes_back_through_every_tier_as_it_was_stored(make_tiers: Site, device: str, host: str) -> None:
    tiers = make_tiers(device=4, host=8, disk=16, settings={"device": {"layout": device}, "host": {"layout": host}})
    manager = tiers.manager
    hashes = names(3)
    content = content_of(hashes)
    fresh = manager.allocate_blocks(3)
    for block, data in zip(fresh, content, strict=True):
        for layer in range(3):
            manager.store_kv(block, layer, data[layer * LAYER_NBYTES :][:LAYER_NBYTES].tobytes())
    manager.register_blocks(fresh.complete(hashes)).release()
    manager.flush(PATIENCE_S)
    assert [tiers.lies(tier, hashes) for tier in ("device", "host", "disk")] == [[True] * 3] * 3
    for emptied, source in (("device", "host"), ("host", "disk")):
        tiers.evict("device")
        tiers.evict(emptied)
        hit = manager.match_sequence_hashes(hashes)
        assert hit.tiers == {source: 3}
        with manager.onboard(hit).result(PATIENCE_S) as blocks:
            loaded = [b"".join(manager.load_kv(block, layer) for layer in range(3)) for block in blocks]
            assert loaded == [data.tobytes() for data in content]
        assert tiers.lies("device", hashes) == [True] * 3
        manager.flush(PATIENCE_S)  # what was brought up sinks again where it is missing
        assert tiers.lies("host", hashes) == [True] * 3
    tiers.see_idle()


@pytest.mark.parametrize("num_blocks", [1, 2, 63, 64, 65, 130])
def test_prompts_of_any_length_come_back_from_disk_in_order(make_tiers: Site, num_blocks: int) -> None:
    tiers = make_tiers(device=130, host=130, disk=130, settings={"offload": {"staging_blocks": 3}})
    hashes = names(num_blocks)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == num_blocks
    assert tiers.num_hit(hashes[: num_blocks // 2]) == num_blocks // 2
    tiers.see_idle()


def test_working_set_larger_than_the_tiers_above_is_served_from_disk_over_and_over(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8, disk=64)
    prompts = [names(3) for _ in range(12)]
    for prompt in prompts:
        tiers.put(prompt)
        tiers.manager.flush(PATIENCE_S)
    for _ in range(3):
        for prompt in prompts:
            assert tiers.num_hit(prompt) == 3
            tiers.manager.flush(PATIENCE_S)
    assert tiers.manager.statistics().hits == {"disk": 3 * 3 * 12}
    assert tiers.manager.statistics().misses == 0
    tiers.see_idle()


# -- tiers that are not there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("staging_blocks", [1, 2, 16])
def test_without_a_host_tier_blocks_pass_through_the_ring(make_tiers: Site, layout: str, staging_blocks: int) -> None:
    tiers = make_tiers(
        device=8, disk=16, settings={"device": {"layout": layout}, "offload": {"staging_blocks": staging_blocks}}
    )
    hashes = names(7)
    tiers.put_below(hashes, "disk")
    assert tiers.manager.host is None
    assert tiers.num_hit(hashes) == 7
    assert tiers.route("disk-device").blocks == 7
    ring = tiers.manager._executor._means.staging
    assert ring is not None
    assert ring.num_free == staging_blocks
    tiers.see_idle()


def test_without_a_lower_tier_offload_is_nothing_and_flush_returns(make_tiers: Site) -> None:
    tiers = make_tiers(device=4)
    hashes = names(3)
    tiers.put(hashes)
    tiers.manager.flush()
    tiers.manager.flush(0)
    assert tiers.num_hit(hashes) == 3
    assert tiers.manager.host is None
    assert tiers.manager.disk is None
    assert tiers.manager.statistics().routes == {}
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 0
    tiers.see_idle()


@pytest.mark.parametrize("lower", [(), ("disk",)])
def test_host_memory_may_be_the_top_tier(make_tiers: Site, lower: tuple[str, ...]) -> None:
    tiers = make_tiers(host=4, **dict.fromkeys(lower, 16))
    manager = tiers.manager
    hashes = names(3)
    tiers.put(hashes)
    manager.flush(PATIENCE_S)
    assert manager.top is manager.host
    with pytest.raises(ConfigError, match="there is no tier 'device' here, use 'host'"):
        _ = manager.device
    tiers.evict("host")
    assert tiers.num_hit(hashes) == (3 if lower else 0)
    tiers.see_idle()


def test_device_and_host_alone_serve_what_the_device_evicted(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 4
    assert tiers.manager.statistics().hits == {"host": 4}
    tiers.see_idle()


# -- damage ----------------------------------------------------------------------------------------------------

PLACES = [0, 1, LAYER_NBYTES - 1, LAYER_NBYTES, BLOCK_NBYTES // 2 + 7, BLOCK_NBYTES - 1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_flipped_bit_is_a_shorter_hit_then_a_miss(make_tiers: Site, tier: str, bad: int, place: int) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"host": {"layout": LAYOUTS[place % 3]}})
    hashes = names(5)
    tiers.put_below(hashes, tier)
    if tier == "host":
        tiers.spoil_memory("host", hashes[bad], place)
    else:
        tiers.spoil_disk(hashes[bad], place)
    with tiers.get(hashes) as blocks:
        assert len(blocks) == bad
    statistics = tiers.manager.statistics()
    assert statistics.mismatches == {tier: 1}
    assert tiers.route(f"{tier}-device").dropped == {"corrupt": 1}
    assert tiers.lies(tier, hashes) == [i != bad for i in range(5)]  # the copy is gone
    tiers.manager.flush(PATIENCE_S)
    assert tiers.num_hit(hashes) == bad
    assert tiers.manager.statistics().mismatches == {tier: 1}
    tiers.put(hashes[bad : bad + 1], hashes[:bad])  # computed anew
    assert tiers.num_hit(hashes) == 5
    tiers.see_idle()


def test_bit_that_flipped_before_its_block_sank_to_disk_is_found_on_the_way_up(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8, disk=16, settings={"offload": {"in_flight_share": 1.0}})
    gate = make_tiers.gate(tiers, "host-disk")
    hashes = names(4)
    tiers.put(hashes)
    gate.wait_for(1)  # all are in host memory, and wait to be written
    tiers.spoil_memory("host", hashes[1], 100)
    gate.open()
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.reset_pool("device")
    tiers.manager.reset_pool("host")
    assert tiers.num_hit(hashes) == 1
    assert tiers.manager.statistics().mismatches == {"disk": 1}
    tiers.see_idle()


def test_every_byte_of_a_block_is_guarded_in_memory_and_in_the_file(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=4, disk=8)
    for tier in ("host", "disk"):
        for place in range(0, BLOCK_NBYTES, 13):
            hashes = names(1)
            tiers.put_below(hashes, tier)
            if tier == "host":
                tiers.spoil_memory("host", hashes[0], place)
            else:
                tiers.spoil_disk(hashes[0], place)
            assert tiers.num_hit(hashes) == 0
    num_flips = len(range(0, BLOCK_NBYTES, 13))
    assert tiers.manager.statistics().mismatches == {"host": num_flips, "disk": num_flips}


def test_file_that_somebody_cut_short_is_a_miss_and_the_tier_goes_on(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=4, disk=8)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    path = Path(tiers.manager.storage("disk").path)  # type: ignore[attr-defined]
    nbytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(0)
    assert tiers.num_hit(hashes) == 0
    assert tiers.lies("disk", hashes) == [False] * 3
    with path.open("r+b") as file:
        file.truncate(nbytes)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


def test_slots_that_were_exchanged_in_the_file_are_not_taken_for_each_other(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=4, disk=8)
    hashes = names(2)
    tiers.put_below(hashes, "disk")
    storage = tiers.manager.storage("disk")
    ids = tiers.pool("disk").lookup(hashes)
    storage.write(ids[::-1].copy(), storage.read(ids))
    kept = storage.checksums[ids]
    storage.checksums[ids] = kept[::-1]  # even with its checksum beside it
    storage.has_checksum[ids] = True
    assert tiers.num_hit(hashes) == 0
    assert tiers.manager.statistics().mismatches == {"disk": 2}


def test_unverified_tiers_carry_what_they_have(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8, disk=16, settings={"offload": {"verify_checksums": False}})
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 3
    tiers.put_below(hashes, "host")
    tiers.spoil_memory("host", hashes[0], 5)
    with tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes)).result(PATIENCE_S) as blocks:
        data = tiers.manager.storage("device").read(blocks.block_ids)
    assert np.count_nonzero(data != content_of(hashes)) == 1
    tiers.see_idle()
