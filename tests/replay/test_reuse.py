"""The hit rate against capacity, from reuse distances, equals LRU caches of each size."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.replay import read_trace
from kvbm.replay.reuse import reuse_curve
from kvbm.types import HashArray

TRACE = Path(__file__).parents[3] / "shared" / "data" / "mooncake_conversation_trace.jsonl"


def lru_hits(requests: list[list[int]], capacity: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    num_hits = 0
    for names in requests:
        for name in names:
            if name not in cache:
                break
            num_hits += 1
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return num_hits


def hashes_of(names: list[int]) -> HashArray:
    return np.array([(name, ~name & 0xFF) for name in names], dtype=np.uint64).reshape(-1, 2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=25))
def test_curve_equals_lru_caches_of_every_size(requests: list[list[int]]) -> None:
    curve = reuse_curve([hashes_of(names) for names in requests])
    assert curve.num_blocks == sum(map(len, requests))
    assert curve.num_unique == len({name for names in requests for name in names})
    assert curve.min_capacity == max(map(len, requests), default=0)
    for capacity in range(1, 14):
        rate = float(curve.hit_rates(capacity))
        assert round(rate * curve.num_blocks) == lru_hits(requests, capacity), f"{capacity} blocks"


def test_curve_of_nothing_is_nothing() -> None:
    for requests in ([], [hashes_of([])]):
        assert reuse_curve(requests).hit_rates([1, 100]).tolist() == [0.0, 0.0]


@pytest.mark.skipif(not TRACE.exists(), reason="the real trace is not part of a checkout")
def test_curve_of_the_conversation_trace_gives_the_reference_rates() -> None:
    curve = reuse_curve([request.hashes for request in read_trace(TRACE) if request.hashes is not None])
    rates = curve.hit_rates([500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000]).round(4)
    assert rates.tolist() == [0.0422, 0.0445, 0.0543, 0.1118, 0.2116, 0.2878, 0.3546, 0.3637]
