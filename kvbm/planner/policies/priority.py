"""Only blocks that somebody called important enough go down."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.policies.base import Candidates, OffloadPolicy
from kvbm.types import MAX_PRIORITY


class PriorityPolicy(OffloadPolicy):
    """Offloads blocks of at least a priority, when they are registered with it or raised to it.

    Parameters
    ----------
    min_priority : int
        0 to 100; the default is one above what blocks have by default.
    """

    def __init__(self, min_priority: int = 51) -> None:
        if not 0 <= min_priority <= MAX_PRIORITY:
            raise ConfigError(f"min_priority is {min_priority}, give 0..{MAX_PRIORITY}")
        self.min_priority = min_priority

    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those that are important enough."""
        return np.asarray(blocks.priorities >= self.min_priority)

    def prioritised(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those that are important enough by now."""
        return self.registered(blocks)
