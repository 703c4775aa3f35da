"""Records of bounded size: when they are full, every other entry goes, and from then on fewer come in.

They do not lock: the report that owns them does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


class Samples:
    """Times of one call, evenly picked from all of them where there are too many.

    Parameters
    ----------
    max_samples : int
    """

    def __init__(self, max_samples: int = 1 << 17) -> None:
        self._max_samples = max_samples
        self._every = 1  # one of so many is kept
        self._values: list[int] = []
        self.count = 0  # seen

    def add(self, value: int) -> None:
        """Take one value, or pass it by."""
        if self.count % self._every == 0:
            self._values.append(value)
            if len(self._values) >= self._max_samples:
                self._values = self._values[::2]
                self._every *= 2
        self.count += 1

    def values(self) -> npt.NDArray[np.int64]:
        """Give what was kept: (num_kept,) int64."""
        return np.array(self._values, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Point:
    """Where a replay stood: running totals, and blocks that hold something, by the tier's name."""

    requests: int
    seconds: float
    blocks: int
    hits: dict[str, int]
    occupied: dict[str, int]


@dataclass
class Series:
    """Points over the run, at most `max_points`.

    Attributes
    ----------
    points : list of Point
        In order; the gaps between them grow with the run.
    """

    max_points: int = 1000
    points: list[Point] = field(default_factory=list)
    _every: int = 1  # requests between points

    def is_due(self, num_requests: int) -> bool:
        """Whether a point should be taken after so many requests."""
        return num_requests % self._every == 0

    def add(self, point: Point) -> None:
        """Take a point; points may come out of order from several threads."""
        if self.points and point.requests <= self.points[-1].requests:
            return
        if len(self.points) >= self.max_points:
            self.points = self.points[1::2]
            self._every *= 2
        self.points.append(point)

    def to_dict(self) -> dict[str, object]:
        """Give the points as columns."""
        tiers = list(self.points[-1].occupied) if self.points else []
        return {
            "requests": [point.requests for point in self.points],
            "seconds": [point.seconds for point in self.points],
            "blocks": [point.blocks for point in self.points],
            "hits": {tier: [point.hits.get(tier, 0) for point in self.points] for tier in tiers},
            "occupied": {tier: [point.occupied[tier] for point in self.points] for tier in tiers},
        }
