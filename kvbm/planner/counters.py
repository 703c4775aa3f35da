"""Plain counters that the planner keeps; statistics and metrics read copies of them.

The planner's lock guards them; nothing here locks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvbm.histogram import Histogram
from kvbm.types import Tier


@dataclass
class RouteCounters:
    """What moved from one tier to another.

    Attributes
    ----------
    blocks, nbytes : int
        That arrived whole.
    dropped : Counter of str
        Blocks that were not moved, by reason: "queue_full", "evicted", "orphaned", "no_room", "lost_events",
        "policy_failed", "write_budget", "executor_lost", "reset", "expiring", "away", "closed", and by outcome
        "late", "failed", "corrupt".
    present : int
        Blocks that were not moved because they were there, or on their way, already.
    queued, in_flight, draining : int
        Blocks that wait, that move, and that move although their time is over.
    seconds : dict of str to Histogram
        Times of jobs by outcome: "ok", "late", "failed", "corrupt".
    """

    blocks: int = 0
    nbytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    present: int = 0
    queued: int = 0
    in_flight: int = 0
    draining: int = 0
    seconds: dict[str, Histogram] = field(default_factory=dict)

    def observe(self, outcome: str, seconds: float) -> None:
        """Count a job's time."""
        if outcome not in self.seconds:
            self.seconds[outcome] = Histogram()
        self.seconds[outcome].observe(seconds)

    def copy(self) -> RouteCounters:
        """Give the counts of this moment."""
        return RouteCounters(
            blocks=self.blocks,
            nbytes=self.nbytes,
            dropped=Counter(self.dropped),
            present=self.present,
            queued=self.queued,
            in_flight=self.in_flight,
            draining=self.draining,
            seconds={outcome: times.copy() for outcome, times in self.seconds.items()},
        )


@dataclass
class PlannerStatistics:
    """What the planner did since the start.

    Attributes
    ----------
    hits : Counter of str
        Blocks found, by the tier they were found in.
    misses : int
        Blocks asked for that were in no tier, or behind one that was not.
    mismatches : Counter of str
        Blocks that did not match their checksum, by the tier they lay in.
    joined : int
        Blocks that an onboard or a prefetch found on their way already.
    expired : Counter of str
        Blocks that left a tier because nobody had used them for its time to live, by tier.
    restored : Counter of str
        Blocks that a tier held when the manager began, by tier.
    prefetched : Counter of str
        Blocks that prefetches were asked for: "accepted", "clipped", "rejected", and those that have "arrived".
    routes : dict of (Tier, Tier) to RouteCounters
    lost_executors : int
    """

    hits: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    mismatches: Counter[str] = field(default_factory=Counter)
    joined: int = 0
    expired: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    prefetched: Counter[str] = field(default_factory=Counter)
    routes: dict[tuple[Tier, Tier], RouteCounters] = field(default_factory=dict)
    lost_executors: int = 0

    def route(self, source: Tier, destination: Tier) -> RouteCounters:
        """Give the counters of a route, made when it is first used."""
        key = source, destination
        if key not in self.routes:
            self.routes[key] = RouteCounters()
        return self.routes[key]

    def copy(self) -> PlannerStatistics:
        """Give the counts of this moment."""
        return PlannerStatistics(
            hits=Counter(self.hits),
            misses=self.misses,
            mismatches=Counter(self.mismatches),
            joined=self.joined,
            expired=Counter(self.expired),
            restored=Counter(self.restored),
            prefetched=Counter(self.prefetched),
            routes={key: counters.copy() for key, counters in self.routes.items()},
            lost_executors=self.lost_executors,
        )
