"""Bounds of the planner and of what it counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvbm.errors import ConfigError
from kvbm.histogram import LONG_BOUNDS_S, SHORT_BOUNDS_S, Histogram
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.planner.limits import Limits
from kvbm.types import Tier

COUNTS = ("queue_blocks", "job_blocks", "lineage_blocks", "touch_calls", "prefetch_blocks")
TIMES = ("onboard_timeout_s", "offload_timeout_s")


def test_limits_have_defaults_and_take_the_smallest_values() -> None:
    assert Limits() == Limits()
    shares = dict.fromkeys(("in_flight_share", "pin_share"), 1e-9)
    least: dict[str, Any] = {**dict.fromkeys(COUNTS, 1), **dict.fromkeys(TIMES, 1e-9), **shares}
    assert Limits(**least).touch_calls == 1
    assert Limits(in_flight_share=1.0).in_flight_share == 1.0


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}, give 1 or more"):
        Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_times_that_are_none_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}, give more than 0 seconds"):
        Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("name", ["in_flight_share", "pin_share"])
def test_shares_outside_a_pool_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}, give a part of a pool"):
        Limits(**{name: value})  # type: ignore[arg-type]


# -- counters --------------------------------------------------------------------------------------------------------


def test_histogram_counts_a_value_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.0, 1.0, 1.0001, 2.0, 5.0, 5.0001, 1e9):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1, 2]
    assert histogram.count == 7
    assert histogram.total == pytest.approx(1_000_000_014.0002)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("5.0", 5.0), ("+Inf", 7.0)]


def test_histogram_without_values_is_empty() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.total, histogram.quantile(0.5)) == (0, 0.0, 0.0)
    assert histogram.cumulative()[-1] == ("+Inf", 0.0)
    assert len(histogram.cumulative()) == len(LONG_BOUNDS_S) + 1


@pytest.mark.parametrize("bounds", [SHORT_BOUNDS_S, LONG_BOUNDS_S])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    assert bounds[0] > 0


@pytest.mark.parametrize(
    ("q", "bound"), [(0.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.51, 2.0), (0.9, 2.0), (0.91, math.inf), (1.0, math.inf)]
)
def test_quantile_is_the_bound_of_its_bucket(q: float, bound: float) -> None:
    histogram = Histogram((0.5, 1.0, 2.0))
    for value in [0.7] * 5 + [1.5] * 4 + [100.0]:
        histogram.observe(value)
    assert histogram.quantile(q) == bound


def test_copy_of_a_histogram_stands_still() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5)
    copy = histogram.copy()
    histogram.observe(3.0)
    assert (copy.counts, copy.total, copy.bounds) == ([1, 0], 0.5, (1.0,))
    copy.observe(0.1)
    assert histogram.counts == [1, 1]


def test_copy_of_the_statistics_stands_still_to_its_depth() -> None:
    statistics = PlannerStatistics()
    statistics.hits["host"] += 2
    statistics.mismatches["disk"] += 1
    statistics.expired["host"] += 4
    route = statistics.route(Tier.DEVICE, Tier.HOST)
    assert statistics.route(Tier.DEVICE, Tier.HOST) is route
    route.dropped["evicted"] += 3
    route.observe("ok", 0.5)
    copy = statistics.copy()
    statistics.hits["host"] += 1
    statistics.mismatches["disk"] += 1
    statistics.expired["host"] += 1
    statistics.misses += 1
    route.blocks += 5
    route.dropped["evicted"] += 1
    route.observe("ok", 0.5)
    route.observe("late", 0.5)
    statistics.route(Tier.HOST, Tier.DISK)
    assert copy.expired == {"host": 4}
    kept = copy.routes[Tier.DEVICE, Tier.HOST]
    assert (copy.hits["host"], copy.mismatches["disk"], copy.misses, len(copy.routes)) == (2, 1, 0, 1)
    assert (kept.blocks, kept.dropped["evicted"], list(kept.seconds), kept.seconds["ok"].count) == (0, 3, ["ok"], 1)


def test_copy_of_a_route_has_every_counter() -> None:
    counters = RouteCounters(blocks=1, nbytes=2, present=3, queued=4, in_flight=5, draining=6)
    counters.dropped["late"] += 7
    counters.observe("failed", 8.0)
    copy = counters.copy()
    for name in vars(counters):
        a, b = getattr(copy, name), getattr(counters, name)
        assert [h.counts for h in a.values()] == [h.counts for h in b.values()] if name == "seconds" else a == b, name
