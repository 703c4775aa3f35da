"""Inventories of several ranks: what all of them have in the same slots, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.jobs import JobResult
from kvbm.planner.inventories import intersect

Row = tuple[int, int]  # slot, name
ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=12)
NONE = np.empty(0, dtype=np.uint8)


def result_of(rows: list[Row]) -> JobResult:
    hashes = np.array([[name % 3, name // 3] for _, name in rows], dtype=np.uint64).reshape(-1, 2)
    return JobResult(
        job_id=1,
        outcomes=NONE,
        ids=np.array([slot for slot, _ in rows], dtype=np.int32),
        hashes=hashes,
        parents=hashes + np.uint64(100),
        priorities=(hashes[:, 0] + hashes[:, 1]).astype(np.uint8),
    )


def kept(*ranks: list[Row], num_blocks: int = 8) -> list[Row]:
    ids, hashes, parents, priorities = intersect({i: result_of(rows) for i, rows in enumerate(ranks)}, num_blocks)
    assert parents.tolist() == (hashes + np.uint64(100)).tolist()
    assert priorities.tolist() == hashes.sum(axis=1).tolist()
    return [(slot, low + 3 * high) for slot, (low, high) in zip(ids.tolist(), hashes.tolist(), strict=True)]


def test_one_rank_keeps_its_order() -> None:
    assert kept([(3, 1), (0, 2), (7, 0)]) == [(3, 1), (0, 2), (7, 0)]
    assert kept([]) == []


def test_what_is_kept_has_the_same_slot_and_name_everywhere() -> None:
    first = [(3, 1), (0, 2), (7, 0), (4, 4)]
    assert kept(first, [(7, 0), (0, 2), (3, 1)]) == [(3, 1), (0, 2), (7, 0)]
    assert kept(first, [(7, 1), (3, 0), (0, 2)]) == [(0, 2)]
    assert kept(first, first, []) == []
    assert kept(first, [(3, 1), (4, 4)], [(0, 2), (4, 4)]) == [(4, 4)]


def test_slots_outside_the_pool_do_not_count() -> None:
    assert kept([(8, 1), (7, 2), (900, 3)], num_blocks=8) == [(7, 2)]


def test_a_rank_that_has_no_inventory_leaves_nothing() -> None:
    good, bad = result_of([(1, 1)]), JobResult(job_id=1, outcomes=NONE)
    for results in ({0: good, 1: bad}, {0: bad, 1: good}, {0: bad}, {}):
        assert [len(part) for part in intersect(results, 8)] == [0] * 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@given(data=st.data())
def test_it_does_what_a_loop_over_sets_does(num_ranks: int, data: st.DataObject) -> None:
    ranks = [data.draw(ROWS) for _ in range(num_ranks)]
    if data.draw(st.booleans()):  # else they hardly ever agree
        ranks[1:] = [data.draw(st.permutations(ranks[0])) for _ in ranks[1:]]
    expected: list[Row] = []
    for slot, name in (row for row in ranks[0] if row[0] < 8 and all(row in rank for rank in ranks)):
        if slot not in [row[0] for row in expected]:
            expected.append((slot, name))
    unique: list[Row] = []
    for slot, name in expected:
        if name not in [row[1] for row in unique]:
            unique.append((slot, name))
    assert kept(*ranks) == unique
