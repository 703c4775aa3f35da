"""Load or compute again: the cut with the least predicted time, and no verdict that lasts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_tiers import BLOCK_NBYTES, SteppedTiers, chain
from tier_site import PATIENCE_S, Site, names

from kvbm._backend import Backend, load_backend
from kvbm.errors import BlockStateError, ConfigError, PoolClosed
from kvbm.planner import Advice, Limits
from kvbm.planner.estimates import _Route
from kvbm.testing.faults import FaultMode, FaultPlan
from kvbm.types import HashArray, Tier

SIZES = {"device": 32, "host": 32, "disk": 64}
BLOCK_TOKENS = 16
FAST_TOKENS_PER_S = 16_000.0  # a block a millisecond


def make(backend: Backend, **limits: Any) -> SteppedTiers:
    return SteppedTiers(backend, SIZES, limits=Limits(job_blocks=4, **limits))


def advise(tiers: SteppedTiers, hashes: HashArray, tokens_per_s: float = FAST_TOKENS_PER_S) -> Advice:
    with tiers.planner.match(hashes) as hit:
        return tiers.planner.advisor.advise(hit, tokens_per_s, block_tokens=BLOCK_TOKENS, block_nbytes=BLOCK_NBYTES)


def load(tiers: SteppedTiers, hashes: HashArray) -> None:
    """Onboard blocks, so that their route is measured, and forget them above."""
    transfer = tiers.planner.onboard(tiers.planner.match(hashes))
    tiers.settle()
    transfer.result(0).release()
    for name in ("device", "host"):
        tiers.pools[name].reset_blocks(hashes)


def serve(tiers: SteppedTiers, hashes: HashArray) -> float:
    """Follow the advice as an engine does, and give the seconds that it took."""
    advice = advise(tiers, hashes)
    began = tiers.clock()
    hit = tiers.planner.match(hashes)
    hit.truncate(advice.num_blocks)
    transfer = tiers.planner.onboard(hit)
    for job in list(tiers.channel.waiting):
        if getattr(job, "is_urgent", False):  # what nobody waits for takes no time of this request
            tiers.channel.step(tiers.channel.waiting.index(job))
    transfer.result(0).release()
    seconds = tiers.clock() - began + (len(hashes) - advice.num_blocks) * BLOCK_TOKENS / FAST_TOKENS_PER_S
    tiers.settle()
    for name in ("device", "host"):
        tiers.pools[name].reset_blocks(hashes)
    return seconds


def test_everything_in_the_top_tier_is_taken_and_costs_nothing(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("device", chain(5))
    advice = advise(tiers, chain(5))
    assert (advice.num_blocks, advice.hit_blocks, advice.load_s, advice.total_s) == (5, 5, 0.0, 0.0)
    assert advice.recompute_s == pytest.approx(0.005)
    assert [(run.tier, run.num_blocks) for run in advice.runs] == [(Tier.DEVICE, 5)]
    assert advice.reason == "all in the top tier"
    tiers.close()


def test_miss_is_no_load(backend: Backend) -> None:
    tiers = make(backend)
    advice = advise(tiers, chain(5))
    assert (advice.num_blocks, advice.hit_blocks, advice.runs, advice.total_s) == (0, 0, (), 0.0)
    tiers.close()


def test_before_measurements_the_default_is_used_and_said(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(4))
    advice = advise(tiers, chain(4), 1000.0)
    assert advice.num_blocks == 4
    assert advice.load_s == pytest.approx(5e-4 + 4 * BLOCK_NBYTES / 1e9)
    assert "disk 0.5 ms + 1000 MB/s by default, not measured yet" in advice.reason
    load(tiers, chain(4))
    assert "from 1 jobs" in advise(tiers, chain(4), 1000.0).reason
    tiers.close()


def test_runs_name_each_tier_in_order_and_their_times_add_up(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("device", chain(2))
    tiers.put("host", chain(4)[2:])
    tiers.put("disk", chain(6)[4:])
    tiers.put("host", chain(7)[6:])
    advice = advise(tiers, chain(9), 10.0)
    assert [(run.tier.value, run.num_blocks) for run in advice.runs] == [
        ("device", 2), ("host", 2), ("disk", 2), ("host", 1)
    ]  # fmt: skip
    assert advice.num_blocks == 7
    assert advice.load_s == pytest.approx(sum(run.load_s for run in advice.runs))
    text = str(advice)
    assert "\n" not in text
    assert text.startswith("load=7/7 runs=[2 device 0 ms, 2 host")
    tiers.close()


def test_slow_tier_is_left_and_the_fast_one_before_it_is_loaded(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("host", chain(4))
    tiers.put("disk", chain(8))
    tiers.seconds = lambda source, num_blocks: (0.1 if source == "disk" else 1e-5) * num_blocks
    for _ in range(3):
        load(tiers, chain(8)[4:])
        tiers.put("host", chain(4))
    advice = advise(tiers, chain(8))
    assert advice.num_blocks == 4
    assert [run.tier.value for run in advice.runs] == ["host"]
    assert advice.total_s == pytest.approx(0.004, rel=0.5), "four blocks computed"
    assert "computing is sooner behind the cut" in advice.reason
    tiers.settle()
    tiers.close()


def test_block_in_the_top_tier_behind_slow_ones_is_worth_a_load_when_that_pays(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(1))
    tiers.put("device", chain(8)[1:])
    tiers.seconds = lambda source, num_blocks: 0.004  # four blocks' time
    load(tiers, chain(1))
    tiers.put("device", chain(8)[1:])
    assert advise(tiers, chain(1)).num_blocks == 0
    assert advise(tiers, chain(8)).num_blocks == 8, "eight milliseconds saved for four"
    tiers.settle()
    tiers.close()


def test_queue_ahead_counts_and_a_hanging_tier_is_left(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(16))
    tiers.seconds = lambda source, num_blocks: 1e-4 * num_blocks
    for _ in range(4):
        load(tiers, chain(16)[:8])
    assert advise(tiers, chain(16)[8:]).num_blocks == 8
    first = tiers.planner.onboard(tiers.planner.match(chain(16)[:8]))
    busy = advise(tiers, chain(16)[8:])
    assert busy.queue_s == pytest.approx(8e-4, rel=0.3)
    assert busy.num_blocks == 8
    tiers.clock.advance(1.0)  # it hangs
    hung = advise(tiers, chain(16)[8:])
    assert hung.num_blocks == 0
    tiers.settle()
    first.result(0).release()
    tiers.close()


# -- never slower ----------------------------------------------------------------------------------------------------


def test_never_slower_than_computing_once_a_slow_tier_is_known_and_back_when_it_is_fast_again(
    backend: Backend,
) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(8))
    compute_s = 8 * BLOCK_TOKENS / FAST_TOKENS_PER_S
    tiers.seconds = lambda source, num_blocks: 2e-4 * num_blocks
    for _ in range(5):
        assert serve(tiers, chain(8)) <= compute_s
    assert advise(tiers, chain(8)).num_blocks == 8
    tiers.seconds = lambda source, num_blocks: 0.5 * num_blocks
    slow = [serve(tiers, chain(8)) for _ in range(60)]
    assert sum(seconds > 1.01 * compute_s for seconds in slow) <= 3, "the first ones, from which it learns"
    assert all(seconds <= 1.01 * compute_s for seconds in slow[4:])
    assert advise(tiers, chain(8)).num_blocks == 0
    num_probes = len([job for job in tiers.copies("disk-host") if not job.is_urgent])
    assert 1 <= num_probes <= 60, "it is measured again in the background"
    tiers.seconds = lambda source, num_blocks: 2e-4 * num_blocks
    again = [serve(tiers, chain(8)) for _ in range(200)]
    assert all(seconds <= 1.01 * compute_s for seconds in again)
    assert again[-1] < 0.5 * compute_s, "no tier is banned for good"
    tiers.close()


def test_probes_are_few_small_and_one_at_a_time(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(8))
    tiers.seconds = lambda source, num_blocks: 1.0 * num_blocks
    for _ in range(4):
        load(tiers, chain(8))
    tiers.jobs.clear()
    for _ in range(15):
        assert advise(tiers, chain(8)).num_blocks == 0
    assert not tiers.channel.waiting, "fifteen plans in no time"
    advise(tiers, chain(8))
    assert [(len(job.hashes), job.is_urgent) for job in tiers.channel.waiting] == [(4, False)]  # type: ignore[union-attr]
    tiers.put("disk", chain(8, family=2))
    for _ in range(100):
        advise(tiers, chain(8, family=2))
    assert len(tiers.channel.waiting) == 1, "the probe has not ended"
    tiers.settle()
    tiers.close()


def test_tier_that_was_not_measured_for_long_is_probed_at_the_next_plan(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("disk", chain(8))
    tiers.seconds = lambda source, num_blocks: 1.0 * num_blocks if source == "disk" else 0.0
    for _ in range(4):
        load(tiers, chain(8))
    tiers.clock.advance(9.0)
    advise(tiers, chain(8))
    assert not tiers.channel.waiting
    tiers.clock.advance(1.5)
    advise(tiers, chain(8))
    assert len(tiers.channel.waiting) == 1
    tiers.settle()
    tiers.close()


def test_host_tier_that_is_left_is_probed_into_the_top_tier(backend: Backend) -> None:
    tiers = make(backend)
    tiers.put("host", chain(8))
    tiers.settle()
    tiers.seconds = lambda source, num_blocks: 1.0 * num_blocks
    for _ in range(4):
        transfer = tiers.planner.onboard(tiers.planner.match(chain(8)))
        tiers.settle()
        transfer.result(0).release()
        tiers.pools["device"].reset_blocks(chain(8))
    tiers.clock.advance(11.0)
    assert advise(tiers, chain(8)).num_blocks == 0
    assert [(job.source.value, job.is_urgent) for job in tiers.channel.waiting] == [("host", False)]  # type: ignore[union-attr]
    tiers.settle()
    assert tiers.lies("device", chain(8)) == [True] * 4 + [False] * 4
    tiers.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["device", "host", "disk"]), min_size=1, max_size=24),
    st.floats(1e-6, 1.0),
    st.floats(1e-6, 1.0),
    st.floats(10.0, 1e6),
)
def test_advice_is_the_best_of_all_cuts_and_never_worse_than_computing(
    where: list[str], host_s: float, disk_s: float, tokens_per_s: float
) -> None:
    tiers = SteppedTiers(load_backend("pure"), SIZES, limits=Limits(job_blocks=4))
    hashes = chain(len(where))
    for i, name in enumerate(where):
        tiers.put(name, hashes[i : i + 1])
    for tier, seconds in ((Tier.HOST, host_s), (Tier.DISK, disk_s)):
        route = tiers.planner.estimates._routes[tier, Tier.DEVICE] = _Route(tier)
        route.observe(BLOCK_NBYTES, seconds, 0.0)
    advice = advise(tiers, hashes, tokens_per_s)

    def total_s(cut: int) -> float:
        seconds = (len(where) - cut) * BLOCK_TOKENS / tokens_per_s
        for tier in (Tier.HOST, Tier.DISK):
            num_blocks = where[:cut].count(tier.value)
            num_jobs = math.ceil(num_blocks / 4)
            seconds += tiers.planner.estimates.route(tier, Tier.DEVICE).seconds(num_blocks * BLOCK_NBYTES, num_jobs)
        return seconds

    best = min(total_s(cut) for cut in range(len(where) + 1))
    assert advice.total_s == pytest.approx(best)
    assert total_s(advice.num_blocks) == pytest.approx(best)
    assert advice.total_s <= advice.recompute_s * (1 + 1e-9)
    tiers.settle()
    tiers.close()


# -- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_rate_that_is_none_is_refused(backend: Backend, rate: float) -> None:
    tiers = make(backend)
    with pytest.raises(ConfigError, match=f"prefill_tokens_per_s is {rate}, give a number above 0"):
        advise(tiers, chain(1), rate)
    tiers.close()


def test_hit_stays_as_it_is_and_a_used_one_or_a_closed_manager_is_refused(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16)
    hashes = names(3)
    tiers.put_below(hashes, "host")
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert tiers.manager.plan_onboard(hit, 1.0).num_blocks == 3
    assert len(hit) == 3
    with tiers.manager.onboard(hit).result(PATIENCE_S) as blocks:
        tiers.see_right(blocks, hashes)
    with pytest.raises(BlockStateError, match="used up"):
        tiers.manager.plan_onboard(hit, 1.0)
    hit = tiers.manager.match_sequence_hashes(hashes)
    tiers.manager.close()
    with pytest.raises(PoolClosed):
        tiers.manager.plan_onboard(hit, 1.0)
    hit.release()


def test_truncated_hit_keeps_its_head_and_lets_go_of_its_tail(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16)
    hashes = names(6)
    tiers.put_below(hashes, "host")
    tiers.get(hashes[:2]).release()
    for length in (9, 6, 4, 2, 1, 0, -1):
        hit = tiers.manager.match_sequence_hashes(hashes)
        hit.truncate(length)
        kept = min(max(length, 0), 6)
        assert len(hit) == len(hit.hashes) == sum(hit.tiers.values()) == kept
        assert sum(status.active for status in tiers.manager.status().values()) == kept
        with tiers.manager.onboard(hit).result(PATIENCE_S) as blocks:
            assert len(blocks) == kept
            tiers.see_right(blocks, hashes)
        tiers.manager.reset_blocks("device", hashes[2:])
    with pytest.raises(BlockStateError, match="used up"):
        hit.truncate(1)
    tiers.see_idle()


def test_disk_that_answers_slowly_is_planned_around_while_its_bytes_stay_right(make_tiers: Site) -> None:
    plan = FaultPlan()
    tiers = make_tiers(device=8, disk=16, faults=plan)
    hashes = names(4)
    tiers.put_below(hashes, "disk")
    tiers.num_hit(hashes)
    tiers.manager.reset_blocks("device", hashes)
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert tiers.manager.plan_onboard(hit, 1.0).num_blocks == 4, "sixteen seconds of computing"
    assert tiers.manager.plan_onboard(hit, 1e12).num_blocks == 0, "no time at all"
    hit.release()
    storage: Any = tiers.manager.storage("disk")
    plan._modes = iter([FaultMode.DELAY])
    first = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes[:2]))
    assert storage.wait_until_held(1)
    now = tiers.manager._planner.advisor._clock()
    tiers.manager._planner.advisor._clock = lambda: now + 100.0
    with tiers.manager.match_sequence_hashes(hashes) as other:
        assert tiers.manager.plan_onboard(other, 1.0).num_blocks == 0, "it hangs for a hundred seconds"
    storage.release()
    with first.result(PATIENCE_S) as blocks:
        tiers.see_right(blocks, hashes[:2])
    tiers.settle()
    np.testing.assert_equal(tiers.num_hit(hashes), 4)
    tiers.see_idle()
