"""The index of hashes under load: nothing is lost or doubled where many hashes want the same place."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from kvbm._backend import load_backend
from kvbm.types import HashArray

has_native = importlib.util.find_spec("kvbm._native.store") is not None
BACKENDS = ["pure", pytest.param("native", marks=pytest.mark.skipif(not has_native, reason="the pure package"))]


def _random(rng: np.random.Generator, n: int) -> HashArray:
    return rng.integers(0, 1 << 64, (n, 2), dtype=np.uint64, endpoint=False)


def _counting(rng: np.random.Generator, n: int) -> HashArray:
    first = int(rng.integers(0, 1 << 40))
    return np.stack([np.arange(first, first + n, dtype=np.uint64), np.zeros(n, dtype=np.uint64)], axis=1)


def _fill(store: Any, hashes: HashArray) -> np.ndarray[Any, Any]:
    ids, _ = store.allocate(len(hashes))
    store.stage(ids, hashes, hashes)
    store.register(ids)
    store.release(ids)
    return np.asarray(ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [_random, _counting])
def test_index_finds_every_hash_of_a_pool_that_turned_over_many_times(backend: str, draw: Any) -> None:
    rng = np.random.default_rng(7)
    store = load_backend(backend).store(6000)  # some buckets of the native index overflow
    hash_to_id: dict[bytes, int] = {}
    for _ in range(40):
        hashes = draw(rng, 1000)
        taken = store.allocate(1000)
        assert taken is not None
        ids, evicted = taken
        for name in evicted:
            del hash_to_id[name.tobytes()]
        store.stage(ids, hashes, hashes)
        store.register(ids)
        store.release(ids)
        hash_to_id.update((name.tobytes(), int(block_id)) for name, block_id in zip(hashes, ids, strict=True))
        gone = [np.frombuffer(name, dtype=np.uint64) for name in list(hash_to_id)[::97]]
        store.remove(np.array(gone))
        for name in gone:
            del hash_to_id[name.tobytes()]
        store.check()
        known = np.array([np.frombuffer(name, dtype=np.uint64) for name in hash_to_id])
        assert store.find(known).tolist() == list(hash_to_id.values())
        assert (store.find(draw(rng, 500)) == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 8, 9, 15, 16, 17, 31, 64])
def test_index_holds_a_full_pool_of_any_size(backend: str, num_blocks: int) -> None:
    rng = np.random.default_rng(num_blocks)
    store = load_backend(backend).store(num_blocks)
    for _ in range(5):
        hashes = _random(rng, num_blocks)
        ids = _fill(store, hashes)
        assert store.find(hashes).tolist() == ids.tolist()
        assert store.match(hashes).tolist() == ids.tolist()
        store.release(ids)
        store.check()


def _bucket(name: int, num_buckets: int) -> int:
    """Where the native index begins to look for the hash (name, 0)."""
    mixed = name ^ (name >> 32)
    mixed = mixed * 0xD6E8FEB86659FD93 & (1 << 64) - 1
    mixed ^= mixed >> 29
    return (mixed >> 32) * num_buckets >> 32


def _named(names: list[int]) -> HashArray:
    return np.array([[name, 0] for name in names], dtype=np.uint64).reshape(-1, 2)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_blocks", [23, 1000])
def test_index_says_that_a_hash_is_absent_when_entries_went_past_every_bucket(backend: str, num_blocks: int) -> None:
    num_buckets, num_slots = num_blocks // 8 + 1, 15
    by_bucket: dict[int, list[int]] = {bucket: [] for bucket in range(num_buckets)}
    name = 0
    while min(map(len, by_bucket.values())) < 40:
        name += 1
        by_bucket[_bucket(name, num_buckets)].append(name)
    store = load_backend(backend).store(num_blocks)
    kept: list[int] = []
    for bucket, names in by_bucket.items():
        filling = [names.pop() for _ in range(num_slots - (1 if kept else 0))]
        _fill(store, _named(filling))
        kept.append(names.pop())  # goes past this bucket, and stays where it is when the others leave
        _fill(store, _named(kept[-1:]))
        if bucket < num_buckets - 1:
            store.remove(_named(filling))
        store.check()
    absent = [names[0] for names in by_bucket.values()]
    assert (store.find(_named(absent)) == -1).all()
    assert (store.find(_named(kept)) >= 0).all()
    assert len(store.match(_named(absent))) == 0
    _fill(store, _named(absent[:2]))
    store.remove(_named(kept))
    store.check()
