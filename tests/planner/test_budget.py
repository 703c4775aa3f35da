"""The write budget: what it lets through over time, what it sheds, and how a manager counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.planner.policies import (
    AlwaysPolicy,
    Candidates,
    OffloadPolicy,
    PriorityPolicy,
    SecondUsePolicy,
    TinyLfuPolicy,
    WriteBudget,
)
from kvbm.planner.policies.budget import DAY_S, TokenBucket
from kvbm.testing.offload_policies import OffloadPolicyTests, candidates
from kvbm.types import Tier

SLOT_NBYTES = 4096


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestWriteBudget(OffloadPolicyTests):
    def make_policy(self) -> OffloadPolicy:
        return WriteBudget(SecondUsePolicy(), 4096, nbytes_per_day=1 << 20)


def test_bucket_is_full_at_first_and_fills_at_its_rate(clock: Clock) -> None:
    bucket = TokenBucket(10, per_s=2, clock=clock)
    assert bucket.take(7) == 7
    assert bucket.take(7) == 3
    assert bucket.take(7) == 0
    clock.now += 1.75
    assert bucket.take(7) == 3
    clock.now += 0.25
    assert bucket.take(7) == 1, "half a token was kept"


def test_bucket_never_holds_more_than_its_capacity(clock: Clock) -> None:
    bucket = TokenBucket(10, per_s=2, clock=clock)
    clock.now += 1e9
    assert bucket.take(100) == 10


def test_bucket_survives_a_clock_that_goes_back(clock: Clock) -> None:
    bucket = TokenBucket(10, per_s=1, clock=clock)
    assert bucket.take(10) == 10
    clock.now -= 500
    assert bucket.take(1) == 0
    clock.now += 3
    assert bucket.take(10) == 3


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0, 7200), st.integers(0, 50)), max_size=60),
    unit=st.integers(1, 10_000),
    per_day=st.integers(1, 10**9),
)
def test_over_any_time_no_more_is_written_than_the_rate_and_one_burst(
    steps: list[tuple[float, int]], unit: int, per_day: int
) -> None:
    clock = Clock()
    budget = WriteBudget(AlwaysPolicy(), unit, nbytes_per_day=per_day, clock=clock)
    burst = max(per_day / 24, unit)
    taken: list[tuple[float, int]] = []
    for pause, n in steps:
        clock.now += pause
        taken.append((clock.now, budget.afford(n) * unit))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            nbytes = sum(n for _, n in taken[first : last + 1])
            allowed = burst + (taken[last][0] - taken[first][0]) * per_day / DAY_S
            assert nbytes <= allowed * (1 + 1e-9) + 1e-6


def test_budget_of_a_day_is_spent_in_a_day(clock: Clock) -> None:
    """A tier that always has something to write gets what was promised, not less."""
    budget = WriteBudget(AlwaysPolicy(), 1 << 20, nbytes_per_day=240 << 20, clock=clock)
    assert budget.afford(1000) == 10, "an hour's share at once"
    num_blocks = 0
    for _ in range(24 * 60):
        clock.now += 60
        num_blocks += budget.afford(1000)
    assert num_blocks == 240


def test_block_that_is_larger_than_an_hours_share_still_goes(clock: Clock) -> None:
    budget = WriteBudget(AlwaysPolicy(), 1 << 20, nbytes_per_day=2 << 20, clock=clock)
    assert budget.afford(3) == 1
    assert budget.afford(3) == 0
    clock.now += DAY_S / 2
    assert budget.afford(3) == 1


def test_burst_can_be_given(clock: Clock) -> None:
    budget = WriteBudget(AlwaysPolicy(), 100, nbytes_per_day=1000, burst_nbytes=550, clock=clock)
    assert (budget.afford(9), budget.afford(9)) == (5, 0)


def test_budget_leaves_the_choice_to_its_policy() -> None:
    budget = WriteBudget(PriorityPolicy(60), 100, nbytes_per_day=1000)
    blocks = candidates([1, 2, 3], [50, 60, 70])
    assert budget.registered(blocks).tolist() == [False, True, True]
    assert budget.prioritised(blocks).tolist() == [False, True, True]
    assert budget.used(blocks).tolist() == [False, False, False]


@pytest.mark.parametrize("policy", [AlwaysPolicy(), PriorityPolicy(), SecondUsePolicy(), TinyLfuPolicy(8)])
def test_budget_counts_uses_where_its_policy_does(policy: OffloadPolicy) -> None:
    assert WriteBudget(policy, 100, nbytes_per_day=1000).counts_uses is policy.counts_uses
    assert policy.counts_uses is (type(policy) in (SecondUsePolicy, TinyLfuPolicy))


def test_budgets_within_one_another_take_the_smaller(clock: Clock) -> None:
    inner = WriteBudget(AlwaysPolicy(), 100, nbytes_per_day=7200, clock=clock)
    assert WriteBudget(inner, 100, nbytes_per_day=72000, clock=clock).afford(9) == 3


@pytest.mark.parametrize(
    ("nbytes", "settings_", "message"),
    [
        (0, {"nbytes_per_day": 1}, "nbytes_per_block is 0, give 1 or more bytes"),
        (1, {"nbytes_per_day": 0}, "nbytes_per_day is 0, give 1 or more bytes, or leave the budget out"),
        (9, {"nbytes_per_day": 1, "burst_nbytes": 8}, "burst_nbytes is 8 and a block takes 9"),
    ],
)
def test_impossible_budgets_are_refused(nbytes: int, settings_: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WriteBudget(AlwaysPolicy(), nbytes, **settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize(("capacity", "per_s"), [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_impossible_buckets_are_refused(capacity: float, per_s: float) -> None:
    with pytest.raises(ConfigError, match="give more than 0"):
        TokenBucket(capacity, per_s=per_s)


# -- a manager with a budget -----------------------------------------------------------------------------------


def make_manager(backend: Backend, path: Path, *, given: OffloadPolicy | None = None, **sections: Any) -> BlockManager:
    """Make a manager whose blocks take a slot of 4 KiB each on disk."""
    tree = {
        "model": {"num_layers": 1, "inner_dim": 8, "block_size": 4, "fingerprint": "tests"},
        "device": {"num_blocks": 32},
        "disk": {"num_blocks": 64, "path": str(path / "disk"), **sections.pop("disk", {})},
        **sections,
    }
    return BlockManager(Config.from_dict(tree), backend=backend, offload_policy=given)


def register(manager: BlockManager, first: int, n: int) -> None:
    names = candidates(range(first, first + n)).hashes
    manager.register_blocks(manager.allocate_blocks(n).complete(names)).release()
    manager.flush(60)


def on_disk(manager: BlockManager, first: int, n: int) -> list[bool]:
    pool = manager.disk
    assert pool is not None
    return (pool.lookup(candidates(range(first, first + n)).hashes) >= 0).tolist()


def test_manager_sheds_and_counts_what_its_disk_budget_has_no_room_for(backend: Backend, tmp_path: Path) -> None:
    with make_manager(backend, tmp_path, disk={"write_budget": 24 * 6 * SLOT_NBYTES}) as manager:
        register(manager, 0, 4)
        register(manager, 4, 8)
        assert on_disk(manager, 0, 12) == [True] * 6 + [False] * 6, "the leading ones, without which none is found"
        route = manager.statistics().routes[Tier.DEVICE, Tier.DISK]
        assert (route.blocks, dict(route.dropped), route.queued, route.in_flight) == (6, {"write_budget": 6}, 0, 0)
        register(manager, 20, 3)
        assert manager.statistics().routes[Tier.DEVICE, Tier.DISK].dropped == {"write_budget": 9}
        manager.check()


def test_what_lies_below_already_takes_nothing_of_the_budget(backend: Backend, tmp_path: Path) -> None:
    with make_manager(backend, tmp_path, disk={"write_budget": 24 * 6 * SLOT_NBYTES}) as manager:
        for _ in range(5):
            register(manager, 0, 4)
            manager.reset_pool("device")
        register(manager, 4, 2)
        route = manager.statistics().routes[Tier.DEVICE, Tier.DISK]
        assert (route.blocks, dict(route.dropped)) == (6, {})
        assert on_disk(manager, 0, 6) == [True] * 6


def test_budget_that_fails_drops_that_batch_and_the_manager_lives(backend: Backend, tmp_path: Path) -> None:
    class Broke(AlwaysPolicy):
        answers: list[Any] = [ZeroDivisionError("broke"), -5, 10**6]  # noqa: RUF012

        def afford(self, num_blocks: int) -> int:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

    with make_manager(backend, tmp_path, given=Broke()) as manager:
        for first in (0, 4, 8):
            register(manager, first, 4)
        assert on_disk(manager, 0, 12) == [False] * 8 + [True] * 4
        dropped = manager.statistics().routes[Tier.DEVICE, Tier.DISK].dropped
        assert dropped == {"policy_failed": 4, "write_budget": 4}


def test_policy_given_by_hand_keeps_the_budget_of_the_tier(backend: Backend, tmp_path: Path) -> None:
    class Odd(OffloadPolicy):
        def registered(self, blocks: Candidates) -> Any:
            return np.arange(len(blocks)) % 2 == 1

    with make_manager(backend, tmp_path, given=Odd(), disk={"write_budget": 24 * 3 * SLOT_NBYTES}) as manager:
        register(manager, 0, 12)
        assert on_disk(manager, 0, 12) == [False, True] * 3 + [False] * 6


# -- a policy for each edge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "host", "disk"),
    [
        ({}, True, True),
        ({"offload": {"policy": "second_use"}}, False, False),
        ({"disk": {"offload_policy": "tinylfu"}}, True, False),
        ({"disk": {"offload_policy": "second_use"}}, True, False),
        ({"host": {"offload_policy": "priority"}}, False, False),
        ({"offload": {"policy": "priority"}, "host": {"offload_policy": "always"}}, True, False),
        (
            {
                "offload": {"policy": "priority"},
                "host": {"offload_policy": "always"},
                "disk": {"offload_policy": "always"},
            },
            True,
            True,
        ),
    ],
)
def test_each_edge_has_the_policy_of_the_tier_it_leads_to(
    sections: dict[str, Any], host: bool, disk: bool, backend: Backend, tmp_path: Path
) -> None:
    sections = {**sections, "host": {"num_blocks": 48, **sections.get("host", {})}}
    with make_manager(backend, tmp_path, **sections) as manager:
        register(manager, 0, 4)
        assert manager.host is not None
        assert (manager.host.lookup(candidates(range(4)).hashes) >= 0).tolist() == [host] * 4
        assert on_disk(manager, 0, 4) == [disk] * 4


def test_tinylfu_of_an_edge_has_the_size_of_the_tier_below(backend: Backend, tmp_path: Path) -> None:
    with make_manager(backend, tmp_path, disk={"offload_policy": "tinylfu"}) as manager:
        (route,) = manager._planner._routes
        policy = route._policy
        assert isinstance(policy, TinyLfuPolicy)
        assert policy._below.nbytes == 64 * 24


def test_budget_reads_sizes_as_text_and_names_the_key_when_it_is_none() -> None:
    tree = {"model": {"num_layers": 1, "inner_dim": 8}}
    assert Config.from_dict({**tree, "disk": {"write_budget": "2TiB"}}).disk.write_budget_nbytes == 2 << 40
    assert Config.from_dict(tree).disk.write_budget_nbytes == 0
    with pytest.raises(ConfigError, match=r"disk\.write_budget is '2 rooms', give bytes, or a size"):
        Config.from_dict({**tree, "disk": {"write_budget": "2 rooms"}})
    with pytest.raises(ConfigError, match=r"disk\.offload_policy is 'tinylfo', did you mean tinylfu\?"):
        Config.from_dict({**tree, "disk": {"offload_policy": "tinylfo"}})
