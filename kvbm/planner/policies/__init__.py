"""Offload policies: which blocks go to the tier below, one policy a file."""

from kvbm.planner.policies.always import AlwaysPolicy
from kvbm.planner.policies.base import Candidates, OffloadPolicy
from kvbm.planner.policies.budget import WriteBudget
from kvbm.planner.policies.priority import PriorityPolicy
from kvbm.planner.policies.second_use import SecondUsePolicy
from kvbm.planner.policies.tinylfu import TinyLfuPolicy

__all__ = [
    "AlwaysPolicy",
    "Candidates",
    "OffloadPolicy",
    "PriorityPolicy",
    "SecondUsePolicy",
    "TinyLfuPolicy",
    "WriteBudget",
]
