"""What is remembered of blocks that left a pool: when, why, and what needed their room."""

from __future__ import annotations

from history_site import names_of

from kvbm._backend import Backend
from kvbm.engines.removals import Removals
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Tier


def make_removals(backend: Backend, num_blocks: int) -> tuple[BlockPool, Removals]:
    pool = BlockPool(num_blocks, tier=Tier.HOST, backend=backend)
    return pool, Removals(pool, Planner([pool]))


def fill(pool: BlockPool, names: HashArray) -> None:
    pool.register_blocks(pool.allocate_blocks(len(names)).complete(names)).release()


def quiet() -> str:
    return ""


def test_what_left_is_found_with_its_cause_and_moment(backend: Backend) -> None:
    pool, removals = make_removals(backend, 8)
    names = names_of(1, 24)
    fill(pool, names[:8])
    assert removals.note(1.0, quiet) == 0
    fill(pool, names[8:16])
    assert removals.note(2.0, lambda: "something") == 8
    pool.reset_blocks(names[8:10])
    fill(pool, names[16:18])  # into the free ones
    assert removals.note(3.0, quiet) == 2
    found = [removals.find(name) for name in names]
    assert [one.causes[0] if one else "" for one in found] == ["evicted"] * 8 + ["reset"] * 2 + [""] * 14
    assert found[0] is not None
    assert found[8] is not None
    assert (found[0].at, found[8].at) == (2.0, 3.0)
    assert found[0].batch is not None
    assert (found[0].batch.num_removed, found[0].batch.pressure, found[0].total_blocks) == (8, "something", 8)
    assert removals.memory is None


def test_where_two_causes_meet_in_one_step_both_are_named(backend: Backend) -> None:
    pool, removals = make_removals(backend, 4)
    names = names_of(1, 8)
    fill(pool, names[:4])
    fill(pool, names[4:6])  # evicts the two oldest
    pool.reset_blocks(names[4:5])
    removals.note(1.0, quiet)
    found = removals.find(names[4])
    assert found is not None
    assert found.causes == ("evicted", "reset")


def test_more_names_than_places_are_forgotten_not_mixed_up(backend: Backend) -> None:
    pool, removals = make_removals(backend, 512)
    names = names_of(1, 12 * 512)
    for start in range(0, len(names), 512):
        fill(pool, names[start : start + 512])
        removals.note(float(start), quiet)
    found = [removals.find(name) for name in names]
    assert found[-512:] == [None] * 512, "they are there"
    assert sum(one is not None for one in found) <= 1024
    wrong = [place for place, one in enumerate(found) if one is not None and one.at != (place // 512 + 1) * 512.0]
    assert wrong == []
    assert removals.memory == 1024
    youngest = sum(one is not None for one in found[-2 * 512 : -512])
    assert youngest > 256, "most of those that left last are known"


def test_removals_that_were_overlooked_are_admitted(backend: Backend) -> None:
    pool, removals = make_removals(backend, 40)
    pool._hub.capacity = 20  # rows that wait for one reader
    for seed in range(2):
        fill(pool, names_of(seed, 40))
        removals.note(1.0, quiet)
    assert removals.memory is not None
