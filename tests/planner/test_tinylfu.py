"""The sketch that counts uses, the table of names, and the offload policy made of both."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import ConfigError
from kvbm.planner.policies import OffloadPolicy, SecondUsePolicy, TinyLfuPolicy
from kvbm.planner.policies.names import NameTable
from kvbm.planner.policies.sketch import MAX_COUNT, NUM_ROWS, FrequencySketch
from kvbm.testing.offload_policies import OffloadPolicyTests, candidates
from kvbm.types import HashArray

NEW_NAMES = itertools.count(10_000)
LONG = 1 << 20  # a sample that does not end within a test


class TestTinyLfu(OffloadPolicyTests):
    def make_policy(self) -> OffloadPolicy:
        return TinyLfuPolicy(1000, seed=1)


def hashes(first: int, n: int) -> HashArray:
    """Give hashes as bad as they come: numbers in a row, and the second half zero."""
    return np.stack([np.arange(first, first + n), np.zeros(n)], axis=1).astype(np.uint64)


# -- the sketch ------------------------------------------------------------------------------------------------


def test_sketch_counts_exactly_where_there_are_few() -> None:
    sketch = FrequencySketch(1000, seed=1)
    names = sketch.mix(hashes(0, 5))
    for i in range(5):
        for _ in range(i):
            sketch.add(names[i : i + 1])
    assert sketch.estimate(names).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=50, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 999), max_size=300, unique=True), max_size=40))
def test_sketch_never_counts_too_few_before_it_halves(batches: list[list[int]]) -> None:
    sketch = FrequencySketch(1, sample_size=LONG, seed=2)
    exact: Counter[int] = Counter()
    for batch in batches:
        sketch.add(sketch.mix(np.array([[name, 0] for name in batch], dtype=np.uint64).reshape(-1, 2)))
        exact.update(batch)
    estimates = sketch.estimate(sketch.mix(hashes(0, 1000))).tolist()
    assert all(estimate >= min(exact[name], MAX_COUNT + 1) for name, estimate in enumerate(estimates))


def test_sketch_counts_too_many_for_few_names_only() -> None:
    sketch = FrequencySketch(4096, sample_size=LONG, seed=3)
    names = sketch.mix(hashes(0, 4096))
    for start in range(0, 4096, 64):
        for _ in range(1 + start % 256 // 64):
            sketch.add(names[start : start + 64])
    exact = np.repeat(1 + np.arange(0, 4096, 64) % 256 // 64, 64)
    wrong = sketch.estimate(names) != exact
    assert wrong.mean() < 0.08
    assert (sketch.estimate(sketch.mix(hashes(10**6, 4096))) > 0).mean() < 0.1


def test_rows_share_no_bit_of_the_index() -> None:
    """Names that share a counter in one row share one in another as often as any two do, for every pair of rows."""
    sketch = FrequencySketch(1024, seed=4)
    num_names = 60_000
    rows = sketch._places(sketch.mix(hashes(0, num_names))) % 1024
    expected = num_names**2 / 2 / 1024**2
    for first in range(NUM_ROWS):
        for second in range(first):
            together = np.bincount(rows[first] * 1024 + rows[second], minlength=1024**2)
            pairs = (together * (together - 1) // 2).sum()
            assert abs(pairs / expected - 1) < 0.15, (first, second)


def test_doorkeeper_shares_no_bit_with_the_rows() -> None:
    sketch = FrequencySketch(1024, sample_size=256, seed=4)
    names = sketch.mix(hashes(0, 60_000))
    places, bits = sketch._doors(names)
    doors = places * 8 + np.log2(bits).astype(np.int64)
    rows = sketch._places(names) % 1024
    for door in doors:
        for row in rows:
            together = np.bincount(door * 1024 + row, minlength=1024**2)
            assert abs((together * (together - 1) // 2).sum() / (60_000**2 / 2 / 1024**2) - 1) < 0.15


@pytest.mark.parametrize("bit", range(128))
def test_every_bit_of_a_hash_reaches_every_row(bit: int) -> None:
    sketch = FrequencySketch(1 << 16, seed=5)
    given_hashes = np.random.default_rng(bit).integers(0, 2**64, (256, 2), dtype=np.uint64)
    flipped = given_hashes.copy()
    flipped[:, bit // 64] ^= np.uint64(1 << bit % 64)
    differs = sketch._places(sketch.mix(given_hashes)) != sketch._places(sketch.mix(flipped))
    assert differs.mean(axis=1).min() > 0.98


def test_mixing_keeps_different_hashes_different() -> None:
    sketch = FrequencySketch(1000)
    given_hashes = np.concatenate([hashes(0, 50_000), hashes(1, 50_000)[:, ::-1]])
    assert len(np.unique(sketch.mix(given_hashes), axis=0)) == 100_000


def test_seeds_differ_unless_one_is_given() -> None:
    first, second = FrequencySketch(1000), FrequencySketch(1000)
    assert (first.mix(hashes(0, 100)) != second.mix(hashes(0, 100))).all()


def test_counter_stops_at_fifteen_and_leaves_its_neighbour_in_the_byte_alone() -> None:
    sketch = FrequencySketch(1, sample_size=LONG, seed=6)
    names = sketch.mix(hashes(0, 1))
    for _ in range(40):
        sketch.add(names)
    assert sketch.estimate(names).tolist() == [MAX_COUNT + 1]
    counters = np.stack([sketch._counters & 15, sketch._counters >> 4])
    assert sorted(counters[counters > 0].tolist()) == [MAX_COUNT] * NUM_ROWS


def test_both_counters_of_a_byte_grow_in_one_batch() -> None:
    sketch = FrequencySketch(1, sample_size=LONG, seed=7)
    names = sketch.mix(hashes(0, 3000))
    for _ in range(3):
        sketch.add(names)
    assert (sketch.estimate(names) >= 3).all()


def test_only_the_smallest_counters_grow() -> None:
    sketch = FrequencySketch(1, sample_size=LONG, seed=8)
    names = sketch.mix(hashes(0, 900))
    for i in range(900):
        for _ in range(1 + i % 3):
            sketch.add(names[i : i + 1])
    total = int((sketch._counters & 15).sum() + (sketch._counters >> 4).sum())
    assert total < NUM_ROWS * sum(i % 3 for i in range(900)), "each use grew all four counters"


def test_hash_that_is_twice_in_a_batch_is_counted_once() -> None:
    sketch = FrequencySketch(1000, seed=9)
    names = sketch.mix(hashes(0, 1)).repeat(5, axis=0)
    sketch.add(names)
    assert sketch.estimate(names[:1]).tolist() == [1]
    sketch.add(names)
    assert sketch.estimate(names[:1]).tolist() == [2]


def test_sketch_forgets_half_after_its_sample() -> None:
    sketch = FrequencySketch(1000, sample_size=100, seed=10)
    names = sketch.mix(hashes(0, 3))
    for _ in range(9):
        sketch.add(names[:1])
    sketch.add(names[1:2])
    assert sketch.estimate(names).tolist() == [9, 1, 0]
    for i in range(89):
        sketch.add(sketch.mix(hashes(1000 + i, 1)))
    assert (sketch.num_halvings, sketch.estimate(names).tolist()) == (0, [9, 1, 0])
    sketch.add(sketch.mix(hashes(5000, 1)))
    assert (sketch.num_halvings, sketch.estimate(names).tolist()) == (1, [4, 0, 0])
    for i in range(50):  # half of the sample is behind it
        sketch.add(sketch.mix(hashes(6000 + i, 1)))
    assert (sketch.num_halvings, sketch.estimate(names).tolist()) == (2, [2, 0, 0])


def test_halving_keeps_the_two_counters_of_a_byte_apart() -> None:
    sketch = FrequencySketch(1, sample_size=LONG, seed=17)
    names = sketch.mix(hashes(0, 600))
    for uses in range(15):
        sketch.add(names[uses * 40 :])
    before = np.stack([sketch._counters & 15, sketch._counters >> 4])
    sketch._halve()
    assert np.array_equal(np.stack([sketch._counters & 15, sketch._counters >> 4]), before // 2)


def test_batch_larger_than_the_sample_halves_more_than_once() -> None:
    sketch = FrequencySketch(100, sample_size=10, seed=11)
    sketch.add(sketch.mix(hashes(0, 1000)))
    assert sketch.num_halvings == 7
    assert sketch._num_uses < 10


def test_sketch_memory_is_what_the_documentation_says() -> None:
    for num_items in (2000, 50_000, 1_000_000):
        sketch = FrequencySketch(num_items)
        before = sketch.nbytes
        assert before <= (4 + 10) * num_items + 128
        sketch.add(sketch.mix(hashes(0, 1000)))
        assert sketch.nbytes == before == sketch._counters.nbytes + sketch._door.nbytes


# -- the table of names ----------------------------------------------------------------------------------------


def test_table_forgets_the_name_of_a_set_that_was_used_longest_ago() -> None:
    table = NameTable(8)  # one set
    names = FrequencySketch(8, seed=12).mix(hashes(0, 10))
    for i in range(8):
        table.put(table.find(names[i : i + 1])[0], names[i : i + 1])
    assert table.find(names)[1].tolist() == [True] * 8 + [False] * 2
    table.put(table.find(names[:1])[0], names[:1])  # 1 is the oldest now
    places, _ = table.find(names[8:9])
    oldest, is_there = table.names_at(places)
    assert (oldest.tolist(), is_there.tolist()) == (names[1:2].tolist(), [True])
    table.put(places, names[8:9])
    assert table.find(names)[1].tolist() == [True, False] + [True] * 7 + [False]
    assert len(table) == 8


def test_table_spreads_names_over_its_sets_and_keeps_its_size() -> None:
    table = NameTable(4096)
    names = FrequencySketch(8, seed=13).mix(hashes(0, 100_000))
    before = table.nbytes
    for start in range(0, 100_000, 100):
        some = names[start : start + 100]
        table.put(table.find(some)[0], some)
    assert len(table) == 4096
    _, is_there = table.find(names[-4096:])
    assert is_there.mean() > 0.8, "about what was used last"
    assert table.find(names[:50_000])[1].mean() < 0.001
    assert table.nbytes == before == 24 * 4096


# -- the policy ------------------------------------------------------------------------------------------------


def use(policy: OffloadPolicy, *names: int, times: int = 1) -> list[bool]:
    for _ in range(times):
        mask = policy.registered(candidates(names))
    return mask.tolist()


def full_policy(num_blocks: int = 8) -> TinyLfuPolicy:
    """Give a policy whose tier of eight is full of names 0 to 7, each used three times, with no window left of them."""
    policy = TinyLfuPolicy(num_blocks, window_share=0.01, sample_size=LONG, seed=14)
    for _ in range(3):
        use(policy, *range(num_blocks))
    push_out(policy)
    return policy


def push_out(policy: TinyLfuPolicy) -> None:
    """Fill the window with names that were used once."""
    for _ in range(16):
        use(policy, next(NEW_NAMES))


def test_block_seen_for_the_first_time_stays_above_even_where_there_is_room() -> None:
    policy = TinyLfuPolicy(1000, seed=1)
    assert use(policy, 1, 2, 3) == [False] * 3
    assert use(policy, 2) == [True]


def test_block_found_by_a_request_counts_as_used() -> None:
    policy = TinyLfuPolicy(1000, seed=1)
    assert use(policy, 1, 2) == [False, False]
    assert policy.used(candidates([2])).tolist() == [True]


def test_block_must_win_against_what_it_would_displace() -> None:
    policy = full_policy()
    for uses, passes in ((1, False), (2, False), (3, False), (4, True)):
        assert use(policy, 50) == [passes], f"{uses} uses"
        push_out(policy)


def test_block_that_lost_takes_nobodys_place() -> None:
    policy = full_policy()
    use(policy, 50)
    push_out(policy)
    assert use(policy, 50) == [False]
    assert use(policy, *range(8)) == [True] * 8


def test_block_that_won_takes_the_place_of_what_was_used_longest_ago() -> None:
    policy = full_policy()
    for _ in range(4):
        use(policy, 50)
        push_out(policy)
    names = policy._sketch.mix(candidates([*range(8), 50]).hashes)
    assert policy._below.find(names)[1].sum() == 8
    assert policy._below.find(names)[1][-1]


def test_block_used_again_in_the_window_passes_without_a_comparison() -> None:
    policy = full_policy()
    assert use(policy, 50) == [False]
    assert use(policy, 50) == [True]


def test_what_was_popular_once_gives_way() -> None:
    """Aging: after halvings, blocks with a long history lose against fewer, later uses."""
    policy = TinyLfuPolicy(8, sample_size=400, seed=15)
    use(policy, *range(8), times=15)
    push_out(policy)
    assert use(policy, 50) == [False]
    push_out(policy)
    assert use(policy, 50) == [False]
    while policy._sketch.num_halvings < 4:
        push_out(policy)
    assert use(policy, 60) == [False]
    push_out(policy)
    assert use(policy, 60) == [True]


def test_priorities_do_not_count() -> None:
    policy = TinyLfuPolicy(1000, seed=1)
    assert policy.prioritised(candidates([1, 2], [0, 100])).tolist() == [False, False]
    assert policy.registered(candidates([1, 2], [0, 100])).tolist() == [False, False]


@pytest.mark.parametrize("num_blocks", [1, 7, 100, 20_000, 1_000_000, 100_000_000])
def test_memory_is_bounded_and_stays_as_it_is(num_blocks: int) -> None:
    policy = TinyLfuPolicy(num_blocks, seed=1)
    before = policy.nbytes
    assert before <= min(28 << 20, 32 * num_blocks + 4096)
    for start in range(0, 20_000, 1000):
        policy.registered(candidates(range(start, start + 1000)))
    assert policy.nbytes == before


def test_of_a_large_tier_a_share_of_the_names_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm.planner.policies.tinylfu.MAX_REMEMBERED", 1024)
    policy = TinyLfuPolicy(8192, seed=1)
    for _ in range(2):
        for start in range(0, 4000, 100):
            passed = policy.registered(candidates(range(start, start + 100)))
    assert passed.mean() > 0.9
    assert 0.8 * 4000 / 8 < len(policy._below) < 1.2 * 4000 / 8


def hits_and_writes(policy: OffloadPolicy, names: list[int], num_blocks: int) -> tuple[int, int]:
    """Run names through an LRU cache that a policy admits to."""
    cache: OrderedDict[int, None] = OrderedDict()
    num_hits = num_writes = 0
    for name in names:
        num_hits += name in cache
        passes = policy.registered(candidates([name]))[0]
        if name in cache:
            cache.move_to_end(name)
        elif passes:
            cache[name] = None
            num_writes += 1
            if len(cache) > num_blocks:
                cache.popitem(last=False)
    return num_hits, num_writes


def test_skewed_uses_bring_more_hits_with_fewer_writes_than_second_use() -> None:
    """What TinyLFU is for: few names are used often, most seldom, and twice is not yet often."""
    ranks = np.arange(1, 4001)
    rng = np.random.default_rng(16)
    names = rng.choice(4000, 10_000, p=(1 / ranks**0.8) / (1 / ranks**0.8).sum()).tolist()
    hits, writes = hits_and_writes(TinyLfuPolicy(200, window_share=0.04, seed=1), names, 200)
    other_hits, other_writes = hits_and_writes(SecondUsePolicy(), names, 200)
    assert hits > 1.1 * other_hits
    assert writes < 0.5 * other_writes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0, give 1 or more"),
        ({"window_share": 0}, "window_share is 0, give more than 0 and at most 1"),
        ({"window_share": 1.5}, "window_share is 1.5, give more than 0"),
        ({"min_uses": 0}, r"min_uses is 0, give 1\.\.16"),
        ({"min_uses": 17}, r"min_uses is 17, give 1\.\.16"),
        ({"sample_size": -1}, "sample_size is -1, give 1 or more"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyLfuPolicy(**arguments)  # type: ignore[arg-type]


def test_sketch_needs_items() -> None:
    with pytest.raises(ConfigError, match="num_items is 0, give 1 or more"):
        FrequencySketch(0)
