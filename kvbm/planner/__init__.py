"""What moves where and when: offload, onboard, deadlines, policies. Bookkeeping only."""

from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.planner.hit import Hit
from kvbm.planner.limits import Limits
from kvbm.planner.planner import Planner
from kvbm.planner.policies import Candidates, OffloadPolicy
from kvbm.planner.thread import PlannerThread

__all__ = [
    "Candidates",
    "Hit",
    "Limits",
    "OffloadPolicy",
    "Planner",
    "PlannerStatistics",
    "PlannerThread",
    "RouteCounters",
]
