"""What moves where and when: offload, onboard, deadlines, policies. Bookkeeping only."""

from kvbm.planner.advice import Advice, LoadRun
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.planner.estimates import RouteEstimate
from kvbm.planner.foreign import EngineCopy, ForeignTier
from kvbm.planner.hit import Hit
from kvbm.planner.limits import Limits
from kvbm.planner.planner import Planner
from kvbm.planner.policies import Candidates, OffloadPolicy
from kvbm.planner.prefetch import Prefetch
from kvbm.planner.steps import PlannerSteps
from kvbm.planner.thread import PlannerThread

__all__ = [
    "Advice",
    "Candidates",
    "EngineCopy",
    "ForeignTier",
    "Hit",
    "Limits",
    "LoadRun",
    "OffloadPolicy",
    "Planner",
    "PlannerStatistics",
    "PlannerSteps",
    "PlannerThread",
    "Prefetch",
    "RouteCounters",
    "RouteEstimate",
]
