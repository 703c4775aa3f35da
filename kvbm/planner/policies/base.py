"""The contract of an offload policy.

The planner calls a policy under its lock, in batches, with hashes and priorities only. A policy keeps what it likes,
within bounds, and never calls back. One that raises, or answers with another length, offloads nothing of that batch;
the failure is logged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray, Tier


@dataclass(frozen=True)
class Candidates:
    """Blocks that could go to the tier below.

    Attributes
    ----------
    source, destination : Tier
    hashes, parents : (num_blocks, 2) uint64
    priorities : (num_blocks,) uint8
        0 to 100; higher is kept longer.
    """

    source: Tier
    destination: Tier
    hashes: HashArray
    parents: HashArray
    priorities: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.hashes)


class OffloadPolicy(ABC):
    """Decides which blocks go to the tier below; one instance a route."""

    @abstractmethod
    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose among blocks that were just registered above: (num_blocks,) bool."""

    def used(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose among registered blocks that were just found by a request; none unless overridden."""
        return np.zeros(len(blocks), dtype=np.bool_)

    @property
    def counts_uses(self) -> bool:
        """Whether `used` is to be asked, which costs every request a little; by default where it is overridden."""
        return type(self).used is not OffloadPolicy.used

    def prioritised(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose among registered blocks that were given another priority; none unless overridden."""
        return np.zeros(len(blocks), dtype=np.bool_)

    def afford(self, num_blocks: int) -> int:
        """Say how many of the blocks that are about to be written may be; all unless overridden.

        Asked when a job is made, of blocks chosen before that do not lie below. The leading ones are written, the
        others are dropped, counted as ``write_budget``.
        """
        return num_blocks
