"""Threads, waiting, and large pools (CONFORMANCE 13, 16)."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from pool_life import MakePool, hashes_of

from kvbm._backend import Backend, Store
from kvbm.bench import store as store_bench
from kvbm.errors import NotEnoughBlocksAvailable
from kvbm.types import HashArray


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_eight_threads_neither_lose_nor_double_blocks(make_pool: MakePool) -> None:
    pool = make_pool(40)
    owners: dict[int, int] = {}
    failures: list[BaseException] = []

    def live(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(4000):
                names = sorted({rng.randrange(60) for _ in range(rng.randrange(1, 5))})
                hit = pool.match_sequence_hashes(hashes_of(names))
                fresh = pool.try_allocate_blocks(len(names) - len(hit))
                if fresh is None:
                    hit.release()
                    continue
                for block_id in fresh.block_ids.tolist():
                    assert owners.setdefault(block_id, seed) == seed, "two threads own one block"
                for block_id in fresh.block_ids.tolist():
                    del owners[block_id]
                complete = fresh.complete(hashes_of(names[len(hit) :]))
                (hit + pool.register_blocks(complete)).release()
        except BaseException as error:
            failures.append(error)

    _run([threading.Thread(target=live, args=(seed,)) for seed in range(8)])
    assert not failures
    pool.check()
    status = pool.status()
    assert status.free + status.inactive == 40


def test_lookup_against_last_release(make_pool: MakePool) -> None:
    pool = make_pool(2)
    rounds = 10_000
    for _ in range(rounds // 1_000):
        held = [pool.register_blocks(pool.allocate_blocks(1).complete(hashes_of([1])))]
        done = threading.Event()

        def look(done: threading.Event = done) -> None:
            while not done.is_set():
                pool.match_sequence_hashes(hashes_of([1])).release()

        looker = threading.Thread(target=look)
        looker.start()
        for _ in range(1_000):
            held.pop().release()
            held.append(pool.match_sequence_hashes(hashes_of([1])))
            assert len(held[0]) == 1
        done.set()
        looker.join()
        held.pop().release()
        pool.check()
        pool.reset()


def test_allocation_waits_for_a_release(make_pool: MakePool) -> None:
    pool = make_pool(2)
    held = pool.allocate_blocks(2)
    is_waiting = threading.Event()
    original = pool.try_allocate_blocks

    def try_and_tell(n: int) -> object:
        blocks = original(n)
        if blocks is None and pool._waiters:
            is_waiting.set()
        return blocks

    pool.try_allocate_blocks = try_and_tell  # type: ignore[method-assign, assignment]
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(len(pool.allocate_blocks(2, timeout=60))))
    waiter.start()
    assert is_waiting.wait(60)
    held.release()
    waiter.join(60)
    assert got == [2]


def test_allocation_waits_for_a_collected_guard(make_pool: MakePool) -> None:
    pool = make_pool(1)
    held = [pool.allocate_blocks(1)]
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(len(pool.allocate_blocks(1, timeout=60))))
    waiter.start()
    held.clear()
    waiter.join(60)
    assert got == [1]


def test_waiting_ends_at_its_timeout_and_never_starts_beyond_the_pool(make_pool: MakePool) -> None:
    pool = make_pool(2)
    held = pool.allocate_blocks(1)
    with pytest.raises(NotEnoughBlocksAvailable):
        pool.allocate_blocks(2, timeout=0.01)
    began = time.monotonic()
    with pytest.raises(NotEnoughBlocksAvailable):
        pool.allocate_blocks(3, timeout=60)
    assert time.monotonic() - began < 30
    held.release()
    assert len(pool._waiters) == 0


def test_native_memory_stays_within_its_bound(backend: Backend) -> None:
    for row in store_bench._memory(backend, 2_000_000):
        assert row["median"] < {"memory_10m": 100, "create_10m": 2}[row["name"]]


def test_native_cost_hardly_grows_with_the_pool(backend: Backend) -> None:
    if backend.name == "pure":
        store = backend.store(10_000_000)
        assert not store._records, "the pure twin creates lazily"  # type: ignore[attr-defined]
        return
    rng = np.random.default_rng(0)
    sizes = (1_000_000, 10_000_000)
    stores = [backend.store(num_blocks) for num_blocks in sizes]
    for store, num_blocks in zip(stores, sizes, strict=True):
        for _ in range(0, num_blocks, 100_000):  # full: every call below evicts
            _live(store, rng.integers(0, 2**63, (100_000, 2), dtype=np.uint64))
    times: list[list[int]] = [[], []]
    for _ in range(300):
        for store, mine in zip(stores, times, strict=True):  # in turns: what else runs here slows both
            hashes = rng.integers(0, 2**63, (128, 2), dtype=np.uint64)
            began = time.perf_counter_ns()
            _live(store, hashes)
            mine.append(time.perf_counter_ns() - began)
    assert [store.counts()["inactive"] for store in stores] == list(sizes)
    small, large = (float(np.median(mine)) for mine in times)
    assert large <= 2 * small


def _live(store: Store, hashes: HashArray) -> None:
    """Let blocks be allocated, named, registered, found and released."""
    answer = store.allocate(len(hashes))
    assert answer is not None
    store.stage(answer[0], hashes, hashes)
    store.register(answer[0])
    store.release(store.match(hashes))
    store.release(answer[0])
