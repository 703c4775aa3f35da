"""Finalisers, generators and signals that come in the middle of a call lose nothing and hang nothing."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep

from kvbm._backend import Backend
from kvbm.eviction import FifoPolicy

pytestmark = pytest.mark.timeout(120, method="thread")


class CollectingPolicy(FifoPolicy):
    """Runs the garbage collector inside a store call."""

    def inserted(self, ids: Any, hashes: Any, priorities: Any) -> None:
        super().inserted(ids, hashes, priorities)
        gc.collect()


def _suspended(pool: Any, make: Any) -> None:
    """Leave a generator that holds something of the pool to the garbage collector."""

    def request() -> Generator[None, Any, None]:
        cycle = yield
        with make(pool):
            while True:
                yield cycle

    generator = request()
    next(generator)
    generator.send([generator])


def test_a_suspended_request_collected_inside_a_store_call_gives_its_blocks_back(make_pool: MakePool) -> None:
    pool = make_pool(8, policy=CollectingPolicy())
    gc.disable()
    try:
        _suspended(pool, lambda pool: pool.allocate_blocks(3))
        keep(pool, [1])
    finally:
        gc.enable()
    assert pool.status().free == 7
    pool.check()


def test_a_subscription_closed_by_the_collector_inside_a_store_call_hangs_nothing(make_pool: MakePool) -> None:
    pool = make_pool(8, policy=CollectingPolicy())
    gc.disable()
    try:
        _suspended(pool, lambda pool: pool.subscribe_events())
        keep(pool, [1])
    finally:
        gc.enable()
    keep(pool, [2])
    assert not pool._hub.dropped, "the outbox has learnt of it"
    with pool.subscribe_events() as events:
        keep(pool, [3])
        assert len(events.poll()) == 1


def test_subscriptions_closed_by_the_collector_while_another_is_read_hang_nothing(make_pool: MakePool) -> None:
    class Reader:
        def __init__(self, pool: Any) -> None:
            self.me = self
            self.events = pool.subscribe_events()

        def __del__(self) -> None:
            self.events.close()

    pool = make_pool(64)
    thresholds = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    try:
        with pool.subscribe_events(kinds=["deleted"]) as events:
            for i in range(1_000):
                Reader(pool)
                keep(pool, [2 * i, 2 * i + 1])
                events.poll()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    pool.status()
    assert len(pool._hub._subscriptions) <= 2_000
    keep(pool, [5_000])
    with pool.subscribe_events() as events:
        events.poll()
        assert len(pool._hub._subscriptions) == 1, "those that are gone were forgotten"


def test_a_signal_between_any_two_lines_leaves_the_store_usable(backend: Backend) -> None:
    is_armed = False
    num_raised = 0

    def interrupt(number: int, frame: Any) -> None:
        if is_armed:
            raise KeyboardInterrupt

    store = backend.store(64)
    waits = np.random.default_rng(0).uniform(2e-5, 2e-4, 400).tolist()
    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        for wait_s in waits:
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, wait_s)
                while True:
                    store.counts()
            except KeyboardInterrupt:
                is_armed = False
                num_raised += 1
            assert store.counts()["free"] == 64
    finally:
        is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert num_raised == len(waits)


def test_a_failed_transition_with_nonsense_loses_no_block(make_pool: MakePool) -> None:
    pool, other = make_pool(6), make_pool(2)
    blocks = pool.allocate_blocks(4)
    for nonsense in (1.5, "a", None):
        with pytest.raises(TypeError):
            blocks.split(nonsense)  # type: ignore[arg-type]
    for mask in ([True], np.ones(4), np.ones((2, 2), dtype=bool)):
        with pytest.raises(IndexError):
            blocks.partition(mask)  # type: ignore[arg-type]
    for parent in (b"12345678", b"x" * 24, np.zeros(2, dtype=np.uint64)):
        with pytest.raises((TypeError, ValueError)):
            blocks.complete(hashes_of(range(4)), parent=parent)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        blocks.block_ids[:] = 0
    published = pool.register_blocks(blocks.complete(hashes_of(range(4))))
    with pytest.raises(RuntimeError, match="discards its own ImmutableBlocks"):
        other.discard_blocks(published)
    published.release()
    assert (pool.status().inactive, pool.status().free) == (4, 2)
    pool.check()


def test_a_block_held_twice_or_by_two_is_discarded_once(make_pool: MakePool) -> None:
    pool = make_pool(2)
    keep(pool, [1])
    twice = pool.match_sequence_hashes(hashes_of([1, 1]))
    other = pool.match_sequence_hashes(hashes_of([1]))
    assert (len(twice), len(other)) == (2, 1)
    pool.discard_blocks(twice)
    pool.discard_blocks(other)
    assert pool.lookup(hashes_of([1])).tolist() == [-1]
    twice.release()
    other.release()
    assert pool.status().free == 2
    pool.check()
