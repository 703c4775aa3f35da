"""What metrics there are: one table, from which the collector and the documentation are made.

Nothing is counted here: a `Reading` copies the plain counters that pools, planner and disk tier keep anyway, each under
the lock of whoever keeps it. Needs no prometheus-client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvbm.histogram import Histogram
from kvbm.manager import BlockManager
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.types import PoolStatus, Tier

_TIER = ("tier",)
_ROUTE = ("source", "destination")
_DEPTHS = {tier.value: depth for depth, tier in enumerate(Tier)}

Rows = Iterable[tuple[tuple[str, ...], Any]]  # label values, and a number or a Histogram


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
    """

    pools: dict[str, PoolStatus]
    allocation_s: dict[str, Histogram]
    planner: PlannerStatistics
    block_nbytes: dict[str, int]
    disk: Any
    is_direct: bool | None

    @classmethod
    def of(cls, manager: BlockManager) -> Reading:
        """Copy a manager's counters; a closed manager gives its last ones."""
        pools = {pool.tier.value: pool for pool in (manager.top, manager.host, manager.disk) if pool is not None}
        storages = {tier: manager.storage(tier) for tier in pools}
        disk = storages.get(Tier.DISK.value)
        io_mode = getattr(disk, "io_mode", None)  # a storage of the user's own may stand in for the disk
        return cls(
            pools={tier: status for tier, status in manager.status().items() if tier in pools},
            allocation_s={tier: pool.allocation_times() for tier, pool in pools.items()},
            planner=manager.statistics(),
            block_nbytes={tier: storage.layout.block_nbytes for tier, storage in storages.items()},
            disk=getattr(disk, "counters", None),
            is_direct=None if io_mode is None else io_mode == "direct",
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


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, what it means, and where it is read.

    Attributes
    ----------
    name : str
        Of the family; a counter's samples end in ``_total``, see `sample_name`.
    kind : str
        "gauge", "counter", "histogram", or "unknown": a counter whose sample has exactly the family's name.
    labels : tuple of str
        Beside ``worker_id``, which all have.
    unit : str
    text : str
        What it counts, one sentence.
    read : callable
        Gives label values and numbers, from a `Reading`.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    unit: str
    text: str
    read: Callable[[Reading], Rows]

    @property
    def sample_name(self) -> str:
        """What a query asks for; a histogram adds ``_bucket``, ``_sum`` and ``_count``."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _pools(read: Callable[[PoolStatus], int]) -> Callable[[Reading], Rows]:
    return lambda reading: [((tier,), read(status)) for tier, status in reading.pools.items()]


def _routes(
    read: Callable[[RouteCounters], int], *, down: bool | None = None
) -> Callable[[Reading], list[tuple[tuple[str, ...], Any]]]:
    """Read a number of each route, or only of those that lead down or up."""
    return lambda reading: [
        (route, read(counters))
        for route, counters in reading.routes().items()
        if down is None or reading.is_offload(route) is down
    ]


def _tiers(read: Callable[[PlannerStatistics], dict[str, int]]) -> Callable[[Reading], Rows]:
    return lambda reading: [((tier,), read(reading.planner).get(tier, 0)) for tier in reading.pools]


def _disk(name: str) -> Callable[[Reading], Rows]:
    return lambda reading: [] if reading.disk is None else [((Tier.DISK.value,), getattr(reading.disk, name))]


def _drops(reading: Reading) -> Rows:
    for route, counters in reading.routes().items():
        for reason, num_blocks in sorted(counters.dropped.items()):
            yield (*route, reason), num_blocks


def _times(reading: Reading) -> Rows:
    for route, counters in reading.routes().items():
        for outcome, seconds in sorted(counters.seconds.items()):
            yield (*route, outcome), seconds


METRICS: tuple[Metric, ...] = (
    Metric(
        "kvbm_blocks_allocated", "gauge", _TIER, "blocks",
        "Blocks in use: being filled, complete, or held by a request or a move.",
        _pools(lambda status: status.mutable + status.complete + status.active),
    ),
    Metric(
        "kvbm_blocks_inactive", "gauge", _TIER, "blocks",
        "Blocks that are cached and held by nobody: to be found again or evicted.",
        _pools(lambda status: status.inactive),
    ),
    Metric(
        "kvbm_blocks_free", "gauge", _TIER, "blocks",
        "Blocks that hold nothing; an allocation can have these and the inactive ones.",
        _pools(lambda status: status.free),
    ),
    Metric(
        "kvbm_blocks_capacity", "gauge", _TIER, "blocks", "Blocks of the pool: allocated + inactive + free.",
        _pools(lambda status: status.total_blocks),
    ),
    Metric(
        "kvbm_block_size_bytes", "gauge", _TIER, "bytes", "Bytes of one block.",
        lambda reading: [((tier,), nbytes) for tier, nbytes in reading.block_nbytes.items()],
    ),
    Metric(
        "kvbm_allocation_latency", "histogram", _TIER, "seconds",
        "Times of allocations that got their blocks: with eviction, without waiting for others to release.",
        lambda reading: [((tier,), times) for tier, times in reading.allocation_s.items()],
    ),
    Metric(
        "kvbm_eviction_count", "unknown", _TIER, "blocks",
        "Blocks evicted to make room: kvbm_evictions_total under a name without a suffix.",
        _pools(lambda status: status.evictions),
    ),
    Metric(
        "kvbm_evictions", "counter", _TIER, "blocks", "Blocks evicted to make room.",
        _pools(lambda status: status.evictions),
    ),
    Metric(
        "kvbm_registered_blocks", "counter", _TIER, "blocks", "Blocks registered, so that others find them.",
        _pools(lambda status: status.registered_total),
    ),
    Metric(
        "kvbm_folded_blocks", "counter", _TIER, "blocks",
        "Blocks registered whose hash the tier had already; they gave way to the block there.",
        _pools(lambda status: status.folded_total),
    ),
    Metric(
        "kvbm_hit_blocks", "counter", _TIER, "blocks",
        "Blocks that the manager's match found, by the tier they lay in.",
        _tiers(lambda planner: planner.hits),
    ),
    Metric(
        "kvbm_miss_blocks", "counter", (), "blocks",
        "Blocks asked of the manager's match that were in no tier, or behind one that was not.",
        lambda reading: [((), reading.planner.misses)],
    ),
    Metric(
        "kvbm_offload_blocks", "counter", _ROUTE, "blocks", "Blocks that arrived whole in the tier below.",
        _routes(lambda counters: counters.blocks, down=True),
    ),
    Metric(
        "kvbm_offload_bytes", "counter", _ROUTE, "bytes", "Bytes of blocks that arrived whole in the tier below.",
        _routes(lambda counters: counters.nbytes, down=True),
    ),
    Metric(
        "kvbm_onboard_blocks", "counter", _ROUTE, "blocks", "Blocks that arrived whole in the top tier.",
        _routes(lambda counters: counters.blocks, down=False),
    ),
    Metric(
        "kvbm_onboard_bytes", "counter", _ROUTE, "bytes", "Bytes of blocks that arrived whole in the top tier.",
        _routes(lambda counters: counters.nbytes, down=False),
    ),
    Metric(
        "kvbm_joined_blocks", "counter", (), "blocks",
        "Blocks that an onboard found on their way already and waited for.",
        lambda reading: [((), reading.planner.joined)],
    ),
    Metric(
        "kvbm_present_blocks", "counter", _ROUTE, "blocks",
        "Blocks not offloaded because they were below, or on their way there, already.",
        _routes(lambda counters: counters.present, down=True),
    ),
    Metric(
        "kvbm_dropped_blocks", "counter", (*_ROUTE, "reason"), "blocks",
        "Blocks that were not moved, by reason.", _drops,
    ),
    Metric(
        "kvbm_queued_blocks", "gauge", _ROUTE, "blocks", "Blocks that wait to be offloaded.",
        _routes(lambda counters: counters.queued, down=True),
    ),
    Metric(
        "kvbm_in_flight_blocks", "gauge", _ROUTE, "blocks", "Blocks that are being moved.",
        _routes(lambda counters: counters.in_flight),
    ),
    Metric(
        "kvbm_draining_blocks", "gauge", _ROUTE, "blocks",
        "Blocks in flight whose time is over, but whose bytes may still move.",
        _routes(lambda counters: counters.draining),
    ),
    Metric(
        "kvbm_transfer_seconds", "histogram", (*_ROUTE, "outcome"), "seconds",
        "Times of transfer jobs, by the worst outcome among their blocks.", _times,
    ),
    Metric(
        "kvbm_checksum_mismatches", "counter", _TIER, "blocks",
        "Blocks that did not match their checksum, by the tier they lay in; each was discarded.",
        _tiers(lambda planner: planner.mismatches),
    ),
    Metric(
        "kvbm_lost_executors", "counter", (), "executors",
        "Executors that are gone; without one of them only the top tier is used.",
        lambda reading: [((), reading.planner.lost_executors)],
    ),
    Metric("kvbm_disk_read_blocks", "counter", _TIER, "blocks", "Blocks read from the data file.", _disk("num_reads")),
    Metric("kvbm_disk_read_bytes", "counter", _TIER, "bytes", "Bytes of blocks read from there.", _disk("read_nbytes")),
    Metric(
        "kvbm_disk_written_blocks", "counter", _TIER, "blocks",
        "Blocks written to the data file.", _disk("num_writes"),
    ),
    Metric(
        "kvbm_disk_written_bytes", "counter", _TIER, "bytes",
        "Bytes of blocks written there.", _disk("written_nbytes"),
    ),
    Metric(
        "kvbm_disk_failed_blocks", "counter", _TIER, "blocks", "Blocks that could not be read or written.",
        _disk("num_failures"),
    ),
    Metric(
        "kvbm_disk_is_direct", "gauge", _TIER, "0 or 1", "Whether the data file is used around the page cache.",
        lambda reading: [] if reading.is_direct is None else [((Tier.DISK.value,), int(reading.is_direct))],
    ),
)  # fmt: skip
