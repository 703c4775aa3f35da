"""Why blocks of a job failed, in one line: each reason once, in the order in which they came up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.jobs import Outcome


class Reasons:
    """Collects why blocks of one job failed.

    Parameters
    ----------
    late : str
        The reason of blocks that were not begun, or not awaited.
    """

    def __init__(self, late: str) -> None:
        self._late = late
        self._seen: dict[str, None] = {}

    def add(self, reason: str) -> None:
        """Note a reason; an empty one is none."""
        if reason:
            self._seen[reason] = None

    def text(self, outcomes: npt.NDArray[np.uint8]) -> str:
        """Give all reasons; that of late blocks is among them where there are any: (num_blocks,) `Outcome`."""
        if (outcomes == Outcome.LATE).any():
            self.add(self._late)
        return ", ".join(self._seen)


def text_of(error: Exception) -> str:
    """Give what an error says, or what it is where it says nothing."""
    return str(error) or repr(error)
