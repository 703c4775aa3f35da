"""The store and the pool: time a block and memory a block, native against pure in the same run.

``life`` is everything that happens to a block in steady state: allocate under eviction, stage, register, match, release
twice, in batches of 128. ``scattered`` means that blocks lie at random places in the order of eviction.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvbm._backend import Backend, default_backend, load_backend
from kvbm.pool import BlockPool
from kvbm.types import HashArray

_BATCH = 128


def run(*, num_blocks: int = 1_000_000, num_calls: int = 3000, backend: Backend | None = None) -> list[dict[str, Any]]:
    """Measure the store.

    Parameters
    ----------
    num_blocks : int
        Size of the pools.
    num_calls : int
        Batches measured; the pure twin gets a tenth of both, which favours it.
    backend : Backend, optional
        The twin to measure; None measures the one in use.

    Returns
    -------
    list of dict
        A row a case: name, unit, median, spread ([p10, p90]), reference (the pure twin's median in the same run) and
        ratio (reference / median: how many times faster).
    """
    twin = default_backend() if backend is None else backend
    pure = load_backend("pure")
    rows = []
    for name, unit, measure in (
        ("life", "ns/block", _life),
        ("life_scattered", "ns/block", _life_scattered),
        ("pool_life", "ns/block", _pool_life),
        ("match_release_128", "us/call", _match_release),
    ):
        times = measure(twin, num_blocks, num_calls)
        reference = measure(pure, max(_BATCH * 8, num_blocks // 10), max(30, num_calls // 10))
        rows.append(_row(name, unit, times, float(np.median(reference))))
    return rows + _memory(twin)


def _row(name: str, unit: str, values: Any, reference: float | None) -> dict[str, Any]:
    median = float(np.median(values))
    return {
        "name": name,
        "unit": unit,
        "median": median,
        "spread": [float(value) for value in np.percentile(values, [10, 90])],
        "reference": reference,
        "ratio": None if reference is None else reference / median,
    }


def _life(backend: Backend, num_blocks: int, num_calls: int) -> Any:
    return _store_life(backend, num_blocks, num_calls, is_scattered=False)


def _life_scattered(backend: Backend, num_blocks: int, num_calls: int) -> Any:
    return _store_life(backend, num_blocks, num_calls, is_scattered=True)


def _store_life(backend: Backend, num_blocks: int, num_calls: int, *, is_scattered: bool) -> Any:
    rng = np.random.default_rng(1)
    store = backend.store(num_blocks)
    answer = store.allocate(num_blocks)
    assert answer is not None, "a new store has all its blocks"
    ids, hashes = answer[0], _hashes(rng, num_blocks)
    store.stage(ids, hashes, hashes)
    store.register(ids)
    store.release(rng.permutation(num_blocks).astype(np.int32) if is_scattered else ids)

    def step(batch: HashArray) -> None:
        taken = store.allocate(_BATCH)
        assert taken is not None, "everything is inactive"
        store.stage(taken[0], batch, batch)
        store.register(taken[0])
        store.match(batch)
        store.release(taken[0])
        store.release(taken[0])

    return _times([_hashes(rng, _BATCH) for _ in range(num_calls)], step) / _BATCH


def _pool_life(backend: Backend, num_blocks: int, num_calls: int) -> Any:
    rng = np.random.default_rng(2)
    pool = BlockPool(num_blocks, backend=backend)
    pool.register_blocks(pool.allocate_blocks(num_blocks).complete(_hashes(rng, num_blocks))).release()
    events = pool.subscribe_events()

    def step(batch: HashArray) -> None:
        fresh = pool.register_blocks(pool.allocate_blocks(_BATCH).complete(batch))
        pool.match_sequence_hashes(batch).release()
        fresh.release()
        events.poll_rows()

    return _times([_hashes(rng, _BATCH) for _ in range(num_calls)], step) / _BATCH


def _match_release(backend: Backend, num_blocks: int, num_calls: int) -> Any:
    """Match requests of 128 blocks at random places again, each as a whole; microseconds a call."""
    rng = np.random.default_rng(3)
    pool = BlockPool(num_blocks, backend=backend)
    hashes = _hashes(rng, num_blocks)
    pool.register_blocks(pool.allocate_blocks(num_blocks).complete(hashes)).release()
    places = rng.permutation(num_blocks)[: num_blocks // _BATCH * _BATCH].reshape(-1, _BATCH)
    requests = [np.ascontiguousarray(hashes[place]) for place in places]

    def step(batch: HashArray) -> None:
        pool.match_sequence_hashes(batch).release()

    for request in requests:
        step(request)
    order = rng.permutation(len(requests))
    return _times([requests[order[i % len(order)]] for i in range(num_calls)], step) / 1000


def _memory(backend: Backend, num_blocks: int = 10_000_000) -> list[dict[str, Any]]:
    """Create a store of ten million blocks and use every one of them."""
    rng = np.random.default_rng(4)
    slices = [np.empty((_BATCH * 64, 2), dtype=np.uint64) for _ in range(2)]  # no memory taken while measuring
    if backend.name == "pure":
        return []  # records appear when a block is used: its size says nothing
    before = _resident_nbytes()
    began = time.perf_counter()
    store = backend.store(num_blocks)
    created_s = time.perf_counter() - began
    for _ in range(num_blocks // len(slices[0])):
        slices[0][:] = rng.integers(0, 1 << 63, slices[0].shape, dtype=np.uint64)
        taken = store.allocate(len(slices[0]))
        assert taken is not None, "the store is not full yet"
        store.stage(taken[0], slices[0], slices[0])
        store.register(taken[0])
        store.release(taken[0])
    used = (_resident_nbytes() - before) / num_blocks
    return [_row("memory_10m", "bytes/block", [used], None), _row("create_10m", "s", [created_s], None)]


def _resident_nbytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123  (a file of the kernel's)
        return int(statm.read().split()[1]) * resource.getpagesize()


def _hashes(rng: np.random.Generator, n: int) -> HashArray:
    return rng.integers(0, 1 << 63, (n, 2), dtype=np.uint64)


def _times(batches: list[HashArray], step: Callable[[HashArray], None]) -> Any:
    """Nanoseconds of each step."""
    times = np.empty(len(batches))
    for i, batch in enumerate(batches):
        batch.sum()  # hashes come into the cache, as they are when a request has just been hashed
        began = time.perf_counter_ns()
        step(batch)
        times[i] = time.perf_counter_ns() - began
    return times
