"""Chains of hashes that were seen lately: found by their end, bounded in all."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvbm.planner.lineage import Lineages


def chain(*names: int) -> Any:
    return np.array([[name, name + 1000] for name in names], dtype=np.uint64).reshape(-1, 2)


def names_of(hashes: Any) -> list[int]:
    return hashes[:, 0].tolist()


def test_chain_is_found_by_its_last_hash_only() -> None:
    lineages = Lineages(100)
    lineages.add(chain(1, 2, 3))
    assert names_of(lineages.before(chain(3))) == [1, 2, 3]
    assert names_of(lineages.before(chain(3, 9))) == [1, 2, 3], "of several parents the first counts"
    for parents in (chain(2), chain(9), chain()):
        before = lineages.before(parents)
        assert (before.shape, before.dtype) == ((0, 2), np.uint64)


def test_extending_remembers_what_was_known_before() -> None:
    lineages = Lineages(100)
    assert names_of(lineages.extend(chain(0, 1), chain(1, 2))) == []
    assert names_of(lineages.extend(chain(2, 3), chain(3, 4))) == [1, 2]
    assert names_of(lineages.extend(chain(4), chain(5))) == [1, 2, 3, 4]
    assert names_of(lineages.before(chain(5))) == [1, 2, 3, 4, 5]
    assert names_of(lineages.extend(chain(2), chain(30))) == [1, 2], "a second child of the same block"
    assert names_of(lineages.before(chain(4))) == [1, 2, 3, 4]


def test_longer_chain_to_the_same_end_wins_whichever_comes_first() -> None:
    for order in ([chain(3), chain(1, 2, 3)], [chain(1, 2, 3), chain(3)]):
        lineages = Lineages(3)
        for known in order:
            lineages.add(known)
        assert names_of(lineages.before(chain(3))) == [1, 2, 3]


def test_oldest_chain_is_forgotten_first_and_seeing_it_again_keeps_it() -> None:
    lineages = Lineages(6)
    lineages.add(chain(1, 2))
    lineages.add(chain(3, 4))
    lineages.add(chain(5, 6))
    lineages.add(chain(1, 2))
    lineages.add(chain(7))
    assert names_of(lineages.before(chain(4))) == []
    for kept in (chain(2), chain(6), chain(7)):
        assert len(lineages.before(kept))


def test_chain_longer_than_the_bound_is_not_remembered_and_costs_nothing() -> None:
    lineages = Lineages(3)
    lineages.add(chain(1, 2, 3))
    lineages.add(chain(4, 5, 6, 7))
    lineages.add(chain())
    assert names_of(lineages.before(chain(7))) == []
    assert names_of(lineages.before(chain(3))) == [1, 2, 3]


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.booleans()), max_size=40))
def test_no_more_than_the_bound_is_remembered(bound: int, steps: list[tuple[int, int, bool]]) -> None:
    lineages = Lineages(bound)
    for start, length, is_extension in steps:
        hashes = chain(*range(start, start + length))
        if is_extension and length:
            lineages.extend(np.concatenate([chain(max(start - 1, 0)), hashes[:-1]]), hashes)
        else:
            lineages.add(hashes)
        kept = {id(known): known.length for known, _ in lineages._ends.values()}
        assert sum(kept.values()) == lineages._num_blocks <= bound
        for key in lineages._ends:
            known = lineages.before(np.frombuffer(key, dtype=np.uint64).reshape(1, 2))
            assert known[-1].tobytes() == key


def test_jobs_of_several_requests_keep_their_chains_apart() -> None:
    lineages = Lineages(100)
    assert names_of(lineages.extend(chain(0, 1, 0, 11), chain(1, 2, 11, 12))) == []
    assert names_of(lineages.extend(chain(12, 2, 3), chain(13, 3, 4))) == [11, 12, 1, 2]
    assert names_of(lineages.before(chain(13))) == [11, 12, 13]
    assert names_of(lineages.before(chain(4))) == [1, 2, 3, 4]


def test_a_chain_that_grows_block_by_block_is_kept_once() -> None:
    lineages = Lineages(1_000)
    for i in range(900):
        assert len(lineages.extend(chain(i), chain(i + 1))) == i
    assert lineages._num_blocks == 900
    assert names_of(lineages.before(chain(17))) == list(range(1, 18))
