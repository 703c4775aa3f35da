"""The groups of a model's layers that share block ids: which blocks of a prefix each needs, and has.

A full group needs every block of a prefix, a window group those that its last window covers. A hit is the longest
prefix that suits all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.engines.step_channel import StepChannels
from kvbm.planner import ForeignTier, Planner
from kvbm.planner.hit import find_sources
from kvbm.types import HashArray, Tier

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """One group of layers.

    Attributes
    ----------
    planner : Planner
        Over this group's own tiers; made with a foreign tier.
    channels : StepChannels
        That it sends through.
    block_nbytes : int
        On one rank; 0 where it is not known, and loading is always taken for sooner than computing.
    window_blocks : int
        Blocks that a window covers at most; 0 where every block is needed.
    null_slot : int
        What the engine names where a request has no block; -1 where it never does.
    """

    planner: Planner
    channels: StepChannels
    block_nbytes: int = 0
    window_blocks: int = 0
    null_slot: int = -1

    @property
    def foreign(self) -> ForeignTier:
        """The engine's memory."""
        assert self.planner.foreign is not None, "made with a foreign tier"
        return self.planner.foreign

    def first_needed(self, num_computed: int, num_blocks: int) -> int:
        """Give the first block that is to be loaded for a prefix of so many, the first ones being computed."""
        return num_computed if not self.window_blocks else max(num_computed, num_blocks - self.window_blocks)

    def where(self, hashes: HashArray) -> tuple[list[Tier], npt.NDArray[np.int8]]:
        """Tell in which tier each block lies, -1 where in none; holds nothing and changes no recency."""
        pools = self.planner.usable_pools()
        where, _ = find_sources(pools, hashes)
        return [pool.tier for pool in pools], where


def longest_hit(groups: Sequence[Group], present: Sequence[Mask], num_computed: int, most: int) -> int:
    """Give the longest prefix, in blocks, that every group can bring.

    Parameters
    ----------
    groups : sequence of Group
    present : sequence of (num_blocks,) bool
        For each group which blocks it has; those before `num_computed` are not looked at.
    num_computed, most : int
        Blocks that the engine has, and at most can use.

    Returns
    -------
    int
        `num_computed` or more; equal to it where nothing can be brought.
    """
    length = max(num_computed, most)
    while length > num_computed:
        shorter = length
        for group, has in zip(groups, present, strict=True):
            shorter = min(shorter, _fits(group, has, num_computed, shorter))
        if shorter == length:
            return length
        length = shorter
    return num_computed


def _fits(group: Group, has: Mask, num_computed: int, most: int) -> int:
    """Give the longest prefix of at most `most` blocks that one group can bring."""
    missing = np.flatnonzero(~has[num_computed:most]) + num_computed
    if not len(missing):
        return most
    if not group.window_blocks:
        return int(missing[0])
    num_missing = np.concatenate([[0], np.cumsum(~has[num_computed:most])])  # before each end
    first = np.maximum(0, np.arange(len(num_missing)) - group.window_blocks)
    (ends,) = (num_missing == num_missing[first]).nonzero()
    return num_computed + int(ends[-1])
