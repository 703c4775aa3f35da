"""What is worth loading, when a load is given up, and which tier is left alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
from books_site import BLOCK_NBYTES, BLOCK_TOKENS, DIGESTS, NUM_BLOCKS, NUM_TOKENS, BooksSite

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.judge import LoadJudge
from kvbm.engines.requests import Request
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.speed import PrefillSpeed, TierGuard
from kvbm.engines.step_channel import StepChannels
from kvbm.jobs import CopyJob
from kvbm.jobs.messages import decode_job
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedClock
from kvbm.types import Tier

# -- speed and guard ------------------------------------------------------------------------------------------------


def test_speed_is_learnt_from_prompts_and_steps_from_all() -> None:
    speed = PrefillSpeed()
    assert speed.seconds(1000) is None
    speed.observe(0, 0.02)
    assert (speed.tokens_per_s, speed.step_s) == (None, 0.02)
    speed.observe(1000, 0.0)
    assert speed.seconds(1000) is None, "a step without time says nothing"
    speed.observe(1000, 0.1)
    assert speed.seconds(1000) == pytest.approx(0.1)
    assert speed.step_s == pytest.approx(0.8 * 0.02 + 0.2 * 0.1)


def test_short_prompts_show_the_least_speed_until_a_long_one_shows_it_all() -> None:
    speed = PrefillSpeed()
    for num_tokens, seconds in ((20, 0.02), (31, 0.01), (1, 0.01)):
        speed.observe(num_tokens, seconds)
    assert speed.tokens_per_s == pytest.approx(3100)
    speed.observe(1000, 0.1)
    assert speed.tokens_per_s == pytest.approx(10_000)
    speed.observe(31, 0.001)
    assert speed.tokens_per_s == pytest.approx(10_000)


def test_guard_leaves_a_tier_alone_for_longer_and_longer_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = SteppedClock()
    guard = TierGuard(clock)
    for rest_s in (10.0, 20.0, 40.0):
        for _ in range(3):
            assert guard.is_open(Tier.DISK)
            guard.observe(Tier.DISK, 2.0, 1.0)
        assert not guard.is_open(Tier.DISK)
        assert guard.is_open(Tier.HOST)
        clock.advance(rest_s - 1)
        assert not guard.is_open(Tier.DISK)
        clock.advance(1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO, logging.INFO]
    guard.observe(Tier.DISK, 0.5, 1.0)
    for _ in range(3):
        guard.observe(Tier.DISK, 2.0, 1.0)
    clock.advance(10)
    assert guard.is_open(Tier.DISK), "a good load in between: it begins anew"


# -- the judge ------------------------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Steps of an engine, some of them in flight."""

    clock: SteppedClock = field(default_factory=SteppedClock)
    loads_always: bool = False

    def __post_init__(self) -> None:
        self.judge = LoadJudge(top=Tier.HOST, timeout_s=10.0, loads_always=self.loads_always, clock=self.clock)
        self.judge.speed.tokens_per_s = 1000.0

    def load(self, lowest: Tier) -> Request:
        request = Request("a", Digests(), [0], num_loading=1000, lowest=lowest, began_at=self.clock())
        self.judge.begin(request)
        return request

    def begin(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.judge.begin_step()

    def end(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.judge.end_step()

    def is_open(self, tier: Tier) -> bool:
        return self.judge.guard.is_open(tier)


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(10, 0.25), (1000, 1.0), (9000, 9.0), (90_000, 10.0)],
    ids=["few", "some", "more", "all"],
)
def test_a_load_is_given_up_after_the_time_of_computing_it(num_tokens: int, seconds: float) -> None:
    assert Engine().judge.timeout_of(num_tokens) == seconds
    assert Engine(loads_always=True).judge.timeout_of(num_tokens) == 10.0


@pytest.mark.parametrize("num_under_way", [0, 1], ids=["one step", "two in flight"])
@pytest.mark.parametrize(("tier", "num_steps"), [(Tier.HOST, 1), (Tier.DISK, 2)])
def test_a_load_that_comes_with_the_first_report_is_as_fast_as_any(
    tier: Tier, num_steps: int, num_under_way: int
) -> None:
    engine = Engine()
    for num_late in (0, 1):
        for _ in range(3):
            engine.begin(num_under_way)
            request = engine.load(tier)
            engine.begin()
            num_ends = num_under_way + 1 + (num_steps - 1) * (1 + num_under_way) + num_late
            for _ in range(num_ends):  # each as long as all of the prompt would take, and somewhat longer
                engine.end(1.1)
                engine.begin()
            engine.judge.end(request)
            while engine.judge._num_ended < engine.judge._num_begun:
                engine.judge.end_step()
        assert engine.is_open(tier) == (not num_late)


# -- what is worth it -----------------------------------------------------------------------------------------------


@pytest.fixture
def disk(backend: Backend) -> BooksSite:
    return BooksSite(backend)


@pytest.fixture
def host(backend: Backend) -> BooksSite:
    return BooksSite(backend, tier=Tier.HOST)


def test_a_tier_that_was_slow_once_is_measured_anew_and_used_again(disk: BooksSite) -> None:
    assert disk.ask("a") == NUM_BLOCKS
    disk.serve("a")
    disk.believe(Tier.DISK, Tier.HOST, 20e6)
    assert disk.ask("b") == 0
    assert not disk.serve("b"), "it was measured just now"
    disk.clock.advance(60.0)
    assert disk.ask("c") == 0
    assert disk.ask("c") == 0, "asking changes nothing"
    assert not disk.core.orders().jobs[0]
    (probe,) = disk.serve("c")
    assert (probe.source, probe.destination) == (Tier.DISK, Tier.HOST)
    assert 0 < len(probe.hashes) <= 4, "a few blocks tell enough"
    assert disk.ask("d") == 0
    assert not disk.serve("d"), "one question at a time"
    for _ in range(3):
        disk.answer([probe], 2e9)
        disk.clock.advance(60.0)
        if disk.ask("e") == NUM_BLOCKS:
            break
        (probe,) = disk.serve("e")
    assert disk.ask("f") == NUM_BLOCKS


def test_copies_to_the_engine_that_were_slow_once_are_tried_again(host: BooksSite) -> None:
    host.believe(Tier.HOST, Tier.DEVICE, 20e6)
    assert host.ask("a") == 0
    assert not host.serve("a"), "nothing can be fetched from there"
    host.clock.advance(61.0)
    assert host.ask("b") == NUM_BLOCKS


def test_a_load_has_to_save_more_than_the_step_that_it_waits_for(host: BooksSite) -> None:
    host.core.speed.step_s = 0.02
    assert host.ask("alone", 4) == 4, "nothing else runs: its step is short"
    host.core.finished("alone")
    host.core.computed("other", [], [[]], num_tokens=1)
    assert host.ask("short", 4) == 0, "computing takes 13 ms"
    assert host.ask("long", 40) == 40
    host.core.finished("other")
    assert host.ask("alone again", 4) == 4


def test_other_requests_steps_do_not_count_where_loads_come_within_the_step(host: BooksSite) -> None:
    core = SchedulerCore(host.core._groups, block_tokens=BLOCK_TOKENS, clock=host.clock, loads_in_step=True)
    core.speed.tokens_per_s, core.speed.step_s = 5000.0, 0.02
    host.core = core
    core.computed("other", [], [[]], num_tokens=1)
    assert host.ask("short", 4) == 4


def test_requests_that_share_a_prefix_wait_for_it_no_longer_than_computing_takes(disk: BooksSite) -> None:
    for name in "ab":
        num_tokens = disk.ask(name) * BLOCK_TOKENS
        slots = [list(range(NUM_BLOCKS))]
        disk.core.allocated(name, slots, num_computed_tokens=0, num_external_tokens=num_tokens)
    (hanging,) = [decode_job(data) for data in disk.core.orders().jobs[0]]
    assert isinstance(hanging, CopyJob)
    assert len(hanging.hashes) == NUM_BLOCKS, "loaded once for both"
    disk.clock.advance(0.24)
    assert not disk.core.orders().loads
    assert disk.ask("c") == 0, "behind them it would wait longer than computing takes"
    disk.clock.advance(0.02)
    loads = disk.core.orders().loads
    assert {load.request_id: len(load.lost_slots) for load in loads} == {"a": NUM_BLOCKS, "b": NUM_BLOCKS}


# -- hybrid models --------------------------------------------------------------------------------------------------


class TwoGroups:
    """A scheduler's half over two groups of layers, a prompt of which lies in another tier for each."""

    def __init__(self, backend: Backend, *lying: Tier) -> None:
        self.clock = SteppedClock()
        self.groups, self.pools = [], []
        for window_blocks, tier in zip((0, 4), lying, strict=True):
            channels = StepChannels(1, clock=self.clock)
            pools = [BlockPool(NUM_BLOCKS, name=one.value, tier=one, backend=backend) for one in (Tier.HOST, Tier.DISK)]
            planner = Planner(pools, channels.channels, foreign_tier=Tier.DEVICE, clock=self.clock)
            self.groups.append(Group(planner, channels, block_nbytes=BLOCK_NBYTES, window_blocks=window_blocks))
            pool = next(pool for pool in pools if pool.tier is tier)
            pool.register_blocks(pool.allocate_blocks(NUM_BLOCKS).complete(Digests().extend(DIGESTS))).release()
        self.core = SchedulerCore(self.groups, block_tokens=BLOCK_TOKENS, clock=self.clock)

    def load(self, request_id: str) -> Request:
        """Begin to load the prompt."""
        num_tokens, _ = self.core.matched_tokens(request_id, DIGESTS, num_tokens=NUM_TOKENS, num_computed_tokens=0)
        slots = [list(range(NUM_BLOCKS))] * 2
        self.core.allocated(request_id, slots, num_computed_tokens=0, num_external_tokens=num_tokens or 0)
        return self.core._requests[request_id]


@pytest.mark.parametrize(
    ("full", "window"), [(Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DISK), (Tier.HOST, Tier.HOST)], ids=str
)
def test_a_load_is_judged_by_the_lowest_tier_of_any_group(backend: Backend, full: Tier, window: Tier) -> None:
    expected = Tier.DISK if Tier.DISK in (full, window) else Tier.HOST
    assert TwoGroups(backend, full, window).load("a").lowest is expected


def test_a_load_of_which_nothing_is_left_is_not_judged_by_the_one_before(disk: BooksSite) -> None:
    slots = [list(range(NUM_BLOCKS))]
    num_tokens = disk.ask("a") * BLOCK_TOKENS
    disk.core.allocated("a", slots, num_computed_tokens=0, num_external_tokens=num_tokens)
    request = disk.core._requests["a"]
    assert request.lowest is Tier.DISK
    for _ in range(3):
        disk.answer([decode_job(data) for data in disk.core.orders().jobs[0]], 1e9)
    disk.core.received(["a"])
    disk.core.preempted("a")
    for pool in disk.planner.pools:
        pool.reset_blocks(request.digests.names)
    disk.core.allocated("a", slots, num_computed_tokens=0, num_external_tokens=num_tokens)
    assert request.lowest is None
