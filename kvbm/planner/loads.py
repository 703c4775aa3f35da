"""What is noted of each job that moves blocks, and of each part of a hit before anything is done for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.jobs import CopyJob
from kvbm.planner.counters import RouteCounters
from kvbm.planner.hit import HitPart
from kvbm.planner.onboarding import Onboarding
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Places


@dataclass
class OffloadLoad:
    """One open job that offloads blocks, and what it holds."""

    source: ImmutableBlocks
    target: MutableBlocks
    hashes: HashArray
    parents: HashArray
    priorities: npt.NDArray[np.uint8]
    before: HashArray  # the blocks above those, as far as they are known
    keys: list[bytes]
    seq: int
    unwanted: set[bytes] = field(default_factory=set)  # forgotten below meanwhile


@dataclass
class Load:
    """One open job that loads blocks; its sources are held by its owner."""

    pool: BlockPool  # that the sources lie in
    counters: RouteCounters
    ids: IdArray
    hashes: HashArray
    parents: HashArray
    priorities: npt.NDArray[np.uint8]
    target: MutableBlocks
    owner: Onboarding
    places: Places
    sent_at: float
    job: CopyJob | None = None
    is_leaving: bool = False  # about to be revoked: not to be joined
    is_forgotten: bool = False  # not to be joined, nor stored when it arrives
    joined: list[tuple[Onboarding, Places, Places]] = field(default_factory=list)  # whose, its places, indices here

    @property
    def waiting(self) -> list[Onboarding]:
        """Whose onboardings need this job."""
        return [self.owner, *(other for other, _, _ in self.joined)]


@dataclass
class LoadPlan:
    """What must be done for one part of a hit, before anything is."""

    part: HitPart
    hashes: HashArray
    indices: Places  # into the part: to be loaded
    joins: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # job -> (place, index in that job)
    relays: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # job of the feeder -> (index, index there)

    @property
    def num_slots(self) -> int:
        """Slots in the top tier that it takes."""
        return len(self.indices) + sum([len(pairs) for pairs in self.relays.values()])
