"""Copies between host blocks, with and without checksums, against libc memcpy of the same pairs in the same run.

Two pools of 1 GiB each, every page touched, paired at random, one thread. Rounds of ours and of memcpy take turns, so
that a noisy minute hits both.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend

Words = npt.NDArray[np.uint64]

_ALIGNMENT = 1 << 21  # a huge page, as host storage is aligned
_ROUNDS = 7
_CASES = (
    ("copy_1m", 1 << 20, False),
    ("copy_64k", 64 << 10, False),
    ("copy_1m_checksum", 1 << 20, True),
    ("copy_64k_checksum", 64 << 10, True),
)


def run(*, nbytes: int = 1 << 30, rounds: int = _ROUNDS, backend: Backend | None = None) -> list[dict[str, Any]]:
    """Measure copies of random block pairs.

    Parameters
    ----------
    nbytes : int
        Bytes copied a round, and the size of each of the two pools; 1 MiB or more.
    rounds : int
        Measured rounds of each side, after one that is thrown away.
    backend : Backend, optional
        The twin to measure; None measures the one in use.

    Returns
    -------
    list of dict
        A row a case: name, unit (GB/s of bytes copied), median, spread ([p10, p90]), reference (median of memcpy) and
        ratio (median / reference).
    """
    backend = default_backend() if backend is None else backend
    pools = [np.full(nbytes + _ALIGNMENT, fill, dtype=np.uint8) for fill in (1, 2)]
    bases = [pool.ctypes.data + -pool.ctypes.data % _ALIGNMENT for pool in pools]
    rng = np.random.default_rng(7)
    rows: list[dict[str, Any]] = []
    for name, block_nbytes, is_checked in _CASES:
        num_blocks = nbytes // block_nbytes
        sources, destinations = (
            np.uint64(base) + rng.permutation(num_blocks).astype(np.uint64) * np.uint64(block_nbytes) for base in bases
        )
        hashes = rng.integers(0, 1 << 64, (num_blocks, 2), dtype=np.uint64) if is_checked else None
        ours, reference = _take_turns(
            _our_copy(backend, sources, destinations, block_nbytes, hashes),
            _reference_copy(backend, sources, destinations, block_nbytes),
            rounds=rounds,
        )
        speeds = num_blocks * block_nbytes / 1e9 / np.array([ours, reference])
        median, reference_median = np.median(speeds, axis=1)
        rows.append(
            {
                "name": name,
                "unit": "GB/s",
                "median": float(median),
                "spread": [float(value) for value in np.percentile(speeds[0], [10, 90])],
                "reference": float(reference_median),
                "ratio": float(median / reference_median),
            }
        )
    return rows


def _our_copy(
    backend: Backend, sources: Words, destinations: Words, nbytes: int, hashes: Words | None
) -> Callable[[], object]:
    pieces = np.zeros(1, dtype=np.uint64)
    return lambda: backend.copy_blocks(sources, destinations, pieces, pieces, nbytes, hashes=hashes)


def _reference_copy(backend: Backend, sources: Words, destinations: Words, nbytes: int) -> Callable[[], object]:
    """Give a loop of memcpy: the native one where there is one, else libc's through ctypes (a call a block)."""
    if backend.memcpy_blocks is not None:
        memcpy_blocks = backend.memcpy_blocks
        pieces = np.zeros(1, dtype=np.uint64)
        return lambda: memcpy_blocks(sources, destinations, pieces, pieces, nbytes)
    pairs = list(zip(destinations.tolist(), sources.tolist(), strict=True))

    def loop() -> None:
        for destination, source in pairs:
            ctypes.memmove(destination, source, nbytes)

    return loop


def _take_turns(
    ours: Callable[[], object], reference: Callable[[], object], *, rounds: int
) -> tuple[list[float], list[float]]:
    """Time both in turn; one round of each is thrown away."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for taken, call in zip(times, (ours, reference), strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return times[0][1:], times[1][1:]
