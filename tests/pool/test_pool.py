"""What a pool promises, behaviour by behaviour (CONFORMANCE 1-10)."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep, present

from kvbm.errors import BlockStateError, ConfigError, KvbmError, NotEnoughBlocksAvailable, PoolClosed
from kvbm.pool import BlockPool


def test_new_pool_is_all_free_and_allocation_counts_at_once(make_pool: MakePool) -> None:
    pool = make_pool(8)
    assert (pool.total_blocks, pool.available_blocks, pool.status().free) == (8, 8, 8)
    blocks = pool.allocate_blocks(3)
    assert (pool.available_blocks, pool.status().mutable) == (5, 3)
    pool.check()
    blocks.release()
    assert pool.available_blocks == 8


def test_match_returns_the_registered_ids_and_revives_them(make_pool: MakePool) -> None:
    pool = make_pool(8)
    fresh = pool.allocate_blocks(3)
    ids = fresh.block_ids.tolist()
    registered = pool.register_blocks(fresh.complete(hashes_of([1, 2, 3])))
    again = pool.match_sequence_hashes(hashes_of([1, 2, 3]))
    assert registered.block_ids.tolist() == again.block_ids.tolist() == ids
    registered.release()
    again.release()
    assert pool.status().inactive == 3
    revived = pool.match_sequence_hashes(hashes_of([1, 2, 3]))
    assert revived.block_ids.tolist() == ids
    assert pool.status().active == 3
    pool.check()


def test_over_allocation_raises_with_both_numbers_and_takes_nothing(make_pool: MakePool) -> None:
    pool = make_pool(4, name="small")
    keep(pool, [1])
    held = pool.allocate_blocks(2)
    with pytest.raises(NotEnoughBlocksAvailable) as raised:
        pool.allocate_blocks(3)
    assert (raised.value.requested, raised.value.available) == (3, 2)
    assert str(raised.value) == "need 3 blocks, have 2 (1 free + 1 evictable, pool 'small', 4 total)"
    assert isinstance(raised.value, MemoryError)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert pool.try_allocate_blocks(3) is None
    assert pool.available_blocks == 2
    held.release()


def test_match_stops_at_first_miss_and_counts(make_pool: MakePool) -> None:
    pool = make_pool(8)
    keep(pool, [1, 2, 4])
    hit = pool.match_sequence_hashes(hashes_of([1, 2, 3, 4]))
    assert len(hit) == 2
    status = pool.status()
    assert (status.hits, status.misses) == (2, 2)


def test_lookup_does_not_stop_and_changes_nothing(make_pool: MakePool) -> None:
    pool = make_pool(3)
    keep(pool, [1])
    keep(pool, [2])
    assert present(pool, [1, 9, 2, 1]) == [True, False, True, True]
    assert pool.status().active == 0
    pool.allocate_blocks(2)
    assert present(pool, [1, 2]) == [False, True], "looking at 1 must not have made it young"


def test_leaves_leave_before_their_parents(make_pool: MakePool) -> None:
    pool = make_pool(1000)
    keep(pool, range(1000))
    with pool.subscribe_events(kinds=["deleted"]) as events:
        held = [pool.allocate_blocks(10) for _ in range(100)]
        evicted = [int.from_bytes(event.sequence_hash[:8], "little") - 1 for event in events.poll()]
    assert evicted == list(range(999, -1, -1))
    assert len(held) == 100


def test_two_children_are_evicted_before_their_shared_root(make_pool: MakePool) -> None:
    pool = make_pool(3)
    root = pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([0])))
    root.release()
    for child in (1, 2):
        hit = pool.match_sequence_hashes(hashes_of([0, child]))
        (hit + pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([child])))).release()
    order = []
    for n in (1, 2, 3):
        with pool.allocate_blocks(n):
            order.append(present(pool, [0, 1, 2]))
    assert order == [[True, False, True], [True, False, False], [False, False, False]]


def test_priority_beats_recency_and_touch_changes_who_is_next(make_pool: MakePool) -> None:
    pool = make_pool(4)
    for name in range(4):
        keep(pool, [name])
    assert pool.set_priority(hashes_of([0]), 80) == 1
    assert pool.touch_blocks(hashes_of([1, 77])) == 1
    gone = []
    for n in range(1, 5):
        with pool.allocate_blocks(n):
            gone.append([name for name in range(4) if not present(pool, [name])[0]])
    assert [set(names) for names in gone] == [{2}, {2, 3}, {1, 2, 3}, {0, 1, 2, 3}]


def test_priority_outside_its_range_is_refused(make_pool: MakePool) -> None:
    with pytest.raises(ConfigError, match=r"priority 101 is outside 0\.\.100"):
        make_pool(1).set_priority(hashes_of([1]), 101)


@pytest.mark.parametrize("is_active", [True, False])
def test_registering_a_known_hash_folds_onto_its_primary(make_pool: MakePool, is_active: bool) -> None:
    pool = make_pool(4)
    first = pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([1])))
    primary = first.block_ids.tolist()
    if not is_active:
        first.release()
    second = pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([1])))
    assert second.block_ids.tolist() == primary
    status = pool.status()
    assert (status.active, status.free, status.folded_total) == (1, 3, 1)
    pool.check()


def test_the_same_hash_twice_in_one_batch_is_one_block(make_pool: MakePool) -> None:
    pool = make_pool(4)
    blocks = pool.register_blocks(pool.allocate_blocks(3).complete(hashes_of([1, 2, 1])))
    ids = blocks.block_ids.tolist()
    assert ids[0] == ids[2] != ids[1]
    pool.check()
    blocks.release()
    assert pool.status().inactive == 2
    pool.check()


def test_reset_blocks_answers_three_disjoint_lists(make_pool: MakePool) -> None:
    pool = make_pool(4)
    keep(pool, [1, 2])
    held = pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([3])))
    answer = pool.reset_blocks(hashes_of([1, 9, 3, 1]))
    names = [
        [int.from_bytes(name[:8], "little") - 1 for name in part]
        for part in (answer.reset, answer.not_found, answer.in_use)
    ]
    assert names == [[1], [9], [3]]
    with pytest.raises(BlockStateError, match="1 blocks are in use"):
        pool.reset()
    assert present(pool, [1, 2, 3]) == [False, True, True]
    held.release()
    assert pool.reset() == 2
    assert pool.status().free == 4
    pool.check()


def test_a_second_life_of_a_hash_leaves_no_stale_entry(make_pool: MakePool) -> None:
    pool = make_pool(2)
    for _ in range(3):
        keep(pool, [1, 2])
        pool.allocate_blocks(2).release()
        assert present(pool, [1, 2]) == [False, False]
        pool.check()
    keep(pool, [1, 2])
    assert len(pool.match_sequence_hashes(hashes_of([1, 2]))) == 2


def test_a_closed_pool_says_so_and_takes_blocks_back(make_pool: MakePool) -> None:
    pool = make_pool(2, name="x")
    blocks = pool.allocate_blocks(1)
    pool.close()
    with pytest.raises(PoolClosed, match="pool 'x' is closed"):
        pool.allocate_blocks(1)
    blocks.release()
    assert pool.status().free == 2


@pytest.mark.parametrize("num_blocks", [0, -1, 2**31])
def test_impossible_pool_sizes_are_refused(make_pool: MakePool, num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="a pool needs 1 to 2147483646 blocks"):
        make_pool(num_blocks)


def test_metadata_lives_as_long_as_its_block(make_pool: MakePool) -> None:
    pool = make_pool(2)
    fresh = pool.allocate_blocks(2)
    fresh[0].metadata = {"user": 1}
    pool.register_blocks(fresh.complete(hashes_of([1, 2]))).release()
    hit = pool.match_sequence_hashes(hashes_of([1, 2]))
    assert hit[0].metadata == {"user": 1}
    assert hit[1].metadata is None
    hit.release()
    with pool.allocate_blocks(2) as again:
        assert [block.metadata for block in again] == [None, None]


def test_discarded_blocks_are_hidden_at_once_and_free_at_last_release(make_pool: MakePool) -> None:
    pool = make_pool(3)
    keep(pool, [1, 2])
    one, two = pool.match_sequence_hashes(hashes_of([1, 2])), pool.match_sequence_hashes(hashes_of([1]))
    pool.discard_blocks(two)
    assert present(pool, [1, 2]) == [False, True]
    assert len(pool.match_sequence_hashes(hashes_of([1]))) == 0
    two.release()
    assert pool.status().active == 2
    one.release()
    assert (pool.status().free, pool.status().inactive) == (2, 1)
    pool.check()


def test_restore_puts_blocks_back_at_exact_ids_oldest_first(make_pool: MakePool) -> None:
    pool = make_pool(6)
    store, hashes = pool._store, hashes_of([1, 2, 3])
    store.restore(np.array([5, 0, 3], dtype=np.int32), hashes, hashes, np.full(3, 50, dtype=np.uint8))
    assert pool.lookup(hashes).tolist() == [5, 0, 3]
    pool.check()
    pool.allocate_blocks(4)
    assert present(pool, [1, 2, 3]) == [False, True, True]
    with pytest.raises(BlockStateError, match="must be free to restore it"):
        store.restore(np.array([0], dtype=np.int32), hashes_of([8]), hashes_of([8]), np.full(1, 50, dtype=np.uint8))
    pool.check()


def test_every_error_of_ours_is_a_kvbm_error() -> None:
    pool = BlockPool(1)
    with pytest.raises(KvbmError):
        pool.allocate_blocks(-1)
