"""Time to live: what nobody uses leaves its tier, neither early nor late, and no restart finds it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_tiers import TTL_S, SteppedTiers, chain
from tier_site import PATIENCE_S, Site, names

from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.jobs import CopyJob, ForgetJob
from kvbm.planner import expiry
from kvbm.types import HashArray, IdArray, ResetBlocksResponse, Tier

LATE_S = TTL_S / 16 + TTL_S / 1024 + 1e-6  # how much later than its time a block may leave
STEP_S = 1.0


def make(backend: Backend, *tiers: str, num_blocks: int = 16) -> SteppedTiers:
    return SteppedTiers(backend, dict.fromkeys(tiers, num_blocks), ttls_s={Tier(tiers[-1]): TTL_S})


def pass_time(tiers: SteppedTiers, seconds: float) -> None:
    """Let time pass as a thread sees it, that wakes when it wants to."""
    end = tiers.clock() + seconds
    while tiers.clock() < end:
        waits_s = tiers.planner.seconds_to_deadline()
        tiers.advance(min(end - tiers.clock(), max(1e-3, waits_s if waits_s is not None else seconds)))


def test_block_leaves_after_its_time_and_not_before(backend: Backend) -> None:
    tiers = make(backend, "host")
    tiers.put("host", chain(3))
    pass_time(tiers, TTL_S)
    assert tiers.lies("host", chain(3)) == [True] * 3, "not before"
    pass_time(tiers, LATE_S)
    assert tiers.lies("host", chain(3)) == [False] * 3
    assert tiers.planner.statistics().expired == {"host": 3}
    assert tiers.pools["host"].status().free == 16
    tiers.close()


@pytest.mark.parametrize("use", ["match", "touch", "hold", "register"])
def test_every_use_starts_the_time_anew(backend: Backend, use: str) -> None:
    tiers = make(backend, "host")
    pool = tiers.pools["host"]
    tiers.put("host", chain(2))
    pass_time(tiers, TTL_S * 0.9)
    if use == "match":
        pool.match_sequence_hashes(chain(1)).release()
    elif use == "touch":
        pool.touch_blocks(chain(1))
    elif use == "hold":
        pool.hold_blocks(pool.lookup(chain(1)), chain(1))[0].release()
    else:
        tiers.put("host", chain(1))  # computed again: it folds onto the one that is there
    pass_time(tiers, TTL_S * 0.1 + LATE_S)
    assert tiers.lies("host", chain(2)) == [True, False]
    pass_time(tiers, TTL_S)
    assert tiers.lies("host", chain(2)) == [False, False]
    tiers.close()


def test_looking_is_no_use(backend: Backend) -> None:
    tiers = make(backend, "host")
    tiers.put("host", chain(1))
    pass_time(tiers, TTL_S * 0.9)
    tiers.pools["host"].lookup(chain(1))
    tiers.planner.lookup(chain(1))
    tiers.pools["host"].set_priority(chain(1), 90)
    pass_time(tiers, TTL_S * 0.1 + LATE_S)
    assert tiers.lies("host", chain(1)) == [False]
    tiers.close()


def test_block_in_use_stays_and_its_time_begins_at_its_release(backend: Backend) -> None:
    tiers = make(backend, "host")
    tiers.put("host", chain(2))
    held = tiers.pools["host"].match_sequence_hashes(chain(1))
    pass_time(tiers, 5 * TTL_S)
    assert tiers.lies("host", chain(2)) == [True, False]
    held.release()
    pass_time(tiers, TTL_S)
    assert tiers.lies("host", chain(1)) == [True]
    pass_time(tiers, LATE_S)
    assert tiers.lies("host", chain(1)) == [False]
    tiers.close()


def test_hits_in_the_tier_above_keep_the_block_below(backend: Backend) -> None:
    tiers = make(backend, "device", "host")
    tiers.put("device", chain(2))
    tiers.settle()
    assert tiers.lies("host", chain(2)) == [True, True]
    pass_time(tiers, TTL_S * 0.9)
    tiers.planner.match(chain(1)).release()
    pass_time(tiers, TTL_S * 0.1 + LATE_S)
    assert tiers.lies("host", chain(2)) == [True, False]
    assert tiers.lies("device", chain(2)) == [True, True], "another tier's time is its own"
    tiers.close()


def test_tier_without_a_time_keeps_its_blocks_and_is_never_looked_at(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"host": 4})
    tiers.put("host", chain(2))
    assert tiers.planner.seconds_to_deadline() is None
    tiers.advance(1e9)
    assert tiers.lies("host", chain(2)) == [True, True]
    tiers.close()


def test_big_pool_is_looked_at_a_window_at_a_time(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "_WINDOW", 64)
    monkeypatch.setattr(expiry, "_CHUNK", 10)
    tiers = make(backend, "host", num_blocks=1000)
    tiers.put("host", chain(1000))
    pool = tiers.pools["host"]
    tiers.clock.advance(TTL_S + LATE_S)
    counts = [1000]
    while tiers.planner.pump():
        counts.append(pool.status().inactive)
        assert 0 <= counts[-2] - counts[-1] <= 10, "one chunk a step"
    assert pool.status().inactive == 0
    assert len(counts) >= 100
    assert tiers.planner.statistics().expired == {"host": 1000}
    tiers.close()


def test_slot_that_was_freed_and_taken_again_has_a_time_of_its_own(backend: Backend) -> None:
    tiers = make(backend, "host", num_blocks=4)
    tiers.put("host", chain(4))
    pass_time(tiers, TTL_S * 0.9)
    tiers.put("host", chain(4, family=2))  # all four are evicted
    pass_time(tiers, TTL_S * 0.5)
    assert tiers.lies("host", chain(4, family=2)) == [True] * 4
    tiers.close()


def test_slots_that_are_free_or_held_are_not_looked_up_at_every_look(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make(backend, "host")
    pool = tiers.pools["host"]
    tiers.put("host", chain(8))
    held = pool.match_sequence_hashes(chain(2))
    pass_time(tiers, TTL_S + LATE_S)
    num_described: list[int] = []
    describe_blocks = pool.describe_blocks

    def describe(ids: IdArray) -> Any:
        num_described.append(len(ids))
        return describe_blocks(ids)

    monkeypatch.setattr(pool, "describe_blocks", describe)
    pass_time(tiers, TTL_S * 0.9)
    assert len(num_described) > 10
    assert sum(num_described) == 0
    held.release()
    tiers.close()


def test_recording_tier_is_told_so_that_no_restart_finds_the_block(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"device": 8, "disk": 8}, ttls_s={Tier.DISK: TTL_S}, recording=(Tier.DISK,))
    tiers.put("disk", chain(3))
    pass_time(tiers, TTL_S + LATE_S)
    told = [job for job in tiers.jobs if isinstance(job, ForgetJob)]
    assert [job.tier for job in told] == [Tier.DISK]
    assert sorted(told[0].hashes.tolist()) == chain(3).tolist()
    assert told[0].ids is None, "by name: an older copy may lie in a slot that nobody took again"
    tiers.close()


def test_block_is_not_written_anew_while_its_name_is_being_forgotten(backend: Backend) -> None:
    tiers = SteppedTiers(backend, {"device": 8, "disk": 8}, ttls_s={Tier.DISK: TTL_S}, recording=(Tier.DISK,))
    tiers.put("disk", chain(2))
    tiers.clock.advance(TTL_S + LATE_S)
    while tiers.planner.pump():
        pass
    assert tiers.lies("disk", chain(2)) == [False, False]
    tiers.put("device", chain(3))
    while tiers.planner.pump():
        pass
    (job,) = [job for job in tiers.channel.waiting if isinstance(job, CopyJob)]
    assert job.hashes.tolist() == chain(3)[2:].tolist()
    assert tiers.planner.statistics().route(Tier.DEVICE, Tier.DISK).dropped["expiring"] == 2
    tiers.settle()  # the forgetting is answered
    tiers.pools["device"].reset()
    tiers.put("device", chain(3))
    tiers.settle()
    assert tiers.lies("disk", chain(3)) == [True] * 3
    tiers.close()


def test_older_copy_of_a_block_that_left_is_not_found_by_a_restart(make_tiers: Site) -> None:
    settings = {"disk": {"path": str(make_tiers.directory / "slab"), "ttl": "100s"}}
    tiers = make_tiers(device=8, disk=8, settings=settings)
    hashes = names(2)
    tiers.put_below(hashes, "disk")
    pool, storage = tiers.pool("disk"), tiers.manager.storage("disk")
    blocks = pool.match_sequence_hashes(hashes)
    pool.discard_blocks(blocks)  # as after a read that failed: the record stays, the slot is free
    blocks.release()
    tiers.manager.reset_pool("device")
    tiers.put_below(hashes, "disk")
    _, live, _, _ = storage.inventory()
    assert len(live) == 2
    expiry = tiers.manager._planner._expiry
    now = expiry._clock() + 300
    expiry._clock = lambda: now
    while expiry.step():
        pass
    tiers.settle()
    assert tiers.lies("disk", hashes) == [False] * 2
    tiers.manager.close()
    again = make_tiers(device=8, disk=8, settings=settings)
    assert again.lies("disk", hashes) == [False] * 2


def test_restored_blocks_have_their_whole_time(backend: Backend) -> None:
    tiers = make(backend, "host")
    tiers.advance(TTL_S * 0.9)
    priorities = np.full(2, 50, dtype=np.uint8)
    tiers.pools["host"].restore_blocks(np.array([3, 1], dtype=np.int32), chain(2), chain(2), priorities)
    pass_time(tiers, TTL_S)
    assert tiers.lies("host", chain(2)) == [True, True]
    pass_time(tiers, LATE_S)
    assert tiers.lies("host", chain(2)) == [False, False]
    tiers.close()


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("inf"), float("nan")])
def test_time_that_is_none_is_refused(backend: Backend, ttl_s: float) -> None:
    with pytest.raises(ConfigError, match="ttl of tier 'host' is"):
        SteppedTiers(backend, {"host": 4}, ttls_s={Tier.HOST: ttl_s})


@pytest.mark.parametrize("late_s", [50 * 86400.0, 4e8])
def test_blocks_leave_in_their_time_however_long_the_manager_lives(backend: Backend, late_s: float) -> None:
    tiers = make(backend, "host")
    tiers.put("host", chain(3)[2:])
    held = tiers.pools["host"].match_sequence_hashes(chain(3)[2:])
    tiers.clock.advance(late_s * TTL_S)  # ticks are a part of the limit
    tiers.settle()
    tiers.put("host", chain(2))
    pass_time(tiers, TTL_S * 0.9)
    assert tiers.lies("host", chain(3)) == [True] * 3
    held.release()
    pass_time(tiers, TTL_S * 0.1 + LATE_S)
    assert tiers.lies("host", chain(3)) == [False, False, True]
    tiers.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "match", "touch", "hold", "drop", "pass"]), st.integers(0, 7), st.integers(1, 90)
    ),
    max_size=30,
)


def test_blocks_are_there_as_long_as_a_dict_of_last_uses_says(backend: Backend) -> None:
    @settings(max_examples=100, deadline=None)
    @given(STEPS)
    def run(steps: list[tuple[str, int, int]]) -> None:
        tiers = make(backend, "host", num_blocks=32)
        pool = tiers.pools["host"]
        used_at: dict[int, float] = {}
        held: dict[int, list[object]] = {}
        for step, number, seconds in steps:
            name = chain(8)[number : number + 1]
            is_there = tiers.lies("host", name)[0]
            if step == "pass":
                pass_time(tiers, seconds * STEP_S)
            elif step == "put":
                tiers.put("host", name)
                used_at[number] = tiers.clock()
            elif step == "hold" and is_there:
                held.setdefault(number, []).append(pool.match_sequence_hashes(name))
            elif step == "drop" and held.get(number):
                held[number].pop().release()  # type: ignore[attr-defined]
                used_at[number] = tiers.clock()
            elif step in ("match", "touch") and is_there:
                pool.match_sequence_hashes(name).release() if step == "match" else pool.touch_blocks(name)
                used_at[number] = tiers.clock()
            for other, moment in used_at.items():
                age_s = tiers.clock() - moment
                found = tiers.lies("host", chain(8)[other : other + 1])[0]
                if held.get(other) or age_s <= TTL_S:
                    assert found, f"block {other} left after {age_s} s"
                elif age_s > TTL_S + LATE_S:
                    assert not found, f"block {other} is there after {age_s} s"
            pool.check()
        for guards in held.values():
            for guard in guards:
                guard.release()  # type: ignore[attr-defined]
        tiers.close()

    run()


def test_manager_reads_times_from_its_configuration_and_forgets_by_itself(
    make_tiers: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make_tiers(host=8, settings={"host": {"ttl": "0.02s"}})
    assert tiers.manager.config.host.ttl_s == 0.02
    pool, has_left = tiers.manager.top, threading.Event()
    reset_blocks = pool.reset_blocks

    def see(hashes: HashArray) -> ResetBlocksResponse:
        response = reset_blocks(hashes)
        if pool.status().free == 8:
            has_left.set()
        return response

    monkeypatch.setattr(pool, "reset_blocks", see)
    tiers.put(names(8))
    assert has_left.wait(PATIENCE_S)
