"""What a restart must remember, and what an operator must read of a block that is bad."""

from __future__ import annotations

import logging

import pytest
from tier_site import PATIENCE_S, Site, names


def test_priority_set_after_a_block_went_down_outlives_a_restart(make_tiers: Site) -> None:
    settings = {"disk": {"path": str(make_tiers.directory / "slab")}}
    tiers, hashes = make_tiers(device=8, disk=8, settings=settings), names(4)
    tiers.put_below(hashes, "device", "disk")
    tiers.manager.set_priority(hashes, 90)
    tiers.see_idle()
    tiers.manager.close()
    again = make_tiers(device=8, disk=8, settings=settings)
    pool = again.pool("disk")
    assert pool.describe_blocks(pool.lookup(hashes))[2].tolist() == [90] * 4


def test_mismatch_is_warned_of_with_hash_and_slot_also_right_after_another_trouble(
    make_tiers: Site, caplog: pytest.LogCaptureFixture
) -> None:
    tiers, hashes = make_tiers(device=8, disk=8, settings={"disk": {"direct_io": False}}), names(1)
    tiers.put_below(hashes, "disk")
    slot = int(tiers.pool("disk").lookup(hashes)[0])
    tiers.spoil_disk(hashes[0], 5)
    tiers.manager._planner._complaints.level("onboard incomplete")  # of a read error, a moment ago
    with caplog.at_level(logging.WARNING):
        assert len(tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes)).result(PATIENCE_S)) == 0
    said = [text for text in caplog.messages if "checksum mismatch" in text]
    assert len(said) == 1
    assert f"block_id={slot} hash={hashes[0].tobytes().hex()}" in said[0]
