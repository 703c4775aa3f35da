"""Prefetch: staged in the background, bounded, cancellable, answered with counts, joined by requests."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from stepped_tiers import SteppedTiers, chain
from tier_site import PATIENCE_S, Site, names

from kvbm._backend import Backend
from kvbm.errors import PoolClosed
from kvbm.jobs import Outcome
from kvbm.planner import Limits, Prefetch

SIZES = {"device": 16, "host": 16, "disk": 32}


@pytest.fixture
def tiers(backend: Backend) -> SteppedTiers:
    return SteppedTiers(backend, SIZES, limits=Limits(job_blocks=2, in_flight_share=0.5, prefetch_blocks=6))


def counts(prefetch: Prefetch) -> tuple[int, int, int]:
    return prefetch.accepted, prefetch.clipped, prefetch.rejected


def test_prefetch_stages_blocks_from_disk_in_the_host_tier_and_no_higher(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    prefetch = tiers.planner.loader.prefetch(chain(4))
    assert (counts(prefetch), prefetch.done()) == ((4, 0, 0), False)
    tiers.settle()
    assert prefetch.result(0) == 4
    assert not prefetch.is_draining
    assert tiers.lies("host", chain(4)) == [True] * 4
    assert tiers.lies("device", chain(4)) == [False] * 4
    assert [job.is_urgent for job in tiers.copies("disk-host")] == [False, False]
    tiers.close()


def test_without_a_host_tier_blocks_are_staged_in_the_top_tier(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"device": 8, "disk": 8})
    tiers.put("disk", chain(2))
    prefetch = tiers.planner.loader.prefetch(chain(2))
    tiers.settle()
    assert prefetch.result(0) == 2
    assert tiers.lies("device", chain(2)) == [True, True]
    tiers.close()


def test_each_block_is_counted_once_as_accepted_clipped_or_rejected(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(12))
    tiers.put("host", chain(2))
    tiers.put("device", chain(3)[2:])
    hashes = np.concatenate([chain(14), chain(4)[3:]])  # three are above, two nowhere, one is named twice
    prefetch = tiers.planner.loader.prefetch(hashes)
    assert counts(prefetch) == (6, 3, 6)
    assert repr(prefetch) == "Prefetch(pending, accepted=6, clipped=3, rejected=6)"
    tiers.settle()
    assert prefetch.result(0) == 6
    assert tiers.lies("host", chain(12)) == [True] * 2 + [True] * 7 + [False] * 3, "the third came down from above"
    tiers.close()


def test_bound_holds_over_all_prefetches_and_is_given_back_when_they_end(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(14))
    first = tiers.planner.loader.prefetch(chain(4))
    second = tiers.planner.loader.prefetch(chain(14)[4:10])
    assert (counts(first), counts(second)) == ((4, 0, 0), (2, 4, 0))
    tiers.settle()
    third = tiers.planner.loader.prefetch(chain(14)[6:])
    assert counts(third) == (6, 2, 0)
    tiers.settle()
    tiers.close()


def test_prefetch_takes_no_more_than_its_share_and_what_has_room(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"device": 8, "host": 8, "disk": 32}, limits=Limits(in_flight_share=0.5))
    tiers.put("disk", chain(10))
    held = tiers.pools["host"].allocate_blocks(5)
    assert counts(tiers.planner.loader.prefetch(chain(10))) == (3, 7, 0)
    held.release()
    tiers.settle()
    assert counts(tiers.planner.loader.prefetch(chain(10))) == (4, 3, 3)
    tiers.settle()
    full = tiers.pools["host"].allocate_blocks(8)
    none = tiers.planner.loader.prefetch(chain(10))
    assert (counts(none), none.result(0)) == ((0, 10, 0), 0)
    full.release()
    tiers.close()


def test_prefetch_of_nothing_is_done_at_once(tiers: SteppedTiers) -> None:
    for hashes in (chain(0), chain(3)):
        prefetch = tiers.planner.loader.prefetch(hashes)
        assert prefetch.done()
        assert (counts(prefetch), prefetch.result(0)) == ((0, 0, len(hashes)), 0)
    tiers.close()


def test_second_prefetch_of_a_block_waits_for_the_first_and_takes_no_room(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(2))
    first, second = tiers.planner.loader.prefetch(chain(2)), tiers.planner.loader.prefetch(chain(2))
    assert (counts(second), second.done()) == ((2, 0, 0), False)
    tiers.settle()
    assert (first.result(0), second.result(0)) == (2, 2)
    assert len(tiers.copies("disk-host")) == 1
    tiers.close()


def test_staged_blocks_leave_leaves_first_although_their_head_came_first(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(6))
    tiers.planner.loader.prefetch(chain(6))
    tiers.settle()
    victims = tiers.pools["host"].allocate_blocks(13)
    assert tiers.lies("host", chain(6)) == [True] * 3 + [False] * 3
    victims.release()
    tiers.close()


# -- ends ------------------------------------------------------------------------------------------------------------


def test_cancelled_prefetch_ends_at_once_and_what_moves_arrives(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    prefetch = tiers.planner.loader.prefetch(chain(4))
    tiers.channel.step()
    assert prefetch.cancel()
    assert prefetch.cancelled()
    assert prefetch.is_draining
    assert tiers.pools["host"].status().inactive == 2, "what had arrived is let go of"
    tiers.settle()
    assert not prefetch.is_draining
    assert tiers.lies("host", chain(4)) == [True] * 4, "this channel revokes nothing"
    tiers.close()


def test_cancelled_prefetch_takes_back_what_was_not_begun(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"offload": {"job_blocks": 1, "in_flight_share": 1.0}})
    hashes = names(6)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-host")
    prefetch = tiers.manager.prefetch(hashes)
    gate.wait_for(1)
    prefetch.cancel()
    gate.open()
    tiers.see_idle()
    num_begun = len(gate.copies("disk-host"))
    assert 1 <= num_begun <= 2, "as many as a route has threads"
    assert not prefetch.is_draining
    assert sum(tiers.lies("host", hashes)) == num_begun


def test_prefetch_ends_at_its_deadline_with_what_is_there(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    ends: list[Prefetch] = []
    prefetch = tiers.planner.loader.prefetch(chain(4), 5.0)
    prefetch.add_done_callback(ends.append)  # type: ignore[arg-type]
    tiers.channel.step()
    assert tiers.planner.seconds_to_deadline() == pytest.approx(5.0, abs=0.01)
    tiers.clock.advance(5.0)
    tiers.planner.pump()
    assert ends == [prefetch]
    assert prefetch.result(0) == 2
    tiers.settle()
    assert tiers.lies("host", chain(4)) == [True] * 4
    assert counts(tiers.planner.loader.prefetch(chain(4))) == (0, 0, 4)
    tiers.close()


def test_block_that_fails_is_not_counted_as_arrived_and_its_slot_is_given_back(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    prefetch = tiers.planner.loader.prefetch(chain(4))
    tiers.channel.answer(0, Outcome.FAILED)
    tiers.settle()
    assert prefetch.result(0) == 2
    assert tiers.lies("host", chain(4)) == [False, False, True, True]
    tiers.close()


def test_closing_ends_a_prefetch_with_pool_closed(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(2))
    prefetch = tiers.planner.loader.prefetch(chain(2))
    tiers.planner.close(0)
    assert isinstance(prefetch.exception(0), PoolClosed)
    tiers.close()
    with pytest.raises(PoolClosed):
        tiers.planner.loader.prefetch(chain(2))


def test_prefetch_can_be_awaited(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=16)
    hashes = names(2)
    tiers.put_below(hashes, "disk")

    async def wait() -> int:
        return await tiers.manager.prefetch(hashes)

    assert asyncio.run(wait()) == 2
    assert tiers.lies("host", hashes) == [True, True]


# -- joined by requests ----------------------------------------------------------------------------------------------


def test_request_waits_for_what_is_being_staged_and_reads_the_disk_once(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    prefetch = tiers.planner.loader.prefetch(chain(4)[:2])
    onboarded = tiers.planner.onboard(tiers.planner.match(chain(4)))
    tiers.settle()
    with onboarded.result(0) as blocks:
        assert blocks.hashes.tolist() == chain(4).tolist()
    assert prefetch.result(0) == 2
    assert [len(job.hashes) for job in tiers.copies("disk-host")] == [2]
    assert [len(job.hashes) for job in tiers.copies("disk-device")] == [2]
    assert [(len(job.hashes), job.is_urgent) for job in tiers.copies("host-device")] == [(2, True)]
    assert tiers.planner.statistics().joined == 2
    tiers.close()


def test_request_whose_staged_blocks_fail_loads_them_from_below(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(4))
    prefetch = tiers.planner.loader.prefetch(chain(4))
    onboarded = tiers.planner.onboard(tiers.planner.match(chain(4)))
    tiers.channel.answer(0, Outcome.LATE)
    tiers.settle()
    with onboarded.result(0) as blocks:
        assert len(blocks) == 4
    assert prefetch.result(0) == 2
    assert [len(job.hashes) for job in tiers.copies("disk-device")] == [2]
    tiers.close()


def test_request_that_joined_a_prefetch_ends_at_its_own_deadline(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(2))
    tiers.planner.loader.prefetch(chain(2), 30.0)
    onboarded = tiers.planner.onboard(tiers.planner.match(chain(2)), 20.0)
    tiers.clock.advance(20.0)
    tiers.planner.pump()
    assert onboarded.done()
    onboarded.result(0).release()
    tiers.settle()
    assert not onboarded.is_draining
    tiers.close()


def test_cancelled_or_closed_request_that_joined_a_prefetch_leaves_nothing(backend: Backend) -> None:
    for end in ("cancel", "close"):
        tiers = SteppedTiers(backend, SIZES)
        tiers.put("disk", chain(3))
        tiers.planner.loader.prefetch(chain(3)[:2])
        onboarded = tiers.planner.onboard(tiers.planner.match(chain(3)))
        if end == "cancel":
            onboarded.cancel()
        else:
            tiers.planner.close(0)
            assert isinstance(onboarded.exception(0), PoolClosed)
        tiers.channel.step_all()
        tiers.close()
        assert onboarded.done()
        assert not onboarded.is_draining


def test_request_takes_over_what_a_prefetch_has_not_begun(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=16, settings={"offload": {"job_blocks": 1, "in_flight_share": 1.0}})
    hashes = names(6)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-host")
    prefetch = tiers.manager.prefetch(hashes)
    gate.wait_for(1)  # a route has two threads at most: the last three blocks wait
    onboarded = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[3:]))
    with onboarded.result(PATIENCE_S) as blocks:  # the gate is shut: it did not wait for the prefetch
        tiers.see_right(blocks, hashes[3:])
        assert len(blocks) == 3
    gate.open()
    assert prefetch.result(PATIENCE_S) == 3
    tiers.see_idle()


def test_blocks_on_their_way_to_the_top_are_not_staged(tiers: SteppedTiers) -> None:
    tiers.put("disk", chain(2))
    onboarded = tiers.planner.onboard(tiers.planner.match(chain(2)))
    assert counts(tiers.planner.loader.prefetch(chain(2))) == (0, 0, 2)
    tiers.settle()
    onboarded.result(0).release()
    tiers.close()


def test_request_and_prefetch_join_each_other_where_there_is_no_host_tier(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"device": 8, "disk": 8})
    tiers.put("disk", chain(4))
    onboarded = tiers.planner.onboard(tiers.planner.match(chain(2)))
    prefetch = tiers.planner.loader.prefetch(chain(4))
    second = tiers.planner.onboard(tiers.planner.match(chain(4)))
    assert counts(prefetch) == (4, 0, 0)
    tiers.settle()
    assert prefetch.result(0) == 4
    for transfer, num_blocks in ((onboarded, 2), (second, 4)):
        with transfer.result(0) as blocks:
            assert len(blocks) == num_blocks
    assert [len(job.hashes) for job in tiers.copies("disk-device")] == [2, 2]
    tiers.close()


def test_prefetched_blocks_have_the_right_bytes(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=32)
    hashes = names(4)
    tiers.put_below(hashes, "disk")
    assert tiers.manager.prefetch(hashes).result(PATIENCE_S) == 4
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert hit.tiers == {"host": 4}
    with tiers.manager.onboard(hit).result(PATIENCE_S) as blocks:
        tiers.see_right(blocks, hashes)
        assert len(blocks) == 4
    tiers.see_idle()


def test_flipped_bit_on_disk_is_not_staged(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, disk=32)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    tiers.spoil_disk(hashes[1], 7)
    assert tiers.manager.prefetch(hashes).result(PATIENCE_S) == 2
    assert tiers.lies("host", hashes) == [True, False, True]
    assert tiers.manager.statistics().mismatches["disk"] == 1
    tiers.see_idle()


def test_threads_that_prefetch_pin_plan_and_onboard_leave_nothing_and_see_right_bytes(make_tiers: Site) -> None:
    settings = {
        "runtime": {"small_copy": 0},
        "offload": {"job_blocks": 2, "in_flight_share": 0.5, "prefetch_blocks": 8, "staging_blocks": 8},
        "host": {"ttl": "0.05s"},
    }
    tiers = make_tiers(device=48, host=32, disk=64, settings=settings)
    prompts = [names(4) for _ in range(12)]
    for hashes in prompts:
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
    failures: list[BaseException] = []
    num_right = [0] * 4

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(150):
                hashes = prompts[int(rng.integers(len(prompts)))]
                prefetch = tiers.manager.prefetch(hashes)
                assert prefetch.accepted + prefetch.clipped + prefetch.rejected == 4
                if rng.random() < 0.2:
                    prefetch.cancel()
                if rng.random() < 0.2:
                    tiers.manager.pin(hashes, ttl=0.01)
                hit = tiers.manager.match_sequence_hashes(hashes)
                tiers.manager.plan_onboard(hit, 1000.0)
                with tiers.manager.onboard(hit).result(PATIENCE_S) as blocks:
                    tiers.see_right(blocks, hashes)
                    num_right[number] += len(blocks)
                tiers.manager.reset_blocks("device", hashes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    assert min(num_right) > 500, "nearly all of six hundred"
    tiers.manager.unpin()
    tiers.see_idle()
