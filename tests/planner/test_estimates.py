"""What is believed of a route: learnt from jobs, robust to one outlier, quick to see that everything changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbm.jobs import CopyJob, ForgetJob, JobResult, Outcome
from kvbm.planner.estimates import DEFAULTS, Estimates
from kvbm.planner.ledger import Ledger, OpenJob
from kvbm.types import Tier

NBYTES = 1 << 20
CLOCK: Any = lambda: 7.0  # noqa: E731


def settled(
    num_blocks: int,
    seconds: float,
    *,
    route: tuple[Tier, Tier] = (Tier.DISK, Tier.DEVICE),
    outcomes: list[Outcome] | None = None,
    num_ranks: int = 1,
) -> OpenJob:
    ids = np.arange(num_blocks, dtype=np.int32)
    hashes = np.zeros((num_blocks, 2), dtype=np.uint64)
    job = CopyJob(job_id=1, source=route[0], destination=route[1], source_ids=ids, destination_ids=ids, hashes=hashes)
    ledger = Ledger()
    ledger.open(job, range(num_ranks), lambda entry: (), now=0.0, timeout_s=30.0)
    answers = np.array(outcomes or [Outcome.OK] * num_blocks, dtype=np.uint8)
    nbytes = int((answers == Outcome.OK).sum()) * NBYTES
    entry: OpenJob | None = None
    for rank in range(num_ranks):
        entry = ledger.answer(rank, JobResult(job_id=1, outcomes=answers, nbytes=nbytes, seconds=seconds))
    assert entry is not None
    return entry


def disk(estimates: Estimates) -> Any:
    return estimates.route(Tier.DISK, Tier.DEVICE)


def seconds_of(num_blocks: int, latency_s: float, bytes_per_s: float) -> float:
    return latency_s + num_blocks * NBYTES / bytes_per_s


def test_route_has_the_stated_default_and_says_so_until_it_is_measured() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    for tier in (Tier.HOST, Tier.DISK, Tier.REMOTE):
        found = estimates.route(tier, Tier.DEVICE)
        assert (found.latency_s, found.bytes_per_s) == pytest.approx(DEFAULTS[tier])
        assert (found.is_default, found.num_jobs, found.measured_at) == (True, 0, None)
    assert estimates.routes() == {}
    estimates.observe(settled(4, 0.01))
    assert (disk(estimates).is_default, disk(estimates).num_jobs, disk(estimates).measured_at) == (False, 1, 7.0)
    assert list(estimates.routes()) == [(Tier.DISK, Tier.DEVICE)]


def test_seconds_add_a_latency_for_each_job() -> None:
    found = disk(Estimates(Tier.DEVICE, clock=CLOCK))
    assert found.seconds(2e9, num_jobs=3) == pytest.approx(3 * 5e-4 + 2.0)


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(1e-4, 5e9), (5e-3, 2e8), (0.2, 1e10), (1e-6, 1e7)])
def test_estimate_comes_near_the_truth_from_jobs_of_many_sizes(latency_s: float, bytes_per_s: float) -> None:
    estimates, rng = Estimates(Tier.DEVICE, clock=CLOCK), np.random.default_rng(1)
    for _ in range(200):
        num_blocks = int(rng.integers(1, 65))
        noise = float(rng.uniform(0.9, 1.1))
        estimates.observe(settled(num_blocks, noise * seconds_of(num_blocks, latency_s, bytes_per_s)))
    for num_blocks in (1, 8, 64):
        expected = seconds_of(num_blocks, latency_s, bytes_per_s)
        assert disk(estimates).seconds(num_blocks * NBYTES) == pytest.approx(expected, rel=0.25), num_blocks


def test_first_job_counts_in_full() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    estimates.observe(settled(64, 6.4))
    assert disk(estimates).seconds(64 * NBYTES) == pytest.approx(6.4, rel=0.02)


def test_one_outlier_moves_little_and_two_in_a_row_are_believed() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    for _ in range(20):
        estimates.observe(settled(64, 0.1))
    estimates.observe(settled(64, 100.0))
    assert disk(estimates).seconds(64 * NBYTES) < 0.15
    for _ in range(5):
        estimates.observe(settled(64, 0.1))
    estimates.observe(settled(64, 100.0))
    assert disk(estimates).seconds(64 * NBYTES) < 0.16, "they were not in a row"
    for _ in range(3):
        estimates.observe(settled(64, 100.0))
    assert disk(estimates).seconds(64 * NBYTES) > 30.0


def test_tier_that_is_fast_again_is_believed_after_a_few_small_jobs() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    for _ in range(20):
        estimates.observe(settled(64, 60.0))
    for _ in range(8):
        estimates.observe(settled(4, seconds_of(4, 5e-4, 1e9)))
    assert disk(estimates).seconds(64 * NBYTES) < 2 * seconds_of(64, 5e-4, 1e9)


def test_whatever_comes_up_from_a_tier_is_one_route_and_what_goes_down_another() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    estimates.observe(settled(8, 1.0, route=(Tier.DISK, Tier.HOST)))
    assert disk(estimates).num_jobs == 1
    assert estimates.route(Tier.DISK, Tier.HOST) == disk(estimates)
    estimates.observe(settled(8, 3.0, route=(Tier.HOST, Tier.DISK)))
    assert estimates.route(Tier.HOST, Tier.DISK).seconds(8 * NBYTES) == pytest.approx(3.0, rel=0.1)
    assert disk(estimates).num_jobs == 1
    assert estimates.route(Tier.HOST, Tier.DEVICE).is_default


def test_bytes_are_those_of_one_rank() -> None:
    one, two = Estimates(Tier.DEVICE, clock=CLOCK), Estimates(Tier.DEVICE, clock=CLOCK)
    one.observe(settled(8, 1.0))
    two.observe(settled(8, 1.0, num_ranks=2))
    assert disk(one) == disk(two)


def test_jobs_that_say_nothing_about_time_are_not_counted() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    estimates.observe(settled(4, 0.5, outcomes=[Outcome.FAILED] * 4))
    estimates.observe(settled(4, 0.0, outcomes=[Outcome.LATE] * 4))
    estimates.observe(settled(0, 0.5))
    forget = ForgetJob(job_id=2, tier=Tier.DISK, hashes=np.zeros((1, 2), dtype=np.uint64))
    ledger = Ledger()
    estimates.observe(ledger.open(forget, [0], lambda entry: (), now=0.0, timeout_s=1.0))
    assert disk(estimates).is_default


def test_late_job_counts_where_it_took_longer_than_predicted_and_not_otherwise() -> None:
    estimates = Estimates(Tier.DEVICE, clock=CLOCK)
    estimates.observe(settled(4, 0.01))
    estimates.observe(settled(4, 0.001, outcomes=[Outcome.OK] + [Outcome.LATE] * 3))
    assert disk(estimates).num_jobs == 1, "it had no time to show how fast it is"
    before_s = disk(estimates).seconds(NBYTES)
    estimates.observe(settled(4, 30.0, outcomes=[Outcome.OK] + [Outcome.LATE] * 3))
    assert disk(estimates).num_jobs == 2
    assert disk(estimates).seconds(NBYTES) > 1.2 * before_s
