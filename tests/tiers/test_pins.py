"""Pins: held where they lie, for their time, within a share, and gone at close."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_tiers import SteppedTiers, chain
from tier_site import Site, names

from kvbm._backend import Backend
from kvbm.errors import BlockStateError, ConfigError, PluginError, PoolClosed
from kvbm.planner import Limits
from kvbm.types import HashArray, IdArray

SIZES = {"device": 8, "host": 16}


@pytest.fixture
def tiers(backend: Backend) -> SteppedTiers:
    return SteppedTiers(backend, SIZES, limits=Limits(pin_share=0.5))


def evict_all(tiers: SteppedTiers, name: str) -> None:
    pool = tiers.pools[name]
    pool.allocate_blocks(pool.available_blocks).release()


def test_pinned_block_outlives_whatever_needs_the_room_until_its_time_is_over(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(3))
    assert tiers.planner.pins.pin(chain(2), 10.0) == 2
    evict_all(tiers, "device")
    assert tiers.lies("device", chain(3)) == [True, True, False]
    tiers.advance(9.99)
    evict_all(tiers, "device")
    assert tiers.lies("device", chain(2)) == [True, True]
    tiers.advance(0.01)
    assert tiers.pools["device"].status().active == 0
    evict_all(tiers, "device")
    assert tiers.lies("device", chain(2)) == [False, False]
    tiers.close()


def test_pin_holds_each_block_in_the_highest_tier_that_has_it_and_there_alone(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(4)[2:])
    tiers.put("host", chain(3))
    assert tiers.planner.pins.pin(chain(5), 10.0) == 4
    assert tiers.planner.pins.num_pinned(tiers.pools["device"]) == 2
    assert tiers.planner.pins.num_pinned(tiers.pools["host"]) == 2
    evict_all(tiers, "host")
    assert tiers.lies("host", chain(3)) == [True, True, False], "the third is pinned in the device tier"
    tiers.close()


def test_pins_take_their_share_of_a_pool_and_no_more_and_the_first_blocks_first(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(8))
    assert tiers.planner.pins.pin(chain(8)[:3], 10.0) == 3
    assert tiers.planner.pins.pin(chain(8), 20.0) == 4, "half of eight"
    evict_all(tiers, "device")
    assert tiers.lies("device", chain(8)) == [True] * 4 + [False] * 4
    tiers.advance(20)
    tiers.put("device", chain(8, family=2))
    assert tiers.planner.pins.pin(chain(8, family=2), 10.0) == 4, "what was over has given its room back"
    tiers.close()


def test_block_pinned_twice_is_held_once_and_until_the_later_moment(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(4))
    pins = tiers.planner.pins
    assert pins.pin(chain(4), 10.0) == 4
    assert pins.pin(chain(4)[1:2], 30.0) == 1
    assert pins.pin(chain(4)[2:3], 5.0) == 1, "pinned for longer already"
    assert (len(pins), tiers.pools["device"].status().active) == (4, 4)
    tiers.advance(5)
    assert tiers.pools["device"].status().active == 4
    tiers.advance(5)
    evict_all(tiers, "device")
    assert tiers.lies("device", chain(4)) == [False, True, False, False]
    tiers.advance(20)
    assert tiers.pools["device"].status().active == 0
    tiers.close()


def test_pin_that_is_made_longer_is_never_let_go_of_in_between(
    tiers: SteppedTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tiers.pools["device"]
    tiers.put("device", chain(2))
    tiers.planner.pins.pin(chain(2), 5.0)
    hold_blocks = pool.hold_blocks

    def hold_after_others(ids: IdArray, hashes: HashArray) -> Any:
        evict_all(tiers, "device")
        return hold_blocks(ids, hashes)

    monkeypatch.setattr(pool, "hold_blocks", hold_after_others)
    assert tiers.planner.pins.pin(chain(2), 10.0) == 2
    monkeypatch.undo()
    tiers.close()


def test_name_given_twice_is_pinned_once(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(1))
    assert tiers.planner.pins.pin(chain(1).repeat(3, axis=0), 10.0) == 1
    assert tiers.planner.pins.unpin(chain(1).repeat(2, axis=0)) == 1
    assert tiers.pools["device"].status().active == 0
    tiers.close()


def test_unpin_lets_go_of_those_blocks_or_of_all(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(4))
    pins = tiers.planner.pins
    assert pins.pin(chain(4), 10.0) == 4
    assert pins.unpin(chain(6)[3:]) == 1
    assert pins.unpin(chain(6)[3:]) == 0
    assert tiers.pools["device"].status().active == 3
    assert pins.unpin() == 3
    assert (len(pins), tiers.pools["device"].status().active) == (0, 0)
    assert tiers.planner.seconds_to_deadline() is None, "nothing is waited for"
    tiers.close()


def test_pinned_blocks_that_are_over_leave_leaves_first(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(4))
    tiers.planner.pins.pin(chain(4), 10.0)
    tiers.advance(10)
    victims = tiers.pools["device"].allocate_blocks(6)  # four are free
    assert tiers.lies("device", chain(4)) == [True, True, False, False]
    victims.release()
    tiers.close()


def test_next_end_of_a_pin_is_a_moment_the_pump_waits_for(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(2))
    tiers.planner.pump()
    tiers.channel.step_all()
    tiers.planner.pins.pin(chain(1), 10.0)
    tiers.planner.pins.pin(chain(2)[1:], 4.0)
    assert tiers.planner.seconds_to_deadline() == 4.0
    tiers.planner.pins.unpin(chain(2)[1:])
    assert tiers.planner.seconds_to_deadline() == 10.0
    tiers.close()


def test_pinned_pool_refuses_its_reset_by_name_and_keeps_everything(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(3))
    tiers.planner.pins.pin(chain(2), 10.0)
    with pytest.raises(BlockStateError, match="cannot reset pool 'device': 2 blocks are pinned, unpin"):
        tiers.planner.reset_pool(tiers.pools["device"])
    assert tiers.lies("device", chain(3)) == [True] * 3
    response = tiers.planner.reset_blocks(tiers.pools["device"], chain(3))
    assert (len(response.reset), len(response.in_use)) == (1, 2)
    tiers.planner.pins.unpin()
    assert tiers.planner.reset_pool(tiers.pools["device"]) == 2
    tiers.close()


@pytest.mark.parametrize("ttl", [0, -1.0, math.nan, math.inf])
def test_time_that_is_none_is_refused(tiers: SteppedTiers, ttl: float) -> None:
    with pytest.raises(ConfigError, match="give seconds, more than 0 and finite"):
        tiers.planner.pins.pin(chain(1), ttl)
    tiers.close()


def test_closing_lets_go_of_pins_and_refuses_new_ones(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(2))
    tiers.planner.pins.pin(chain(2), 1e9)
    tiers.close()
    with pytest.raises(PoolClosed):
        tiers.planner.pins.pin(chain(2), 1.0)


def test_plugged_policy_that_pins_is_refused_and_does_not_hang(backend: Backend) -> None:
    tiers = SteppedTiers(backend, SIZES)
    with tiers.planner._locked(), pytest.raises(PluginError):
        tiers.planner.pins.pin(chain(1), 1.0)
    tiers.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("pin"), st.integers(0, 5), st.integers(1, 6), st.integers(1, 20)),
        st.tuples(st.just("unpin"), st.integers(0, 5), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("pass"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("evict"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 3), st.just(0)),
    ),
    max_size=40,
)


def test_pins_agree_with_a_dict_of_moments(backend: Backend) -> None:
    @settings(max_examples=150, deadline=None)
    @given(OPERATIONS)
    def run(operations: list[tuple[str, int, int, int]]) -> None:
        tiers = SteppedTiers(backend, {"device": 8}, limits=Limits(pin_share=0.5))
        pool, pins = tiers.pools["device"], tiers.planner.pins
        until: dict[int, float] = {}
        for operation, start, length, ttl in operations:
            numbers = list(range(start, min(start + length, 8)))
            hashes = chain(8)[numbers]
            if operation == "put" and len(hashes) <= pool.available_blocks:
                tiers.put("device", hashes)
            elif operation == "pin":
                found = zip(numbers, tiers.lies("device", hashes), strict=True)
                there = [number for number, is_there in found if is_there]
                fresh = [number for number in there if until.get(number, 0) < tiers.clock() + ttl]
                longer = [number for number in there if number not in fresh]
                known, new = [n for n in fresh if n in until], [n for n in fresh if n not in until]
                fresh = known + new[: 4 - len(until)]
                until.update(dict.fromkeys(fresh, tiers.clock() + ttl))
                assert pins.pin(hashes, ttl) == len(fresh) + len(longer)
            elif operation == "unpin":
                assert pins.unpin(hashes) == len([until.pop(number) for number in numbers if number in until])
            elif operation == "pass":
                tiers.advance(start)
                until = {number: moment for number, moment in until.items() if moment > tiers.clock()}
            else:
                pool.allocate_blocks(pool.available_blocks).release()
            assert len(pins) == pins.num_pinned(pool) == pool.status().active == len(until)
            assert all(tiers.lies("device", chain(8)[list(until)]))
            pool.check()
        tiers.close()

    run()


def test_manager_of_one_tier_lets_go_of_a_pin_by_itself(make_tiers: Site) -> None:
    tiers = make_tiers(host=8)
    hashes = names(2)
    tiers.put(hashes)
    assert tiers.manager._thread is None, "nothing ends by itself yet"
    assert tiers.manager.pin(hashes, ttl=1e-3) == 2
    blocks = tiers.manager.top.allocate_blocks(8, timeout=60.0)  # waits for the pins' end
    blocks.release()
    assert tiers.manager.unpin() == 0


def test_manager_pins_and_unpins_by_hash(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16)
    hashes = names(2)
    tiers.put(hashes)
    tiers.manager.flush(60.0)
    assert tiers.manager.pin(hashes, ttl=1e6) == 2
    tiers.evict("device")
    assert tiers.lies("device", hashes) == [True, True]
    with pytest.raises(BlockStateError, match="pinned"):
        tiers.manager.reset_all()
    assert tiers.manager.unpin(hashes) == 2
    assert tiers.manager.reset_all() == 4


def test_pins_that_were_let_go_of_take_no_room_behind_one_that_is_not_over(tiers: SteppedTiers) -> None:
    tiers.put("device", chain(2))
    pins = tiers.planner.pins
    pins.pin(chain(1), 10.0)
    for i in range(100):
        pins.pin(chain(2)[1:], 20.0)
        if i % 2:
            pins.pin(chain(2)[1:], 30.0)  # longer: pinned anew
        tiers.planner.seconds_to_deadline()
        pins.unpin(chain(2)[1:])
        assert len(pins._ends) < 8
    assert tiers.planner.seconds_to_deadline() == 10.0
    tiers.advance(10)
    assert (len(pins), pins._num_dead, len(pins._ends)) == (0, 0, 0)
    tiers.close()
