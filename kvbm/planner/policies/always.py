"""Write through: every block goes down as soon as it is registered."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.planner.policies.base import Candidates, OffloadPolicy


class AlwaysPolicy(OffloadPolicy):
    """Offloads everything: the default, because a block that was not saved is a prefill to be done again."""

    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose all."""
        return np.ones(len(blocks), dtype=np.bool_)
