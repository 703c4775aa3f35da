"""Benchmark of identity: the chain of block hashes, and tokens through a TokenSequence.

The reference of each row is the pure twin (hashlib) in the same run, its repeats interleaved with the measured ones, so
that a change of the machine's speed meets both. One thread, blocks of 16 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvbm._backend import Backend, default_backend, load_backend
from kvbm.sequence import TokenSequence

BLOCK_SIZE = 16
NUM_BLOCKS = 4096
NUM_REPEATS = 15


def run() -> list[dict[str, Any]]:
    """Measure and give one row each for ``blake2b`` and ``sequence_extend``.

    Returns
    -------
    list of dict
        name; unit "ns/block"; median; spread ([10th, 90th percentile]); reference (median of the pure twin); ratio
        (reference / median: how many times faster than the pure twin).
    """
    tokens = np.random.default_rng(0).integers(0, 2**32, NUM_BLOCKS * BLOCK_SIZE, dtype=np.uint32)
    key, parent = bytes(range(32)), bytes(16)

    def chain(backend: Backend) -> None:
        backend.hash_blocks(key, parent, tokens, BLOCK_SIZE)

    def extend(backend: Backend) -> None:
        TokenSequence(block_size=BLOCK_SIZE, backend=backend).extend(tokens)

    return [_row("blake2b", chain), _row("sequence_extend", extend)]


def _row(name: str, work: Callable[[Backend], None]) -> dict[str, Any]:
    measured, pure = default_backend(), load_backend("pure")
    for backend in (measured, pure):
        work(backend)  # touches memory, fills caches
    times = np.array([[_ns_per_block(work, measured), _ns_per_block(work, pure)] for _ in range(NUM_REPEATS)])
    median, reference = np.median(times, axis=0)
    return {
        "name": name,
        "unit": "ns/block",
        "median": float(median),
        "spread": np.percentile(times[:, 0], [10, 90]).tolist(),
        "reference": float(reference),
        "ratio": float(reference / median),
    }


def _ns_per_block(work: Callable[[Backend], None], backend: Backend) -> float:
    start = time.perf_counter_ns()
    work(backend)
    return (time.perf_counter_ns() - start) / NUM_BLOCKS
