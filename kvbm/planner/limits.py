"""Every bound of the planner, in one place and with a name."""

from __future__ import annotations

from dataclasses import dataclass

from kvbm.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What may wait, move and take time at once.

    Attributes
    ----------
    queue_blocks : int
        Offloads of one route that may wait; more are dropped and counted.
    job_blocks : int
        Blocks of one job.
    route_jobs : int
        Jobs of one route that move or wait for the executor at once: enough to keep it busy, so that a job's time is
        its own.
    in_flight_share : float
        Part of a pool that offloads of one route, or prefetches into it, may hold.
    pin_share : float
        Part of a pool that may be pinned.
    prefetch_blocks : int
        Blocks that prefetches may bring at once.
    onboard_timeout_s, offload_timeout_s : float
        Seconds a job may take before its waiter gives up, and before it counts as draining.
    lineage_blocks : int
        Hashes remembered to keep the parents of a block younger than the block in lower tiers.
    probe_blocks : int
        Blocks of one request that a keyed tier is asked for at first; as long as all are there, for twice as many next.
    absent_blocks : int
        Blocks remembered as absent in a keyed tier.
    absent_s : float
        Seconds until an absent block is asked for again.
    known_s : float
        Seconds until a block that was there is asked for again.
    away_s : float
        Seconds that a tier which cannot be reached is left alone.
    touch_calls : int
        Hits whose recency waits to be told to lower tiers; the oldest are forgotten.
    """

    queue_blocks: int = 8192
    job_blocks: int = 64
    route_jobs: int = 4
    in_flight_share: float = 0.25
    pin_share: float = 0.25
    prefetch_blocks: int = 1024
    onboard_timeout_s: float = 30.0
    offload_timeout_s: float = 30.0
    lineage_blocks: int = 1 << 18
    touch_calls: int = 4096
    probe_blocks: int = 64
    absent_blocks: int = 1 << 16
    absent_s: float = 10.0
    known_s: float = 6 * 3600.0
    away_s: float = 5.0

    def __post_init__(self) -> None:
        for name in (
            "queue_blocks",
            "job_blocks",
            "route_jobs",
            "lineage_blocks",
            "touch_calls",
            "prefetch_blocks",
            "probe_blocks",
            "absent_blocks",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, give 1 or more")
        for name in ("onboard_timeout_s", "offload_timeout_s", "absent_s", "known_s", "away_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, give more than 0 seconds")
        for name in ("in_flight_share", "pin_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, give a part of a pool, in (0, 1]")
