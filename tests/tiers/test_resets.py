"""Resets beside offloads: what moves is waited for, what waits is dropped, what was forgotten does not come back."""

from __future__ import annotations

import threading

import pytest
from tier_site import PATIENCE_S, Site, names

from kvbm.errors import TransferError, TransferTimeout


def test_a_reset_waits_for_what_moves_and_drops_what_waits(make_tiers: Site) -> None:
    tiers = make_tiers(device=32, host=32, settings={"offload": {"job_blocks": 2, "route_jobs": 1}})
    gate = make_tiers.gate(tiers, "device-host")
    hashes = names(8)
    tiers.put(hashes)
    gate.wait_for(1)
    num_forgotten: list[int] = []
    resetter = threading.Thread(target=lambda: num_forgotten.append(tiers.manager.reset_pool("device")))
    resetter.start()
    gate.open()
    resetter.join(PATIENCE_S)
    assert num_forgotten == [8], "nothing of it was held by then"
    assert tiers.route("device-host").dropped["reset"] == 6
    assert sum(tiers.lies("host", hashes)) == 2, "what moved has arrived"
    tiers.see_idle()


def test_a_reset_that_would_wait_too_long_forgets_nothing(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, settings={"runtime": {"offload_timeout_s": 0.05}})
    gate = make_tiers.gate(tiers, "device-host")
    hashes = names(3)
    tiers.put(hashes)
    gate.wait_for(1)
    with pytest.raises(TransferTimeout, match=r"offloads from device to host did not end within 0.05 s"):
        tiers.manager.reset_pool("device")
    assert tiers.lies("device", hashes) == [True] * 3
    gate.open()
    tiers.settle()
    assert tiers.manager.reset_all() >= 3
    tiers.see_idle()


def test_blocks_that_are_reset_below_while_they_move_do_not_arrive(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, settings={"offload": {"job_blocks": 2, "route_jobs": 1}})
    gate = make_tiers.gate(tiers, "device-host")
    hashes = names(4)
    tiers.put(hashes)
    gate.wait_for(1)
    tiers.manager.reset_blocks("host", hashes[1:3])
    gate.open()
    tiers.see_idle()
    assert tiers.lies("host", hashes) == [True, False, False, True]
    assert tiers.lies("device", hashes) == [True] * 4


def test_neither_flush_nor_reset_waits_inside_a_callback(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, settings={"runtime": {"small_copy": 0}})
    hashes = names(2)
    tiers.put_below(hashes, "host")
    gate = make_tiers.gate(tiers, "host-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    gate.wait_for(1)
    refused: list[str] = []

    def call_back(_: object) -> None:
        for call in (tiers.manager.flush, tiers.manager.reset_all):
            try:
                call()
            except TransferError as error:
                refused.append(str(error).split(" cannot")[0])

    transfer.add_done_callback(call_back)
    gate.open()
    transfer.result(PATIENCE_S).release()
    tiers.settle()
    assert refused == ["flush", "a reset"]
    tiers.see_idle()
