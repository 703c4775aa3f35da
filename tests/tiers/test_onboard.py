"""Hits come up from wherever they lie, as far as they are right, into their own memory (CONFORMANCE 27, 30, 40)."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from tier_site import BLOCK_NBYTES, PATIENCE_S, Site, Tiers, content_of, names

from kvbm.errors import BlockStateError, NotEnoughBlocksAvailable, TransferCancelled
from kvbm.testing.faults import FaultMode, FaultPlan
from kvbm.types import HashArray

TIERS = ("device", "host", "disk")


# -- room ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["host", "disk"])
def test_onboard_without_room_raises_with_both_numbers_and_takes_nothing(make_tiers: Site, source: str) -> None:
    tiers = make_tiers(device=4, host=8, disk=16)
    manager = tiers.manager
    hashes = names(3)
    tiers.put_below(hashes, source)
    mine = manager.allocate_blocks(2)
    with manager.match_sequence_hashes(hashes) as hit:
        before = manager.status()
        with pytest.raises(NotEnoughBlocksAvailable, match=r"need 3 blocks, have 2 \(2 free") as caught:
            manager.onboard(hit)
        assert (caught.value.requested, caught.value.available) == (3, 2)
        after = manager.status()
        assert {tier: (s.free, s.mutable, s.active, s.inactive) for tier, s in after.items()} == {
            tier: (s.free, s.mutable, s.active, s.inactive) for tier, s in before.items()
        }
        assert (len(hit), hit.tiers) == (3, {source: 3})
        mine.release()
        with manager.onboard(hit).result(PATIENCE_S) as blocks:  # the same hit
            tiers.see_right(blocks, hashes)
            assert len(blocks) == 3
        with pytest.raises(BlockStateError, match="this hit is used up: match again"):
            manager.onboard(hit)
    tiers.see_idle()


def test_onboard_counts_the_blocks_that_it_holds_itself_in_the_top_tier(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(5)
    tiers.put(hashes[:3])
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    tiers.put(hashes[3:], hashes[:3])
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert tiers.num_hit(hashes[:2]) == 2
    tiers.manager.flush(PATIENCE_S)
    with tiers.manager.match_sequence_hashes(hashes) as hit:
        assert hit.tiers == {"device": 2, "host": 3}
        with pytest.raises(NotEnoughBlocksAvailable) as caught:
            tiers.manager.onboard(hit)
        assert (caught.value.requested, caught.value.available) == (3, 2)
    assert tiers.num_hit(hashes[:4]) == 4
    tiers.see_idle()


def test_hit_that_is_let_go_of_keeps_nothing(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(3)
    tiers.put_below(hashes, "host")
    with tiers.manager.match_sequence_hashes(hashes):
        assert tiers.manager.status()["host"].active == 3
    hit = tiers.manager.match_sequence_hashes(hashes)
    hit.release()
    hit.release()
    del hit
    tiers.manager.match_sequence_hashes(hashes)  # dropped at once
    assert tiers.manager.lookup(hashes) == 3
    tiers.see_idle()


@pytest.mark.parametrize("where", ["device", "host", "disk", "all"])
def test_hit_of_another_manager_is_refused_and_stays_usable(make_tiers: Site, where: str) -> None:
    mine, other = (make_tiers(device=4, host=8, disk=16) for _ in range(2))
    hashes = names(3)
    for tiers in (mine, other):  # the same slots, other content
        tiers.put_below(hashes, *(TIERS if where == "all" else (where,)))
    theirs = names(3)
    other.put_below(theirs, *(TIERS if where == "all" else (where,)))
    with other.manager.match_sequence_hashes(theirs) as hit:
        with pytest.raises(BlockStateError, match="of another manager"):
            mine.manager.onboard(hit)
        with other.manager.onboard(hit).result(PATIENCE_S) as blocks:
            other.see_right(blocks, theirs)
            assert len(blocks) == 3


# -- from wherever each block is -------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", range(6))
def test_hole_in_host_memory_is_filled_from_disk(make_tiers: Site, hole: int) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(6)
    tiers.put_below(hashes, "host", "disk")
    tiers.manager.reset_blocks("host", hashes[hole : hole + 1])
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert hit.tiers == {"host": 5, "disk": 1}
    with tiers.manager.onboard(hit).result(PATIENCE_S) as blocks:
        tiers.see_right(blocks, hashes)
        assert len(blocks) == 6
    tiers.see_idle()
    assert tiers.lies("host", hashes) == [True] * 6  # it sank again


def test_hit_of_every_mixture_of_tiers_comes_up_in_order(make_tiers: Site) -> None:
    tiers = make_tiers(device=12, host=16, disk=64)
    rng = np.random.default_rng(11)
    for _ in range(12):
        hashes = names(6)
        tiers.put_below(hashes, "device", "host", "disk")
        for tier in TIERS:
            gone = rng.random(6) < 0.5
            tiers.manager.reset_blocks(tier, hashes[gone])
        present = np.array([tiers.lies(tier, hashes) for tier in TIERS]).any(axis=0)
        num_expected = int(np.argmin(np.append(present, False)))
        assert tiers.manager.lookup(hashes) == num_expected
        assert tiers.num_hit(hashes) == num_expected
        tiers.see_idle()


@pytest.mark.parametrize("affects", ["one", "some", "all"])
@pytest.mark.parametrize("mode", [FaultMode.FAIL, FaultMode.TEAR, FaultMode.FLIP])
def test_block_that_comes_up_badly_shortens_the_hit_and_its_copy_is_gone(
    make_tiers: Site, mode: FaultMode, affects: str
) -> None:
    plan = FaultPlan([mode], on="read", affects=affects, seed=6)
    tiers = make_tiers(device=8, host=8, disk=16, faults=plan)
    hashes = names(6)
    tiers.put_below(hashes, "disk")
    with tiers.get(hashes) as blocks:
        num_right = len(blocks)
    tiers.manager.flush(PATIENCE_S)
    lies = tiers.lies("disk", hashes)
    assert num_right == [*lies, False].index(False)
    num_bad = lies.count(False)
    assert num_bad == plan.num_blocks_injected[mode]
    reason = "failed" if mode is FaultMode.FAIL else "corrupt"
    assert tiers.route("disk-device").dropped == {reason: num_bad}
    assert tiers.manager.statistics().mismatches == ({} if mode is FaultMode.FAIL else {"disk": num_bad})
    # Those behind the bad one were right, and lie in the top tier now.
    assert tiers.lies("device", hashes) == lies
    assert tiers.num_hit(hashes) == num_right
    tiers.see_idle()


def test_prompt_that_names_a_block_twice_gets_it_twice(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8)
    hashes = names(2)
    tiers.put_below(hashes, "host")
    twice = np.concatenate([hashes, hashes])
    assert tiers.num_hit(twice) == 4
    tiers.see_idle()


# -- joins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["host", "disk"])
def test_blocks_that_are_loading_are_joined_and_read_once(make_tiers: Site, source: str) -> None:
    tiers = make_tiers(device=16, host=8, disk=16, settings={"runtime": {"small_copy": 0}})
    hashes = names(5)
    tiers.put_below(hashes, source)
    gate = make_tiers.gate(tiers, f"{source}-device")
    first = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[:4]))
    gate.wait_for(1)
    same = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[:4]))
    longer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    assert not any(transfer.done() for transfer in (first, same, longer))
    assert tiers.manager.statistics().joined == 8
    assert tiers.manager.status()["device"].mutable == 5
    gate.open()
    guards = [transfer.result(PATIENCE_S) for transfer in (first, same, longer)]
    assert [len(guard) for guard in guards] == [4, 4, 5]
    for guard in guards:
        tiers.see_right(guard, hashes)
    assert guards[0].block_ids.tolist() == guards[1].block_ids.tolist() == guards[2].block_ids[:4].tolist()
    assert [len(job.hashes) for job in gate.copies(f"{source}-device")] == [4, 1]
    for guard in guards:
        guard.release()
    tiers.see_idle()


def test_a_patient_request_does_not_join_an_impatient_one(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    impatient = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes), timeout=0.02)
    gate.wait_for(1)
    assert impatient.wait(PATIENCE_S)
    impatient.result(0).release()
    patient = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes), timeout=PATIENCE_S)
    assert tiers.manager.statistics().joined == 0
    gate.open()
    blocks = patient.result(PATIENCE_S)
    tiers.see_right(blocks, hashes)
    assert len(blocks) == 3
    blocks.release()
    tiers.see_idle()


def test_a_wait_with_a_near_deadline_leaves_the_copy_to_the_executor(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=8, settings={"runtime": {"small_copy": 0}})
    hashes = names(3)
    tiers.put_below(hashes, "host")
    gate = make_tiers.gate(tiers, "host-device")
    stuck = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[:1]))
    gate.wait_for(1)  # the executor's thread is busy: another job waits behind it
    hurried = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[1:]), timeout=0.05)
    assert len(hurried.result()) == 0, "it ended at its deadline"
    gate.open()
    assert len(stuck.result(PATIENCE_S)) == 1
    stuck.result(0).release()
    tiers.see_idle()


def test_blocks_that_were_joined_and_are_bad_shorten_both_hits(make_tiers: Site) -> None:
    plan = FaultPlan([FaultMode.FLIP], on="read", seed=1)
    tiers = make_tiers(device=16, host=8, disk=16, faults=plan)
    hashes = names(4)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfers = [tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes)) for _ in range(3)]
    gate.wait_for(1)
    gate.open()
    guards = [transfer.result(PATIENCE_S) for transfer in transfers]
    assert len({len(guard) for guard in guards}) == 1
    assert len(guards[0]) < 4
    for guard in guards:
        tiers.see_right(guard, hashes)
        guard.release()
    assert tiers.manager.statistics().mismatches == {"disk": 1}
    tiers.see_idle()


def test_first_waiter_that_gives_up_does_not_cost_the_second_its_blocks(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    first = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    second = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    assert first.cancel()
    gate.open()
    with second.result(PATIENCE_S) as blocks:
        assert len(blocks) == 3
        tiers.see_right(blocks, hashes)
    with pytest.raises(TransferCancelled):
        first.result(0)
    tiers.see_idle()


def test_many_threads_that_want_the_same_prompt_all_get_it(make_tiers: Site) -> None:
    tiers = make_tiers(device=32, host=32, disk=64)
    prompts = [names(6) for _ in range(4)]
    for prompt in prompts:
        tiers.put_below(prompt, "disk")
    for prompt in prompts:
        tiers.manager.reset_blocks("device", prompt)
    numbers: list[int] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(PATIENCE_S)
        numbers.extend(tiers.num_hit(prompt) for prompt in prompts)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert numbers == [6] * 32
    tiers.see_idle()


# -- late bytes ------------------------------------------------------------------------------------------------


def take_all(tiers: Tiers) -> tuple[Any, HashArray]:
    """Give every block that can be had in the top tier to a new owner, filled with what is theirs."""
    manager = tiers.manager
    owners = names(manager.top.available_blocks)
    fresh = manager.allocate_blocks(len(owners))
    manager.storage(tiers.top).write(fresh.block_ids, content_of(owners))
    return fresh, owners


def see_untouched(tiers: Tiers, owned: Any, owners: HashArray) -> None:
    data = tiers.manager.storage(tiers.top).read(owned.block_ids)
    np.testing.assert_array_equal(data, content_of(owners))


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
@pytest.mark.parametrize("layout", ["fully_contiguous", "layer_separate_outer_first"])
def test_bytes_that_come_late_never_reach_a_new_owner(make_tiers: Site, layout: str, how: str) -> None:
    plan = FaultPlan([FaultMode.DELAY] * 3, on="read")
    tiers = make_tiers(device=6, host=8, disk=16, faults=plan, settings={"device": {"layout": layout}})
    storage: Any = tiers.manager.storage("disk")
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    hit = tiers.manager.match_sequence_hashes(hashes)
    if how == "cancelled":
        transfer = tiers.manager.onboard(hit)
        assert storage.wait_until_held(1)
        assert transfer.cancel()
    else:
        transfer = tiers.manager.onboard(hit, timeout=0.02)
        with transfer.result(PATIENCE_S) as blocks:
            assert len(blocks) == 0
    assert transfer.done()
    owned, owners = take_all(tiers)
    plan.is_on = False
    storage.release()
    tiers.settle()
    see_untouched(tiers, owned, owners)
    owned.release()
    assert tiers.num_hit(hashes) == 3  # what came late is there for the next, or is read again
    tiers.see_idle()


def test_targets_of_an_abandoned_onboard_are_nobodys_until_its_job_is_answered(make_tiers: Site) -> None:
    tiers = make_tiers(device=6, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    gate.wait_for(1)
    (job,) = gate.copies("disk-device")
    assert transfer.cancel()
    assert tiers.manager.device.available_blocks == 3
    owned, owners = take_all(tiers)
    assert not set(owned.block_ids.tolist()) & set(job.destination_ids.tolist())
    assert tiers.manager.status()["disk"].active == 3  # nor may the sources go
    gate.open()
    with tiers.get(hashes) as blocks:  # which the next request finds in the top tier, or joins
        assert blocks.block_ids.tolist() == job.destination_ids.tolist()
    see_untouched(tiers, owned, owners)
    owned.release()
    assert len(gate.copies("disk-device")) == 1
    tiers.see_idle()


def test_onboard_ends_at_its_deadline_with_the_leading_blocks_that_are_there(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(6)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes[:2]) == 2
    gate = make_tiers.gate(tiers, "disk-device")
    blocks = tiers.get(hashes, timeout=0.02)
    assert len(blocks) == 2
    assert tiers.route("disk-device").in_flight == 4
    gate.open()
    blocks.release()
    tiers.settle()
    assert tiers.num_hit(hashes) == 6
    tiers.see_idle()


def test_read_that_never_ends_costs_ring_slots_and_no_byte_until_it_does(make_tiers: Site) -> None:
    plan = FaultPlan([FaultMode.NEVER], on="read")
    tiers = make_tiers(device=8, host=8, disk=16, faults=plan, settings={"offload": {"staging_blocks": 4}})
    storage: Any = tiers.manager.storage("disk")
    hashes, others = names(2), names(3)
    tiers.put_below(hashes, "disk")
    tiers.put_below(others, "disk")
    with tiers.get(hashes, timeout=0.02) as blocks:
        assert len(blocks) == 0
    ring: Any = tiers.manager._executor._means.staging
    assert tiers.num_hit(others) == 3  # through what is left of the ring
    assert ring.num_free == 2
    storage.abandon()
    tiers.manager.flush(PATIENCE_S)
    assert ring.num_free == 4
    assert tiers.num_hit(hashes) == 2
    tiers.see_idle()


@pytest.mark.usefixtures("cpu_device")  # a layer as a NumPy array
def test_layers_of_what_came_up_are_read_only(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(2)
    tiers.put_below(hashes, "host")
    with tiers.get(hashes) as blocks:
        with pytest.raises(BlockStateError, match="is active, must be mutable or complete to store into it"):
            tiers.manager.store_kv(blocks[0], 0, bytes(BLOCK_NBYTES // 3))
        with pytest.raises(ValueError, match="read-only"):
            blocks[0].layer(0).numpy()[...] = 1
