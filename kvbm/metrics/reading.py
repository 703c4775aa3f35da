"""One look at a manager's counters: the plain ones that pools, planner and storages keep anyway.

Nothing is counted here; each counter is copied under the lock of whoever keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbm.histogram import Histogram
from kvbm.manager import BlockManager
from kvbm.planner import RouteEstimate
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.types import PoolStatus, Tier

_DEPTHS = {tier.value: depth for depth, tier in enumerate(Tier)}


@dataclass(frozen=True)
class SlabReading:
    """What a disk tier tells beside its counters.

    Attributes
    ----------
    engine, io_mode : str
        As `DiskStorage.engine_name` and `DiskStorage.io_mode`.
    written_nbytes, day_nbytes, device_nbytes : int
        Bytes of slots since it was opened and in the last 24 hours, and what the device wrote for those.
    num_sync_failures, num_index_failures : int
        Syncs of the data file, and writes and syncs of the index, that the system refused.
    num_damaged : int
        Records that were not believed at the opening.
    """

    engine: str
    io_mode: str
    written_nbytes: int = 0
    day_nbytes: int = 0
    device_nbytes: int = 0
    num_sync_failures: int = 0
    num_index_failures: int = 0
    num_damaged: int = 0

    @classmethod
    def of(cls, disk: Any) -> SlabReading:
        """Copy what a `DiskStorage` tells."""
        return cls(
            engine=disk.engine_name,
            io_mode=disk.io_mode,
            written_nbytes=disk.bytes_per_day.total_nbytes,
            day_nbytes=disk.bytes_per_day.nbytes,
            device_nbytes=disk.device_nbytes,
            num_sync_failures=disk.slab.num_sync_failures,
            num_index_failures=disk.slab.index.num_failures,
            num_damaged=disk.slab.index.num_damaged,
        )


@dataclass(frozen=True)
class Reading:
    """The counters of one manager, copied for one scrape.

    Attributes
    ----------
    pools : dict of str to PoolStatus
        By tier, from the top down.
    allocation_s : dict of str to Histogram
        Seconds of allocations, by tier.
    planner : PlannerStatistics
    block_nbytes : dict of str to int
        Bytes of a block, by tier.
    disk : object, optional
        `DiskCounters` of the disk tier; None without one.
    is_direct : bool, optional
        Whether the disk tier goes around the page cache; None without one.
    slab : SlabReading, optional
        What else the disk tier tells; None without one.
    remote : ObjectCounters, optional
        Of the object store; None without one.
    is_available : bool, optional
        Whether the object store is asked; None without one.
    away : dict of str to bool
        Whether each keyed tier is left out for a while.
    pinned : dict of str to int
        Pinned blocks, by tier.
    estimates : dict of (str, str) to RouteEstimate
        Of the routes that were measured.
    """

    pools: dict[str, PoolStatus]
    allocation_s: dict[str, Histogram]
    planner: PlannerStatistics
    block_nbytes: dict[str, int]
    disk: Any
    is_direct: bool | None
    slab: SlabReading | None = None
    remote: Any = None
    is_available: bool | None = None
    away: dict[str, bool] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    estimates: dict[tuple[str, str], RouteEstimate] = field(default_factory=dict)

    @classmethod
    def of(cls, manager: BlockManager) -> Reading:
        """Copy a manager's counters; a closed manager gives its last ones."""
        tiers = (manager.top, manager.host, manager.disk, manager.remote)
        pools = {pool.tier.value: pool for pool in tiers if pool is not None}
        storages = {tier: manager.storage(tier) for tier in pools}
        disk = storages.get(Tier.DISK.value)
        remote = storages.get(Tier.REMOTE.value)
        io_mode = getattr(disk, "io_mode", None)  # a storage of the user's own may stand in for the disk
        return cls(
            pools={tier: status for tier, status in manager.status().items() if tier in pools},
            allocation_s={tier: pool.allocation_times() for tier, pool in pools.items()},
            planner=manager.statistics(),
            block_nbytes={tier: storage.layout.block_nbytes for tier, storage in storages.items()},
            disk=getattr(disk, "counters", None),
            is_direct=None if io_mode is None else io_mode == "direct",
            slab=SlabReading.of(disk) if hasattr(disk, "slab") else None,
            remote=getattr(remote, "counters", None),
            is_available=getattr(remote, "is_available", None),
            away=manager.away_tiers,
            pinned={tier: manager.num_pinned(tier) for tier in pools},
            estimates={
                (source.value, to.value): estimate for (source, to), estimate in manager.route_estimates().items()
            },
        )

    def routes(self) -> dict[tuple[str, str], RouteCounters]:
        """Give the counters by route: each pair of neighbours downwards, and from every lower tier to the top."""
        tiers = list(self.pools)
        found = {(tier, tiers[0]): RouteCounters() for tier in tiers[1:]}
        found.update({(source.value, to.value): counters for (source, to), counters in self.planner.routes.items()})
        return found

    def is_offload(self, route: tuple[str, str]) -> bool:
        """Whether a route leads down."""
        source, destination = route
        return _DEPTHS[source] < _DEPTHS[destination]
