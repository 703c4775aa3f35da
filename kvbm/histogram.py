"""A histogram of plain counters, in the form that Prometheus reads: buckets by upper bound, sum, count.

It does not lock: its owner calls `observe` under a lock of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SHORT_BOUNDS_S = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1)
LONG_BOUNDS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)


class Histogram:
    """Counts observations by size.

    Parameters
    ----------
    bounds : sequence of float
        Upper bounds of the buckets, rising; a last one without bound is added.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LONG_BOUNDS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self.counts)

    def copy(self) -> Histogram:
        """Give the counts of this moment."""
        other = Histogram(self.bounds)
        other.counts = list(self.counts)
        other.total = self.total
        return other

    def cumulative(self) -> list[tuple[str, float]]:
        """Give (upper bound as text, values at or under it) for each bucket, ``+Inf`` last."""
        rows, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            rows.append((bound, float(so_far)))
        return rows

    def quantile(self, q: float) -> float:
        """Give the upper bound of the bucket that the q-th part of the values lies in; 0 without values."""
        wanted, so_far = q * self.count, 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            so_far += count
            if count and so_far >= wanted:
                return bound
        return 0.0
