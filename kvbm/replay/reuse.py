"""How much a cache of each size would hit: LRU stack distances of a whole trace at once (Mattson et al., 1970).

Under LRU a block is cached in a tier of C blocks exactly when fewer than C other blocks were used since it was. A block
of a request is a hit when it and all before it are cached, so its reach is the largest depth up to it. Depths are
counted with a wavelet matrix (Claude, Navarro, 2012): numpy passes over all blocks, one for each bit of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReuseCurve:
    """Hit rate against capacity.

    Attributes
    ----------
    reaches : (num_reused,) int64
        Rising: the smallest capacity at which each reused block of the trace is a hit.
    num_blocks : int
        Of all requests.
    min_capacity : int
        Blocks of the largest request: below it requests would be refused, and the curve says nothing.
    num_unique : int
        Different blocks: with so many, nothing is ever evicted.
    """

    reaches: Numbers
    num_blocks: int
    min_capacity: int
    num_unique: int

    def hit_rates(self, capacities: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Give the share of blocks that are hits at these capacities: float64, of their shape."""
        hits = np.searchsorted(self.reaches, np.asarray(capacities, dtype=np.int64), side="right")
        rates: npt.NDArray[np.float64] = hits / max(1, self.num_blocks)
        return rates


def reuse_curve(requests: Sequence[HashArray]) -> ReuseCurve:
    """Compute the curve of a trace, exactly, for a cache that each request enters tail first.

    Parameters
    ----------
    requests : sequence of (num_blocks, 2) uint64
        Block hashes of each request, in order.

    Notes
    -----
    Takes O(n log n) time for n blocks in all.
    """
    lengths = np.array([len(hashes) for hashes in requests], dtype=np.int64)
    total = int(lengths.sum())
    if not total:
        return ReuseCurve(np.empty(0, dtype=np.int64), 0, 0, 0)
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)  # of each block's request
    # Tail first: the block at place i of a request that spans [start, end) is used at time start + end - 1 - i.
    times = starts + np.repeat(ends, lengths) - 1 - np.arange(total)
    names = np.empty(total, dtype=np.int64)
    names[times] = _number(np.concatenate(requests))
    before = _previous(names)  # by time; -1 at the first use
    last = before[times]  # by place: the last use before the request
    while (is_own := last >= starts).any():  # a hash that repeats within a request
        last[is_own] = before[last[is_own]]
    is_reused = last >= 0
    depths = np.full(total, total + 1, dtype=np.int64)
    lows, highs = last[is_reused] + 1, starts[is_reused]
    # Blocks used in [low, high): each is counted where it was used first since `last`, so its own use before is older.
    depths[is_reused] = 1 + _count_below(before + 1, lows, highs, lows)
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        np.maximum.accumulate(depths[start:end], out=depths[start:end])
    reaches = np.sort(depths[depths <= total])
    return ReuseCurve(reaches, total, int(lengths.max()), int(names.max()) + 1)


def _number(hashes: HashArray) -> Numbers:
    """Give equal hashes equal numbers from 0 up."""
    keys = np.ascontiguousarray(hashes).view([("low", np.uint64), ("high", np.uint64)]).reshape(-1)
    _, numbers = np.unique(keys, return_inverse=True)
    return numbers.reshape(-1).astype(np.int64)


def _previous(names: Numbers) -> Numbers:
    """Give for each time the last time before it with the same name, -1 where there is none."""
    order = np.argsort(names, kind="stable")
    before = np.full(len(names), -1, dtype=np.int64)
    is_again = names[order][1:] == names[order][:-1]
    before[order[1:][is_again]] = order[:-1][is_again]
    return before


def _count_below(values: Numbers, lows: Numbers, highs: Numbers, bounds: Numbers) -> Numbers:
    """Count the i in [low, high) with values[i] <= bound, for each low, high and bound."""
    bounds = bounds + 1  # values[i] < bound
    lows, highs, counts = lows.copy(), highs.copy(), np.zeros(len(lows), dtype=np.int64)
    for bit in reversed(range(int(max(values.max(), bounds.max(initial=0))).bit_length())):
        is_one = (values >> bit) & 1
        zeros = np.concatenate([[0], np.cumsum(1 - is_one)])  # before each place
        low_zeros, high_zeros = zeros[lows], zeros[highs]
        goes_up = (bounds >> bit) & 1 == 1
        counts += np.where(goes_up, high_zeros - low_zeros, 0)
        lows = np.where(goes_up, zeros[-1] + lows - low_zeros, low_zeros)
        highs = np.where(goes_up, zeros[-1] + highs - high_zeros, high_zeros)
        values = np.concatenate([values[is_one == 0], values[is_one == 1]])
    return counts
