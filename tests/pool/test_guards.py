"""Guards: consumed once, conserved always (CONFORMANCE 11, 12)."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep

from kvbm.blocks import BlockGuard
from kvbm.errors import BlockIdError, BlockStateError, ConfigError, HashFormatError
from kvbm.eviction import FifoPolicy
from kvbm.types import SequenceHash


def test_consumed_guard_raises_naming_both_states(make_pool: MakePool) -> None:
    pool = make_pool(4)
    mutable = pool.allocate_blocks(2)
    complete = mutable.complete(hashes_of([1, 2]))
    with pytest.raises(BlockStateError, match="these blocks are complete, must be mutable to complete them"):
        mutable.complete(hashes_of([1, 2]))
    blocks = pool.register_blocks(complete)
    with pytest.raises(BlockStateError, match="these blocks are active, must be complete to register them"):
        pool.register_blocks(complete)
    block = blocks[0]
    blocks.release()
    with pytest.raises(BlockStateError, match="these blocks are released, must be active to use them"):
        _ = block.block_id
    blocks.release()


def test_failed_transition_leaves_the_guard_usable(make_pool: MakePool) -> None:
    pool = make_pool(4)
    mutable = pool.allocate_blocks(2)
    with pytest.raises(HashFormatError, match="hashes has 1 entries, need 2"):
        mutable.complete(hashes_of([1]))
    complete = mutable.complete(hashes_of([1, 2]))
    with pytest.raises(BlockStateError, match="registers its own CompleteBlocks"):
        make_pool(4).register_blocks(complete)
    assert len(pool.register_blocks(complete)) == 2


def test_dropped_guards_give_their_blocks_back(make_pool: MakePool) -> None:
    pool = make_pool(4)
    pool.allocate_blocks(1)
    pool.allocate_blocks(1).complete(hashes_of([1]))
    gc.collect()
    assert pool.status().free == 4
    pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([1])))
    gc.collect()
    assert pool.status().inactive == 1
    pool.check()


def test_thousands_of_dropped_guards_come_back_at_once(make_pool: MakePool) -> None:
    pool = make_pool(5000)
    guards = [pool.allocate_blocks(1) for _ in range(5000)]
    guards.clear()
    guards.append(pool.allocate_blocks(5000))
    assert pool.status().mutable == 5000


def test_dropping_in_any_order_conserves_blocks(make_pool: MakePool) -> None:
    rng = random.Random(0)
    for _ in range(50):
        pool = make_pool(12)
        guards: list[BlockGuard] = [pool.allocate_blocks(2), pool.allocate_blocks(2).complete(hashes_of([1, 2]))]
        guards.append(pool.register_blocks(pool.allocate_blocks(2).complete(hashes_of([3, 4]))))
        guards.append(pool.match_sequence_hashes(hashes_of([3, 4])))
        rng.shuffle(guards)
        while guards:
            if rng.random() < 0.5:
                guards.pop().release()
            else:
                guards.pop()
            pool.check()
        status = pool.status()
        assert (status.free, status.inactive) == (10, 2)


def test_guards_slice_into_views_and_split_into_guards(make_pool: MakePool) -> None:
    pool = make_pool(5)
    blocks = pool.register_blocks(pool.allocate_blocks(5).complete(hashes_of(range(5))))
    assert [block.block_id for block in blocks[1:3]] == blocks.block_ids[1:3].tolist()
    assert blocks[-1].sequence_hash == SequenceHash(hashes_of([4])[0].tobytes())
    with pytest.raises(BlockIdError, match="index 5 is outside a guard of 5 blocks"):
        _ = blocks[5]
    with pytest.raises(BlockIdError, match="cannot split 5 blocks at 6"):
        blocks.split(6)
    head, tail = blocks.split(2)
    assert (len(head), len(tail), blocks.is_live) == (2, 3, False)
    tail.release()
    assert (pool.status().active, pool.status().inactive) == (2, 3)
    whole = head + pool.match_sequence_hashes(hashes_of([2, 3]))
    assert np.array_equal(whole.hashes, hashes_of(range(4)))
    with pytest.raises(BlockStateError):
        _ = whole + whole
    assert len(whole) == 4


def test_guards_of_two_pools_do_not_merge(make_pool: MakePool) -> None:
    one, two = make_pool(2, name="one").allocate_blocks(1), make_pool(2, name="two").allocate_blocks(1)
    with pytest.raises(BlockStateError, match="cannot merge blocks of pool 'one' and pool 'two'"):
        _ = one + two
    assert one.is_live
    assert two.is_live


def test_weak_blocks_upgrade_while_alive_and_never_after_eviction(make_pool: MakePool) -> None:
    pool = make_pool(2)
    weak = pool.register_blocks(pool.allocate_blocks(2).complete(hashes_of([1, 2]))).downgrade()
    assert pool.status().inactive == 2, "weak blocks protect nothing"
    strong = weak.upgrade()
    assert strong is not None
    strong.release()
    pool.allocate_blocks(1).release()
    keep(pool, [9])
    assert weak.upgrade() is None, "one of the slots holds another hash by now"
    assert pool.status().active == 0
    pool.check()


def test_acquire_with_a_stale_hash_takes_nothing(make_pool: MakePool) -> None:
    pool = make_pool(2)
    keep(pool, [1])
    assert pool.acquire(np.array([0, 0, 1], dtype=np.int32), hashes_of([2, 1, 1])).tolist() == [False, True, False]
    assert pool.status().active == 1
    pool.check()


def test_guard_collected_inside_a_store_call_does_not_deadlock(make_pool: MakePool) -> None:
    class CollectingPolicy(FifoPolicy):
        def inserted(self, ids: object, hashes: object, priorities: object) -> None:
            super().inserted(ids, hashes, priorities)  # type: ignore[arg-type]
            gc.collect()

    pool = make_pool(4, policy=CollectingPolicy())
    cycle: list[object] = [pool.allocate_blocks(2)]
    cycle.append(cycle)
    del cycle
    keep(pool, [1])
    assert pool.status().free == 3
    pool.check()


def test_blocks_of_a_pool_without_bytes_say_so(make_pool: MakePool) -> None:
    with make_pool(1).allocate_blocks(1) as blocks, pytest.raises(ConfigError, match="keeps no bytes"):
        blocks[0].layer(0)


def test_one_guard_released_by_many_threads_is_released_once(make_pool: MakePool) -> None:
    import threading

    pool = make_pool(4)
    for _ in range(200):
        guard = pool.allocate_blocks(2)
        threads = [threading.Thread(target=guard.release) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.status().free == 4
