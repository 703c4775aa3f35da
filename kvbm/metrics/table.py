"""What metrics there are: one table, from which the collector and the documentation are made.

Nothing is counted here, see `kvbm.metrics.reading`. Needs no prometheus-client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvbm.metrics.reading import Reading, SlabReading
from kvbm.planner import RouteEstimate
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.types import PoolStatus, Tier

_TIER = ("tier",)
_ROUTE = ("source", "destination")
_ANSWERS = ("accepted", "clipped", "rejected", "arrived")  # to a prefetch

Rows = Iterable[tuple[tuple[str, ...], Any]]  # label values, and a number or a Histogram


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


def _slab(read: Callable[[SlabReading], int]) -> Callable[[Reading], Rows]:
    return lambda reading: [] if reading.slab is None else [((Tier.DISK.value,), read(reading.slab))]


def _engine(reading: Reading) -> Rows:
    slab = reading.slab
    return [] if slab is None else [((Tier.DISK.value, slab.engine, slab.io_mode), 1)]


def _remote(name: str) -> Callable[[Reading], Rows]:
    return lambda reading: [] if reading.remote is None else [((Tier.REMOTE.value,), getattr(reading.remote, name))]


def _estimates(read: Callable[[RouteEstimate], float]) -> Callable[[Reading], Rows]:
    return lambda reading: [(route, read(estimate)) for route, estimate in reading.estimates.items()]


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
        "kvbm_onboard_blocks", "counter", _ROUTE, "blocks",
        "Blocks that arrived whole in the top tier, or in the host tier by a prefetch.",
        _routes(lambda counters: counters.blocks, down=False),
    ),
    Metric(
        "kvbm_onboard_bytes", "counter", _ROUTE, "bytes",
        "Bytes of blocks that arrived whole in the top tier, or in the host tier by a prefetch.",
        _routes(lambda counters: counters.nbytes, down=False),
    ),
    Metric(
        "kvbm_joined_blocks", "counter", (), "blocks",
        "Blocks that an onboard or a prefetch found on their way already and waited for.",
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
        "kvbm_expired_blocks", "counter", _TIER, "blocks",
        "Blocks that left a tier because nobody had used them for its time to live.",
        _tiers(lambda planner: planner.expired),
    ),
    Metric(
        "kvbm_restored_blocks", "counter", _TIER, "blocks", "Blocks that the tier held when the manager began.",
        _tiers(lambda planner: planner.restored),
    ),
    Metric(
        "kvbm_prefetch_blocks", "counter", ("answer",), "blocks",
        "Blocks that prefetches were asked for: accepted, clipped, rejected; and those of them that have arrived.",
        lambda reading: [((answer,), reading.planner.prefetched[answer]) for answer in _ANSWERS],
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
    Metric(
        "kvbm_disk_slot_bytes", "counter", _TIER, "bytes",
        "Bytes of slots written whole since the start, padding included.",
        _slab(lambda slab: slab.written_nbytes),
    ),
    Metric(
        "kvbm_disk_slot_bytes_last_day", "gauge", _TIER, "bytes",
        "Bytes of slots written whole in the last 24 hours, at most since the start.",
        _slab(lambda slab: slab.day_nbytes),
    ),
    Metric(
        "kvbm_disk_device_bytes", "counter", _TIER, "bytes",
        "Bytes that the device has written to its medium for those slots, estimated from its page size.",
        _slab(lambda slab: slab.device_nbytes),
    ),
    Metric(
        "kvbm_disk_engine_info", "gauge", (*_TIER, "engine", "io_mode"), "1",
        "Always 1: its labels name the engine that moves blocks, and how the data file is used.", _engine,
    ),
    Metric(
        "kvbm_disk_sync_failures", "counter", _TIER, "syncs",
        "Syncs of the data file that the system refused; what was written before may be lost in a power cut.",
        _slab(lambda slab: slab.num_sync_failures),
    ),
    Metric(
        "kvbm_disk_index_failures", "counter", _TIER, "writes and syncs",
        "Writes and syncs of the index that the system refused; a restart may miss those blocks.",
        _slab(lambda slab: slab.num_index_failures),
    ),
    Metric(
        "kvbm_disk_damaged_records", "gauge", _TIER, "records",
        "Records of the index that were not believed when the slab was opened; their blocks are misses.",
        _slab(lambda slab: slab.num_damaged),
    ),
    Metric(
        "kvbm_remote_read_blocks", "counter", _TIER, "blocks", "Blocks read from the object store.",
        _remote("num_reads"),
    ),
    Metric(
        "kvbm_remote_read_bytes", "counter", _TIER, "bytes", "Bytes of blocks read from there.",
        _remote("read_nbytes"),
    ),
    Metric(
        "kvbm_remote_written_blocks", "counter", _TIER, "blocks", "Blocks written to the object store.",
        _remote("num_writes"),
    ),
    Metric(
        "kvbm_remote_written_bytes", "counter", _TIER, "bytes", "Bytes of blocks written there.",
        _remote("written_nbytes"),
    ),
    Metric(
        "kvbm_remote_requests", "counter", _TIER, "requests", "Requests sent to the store, retries included.",
        _remote("num_requests"),
    ),
    Metric(
        "kvbm_remote_retries", "counter", _TIER, "requests", "Requests that were sent again.", _remote("num_retries"),
    ),
    Metric(
        "kvbm_remote_failures", "counter", _TIER, "requests", "Requests that failed, time-outs included.",
        _remote("num_failures"),
    ),
    Metric(
        "kvbm_remote_timeouts", "counter", _TIER, "requests", "Requests that were given up when their time was over.",
        _remote("num_timeouts"),
    ),
    Metric(
        "kvbm_remote_late_blocks", "counter", _TIER, "blocks", "Blocks that a transfer gave up at its deadline.",
        _remote("num_late"),
    ),
    Metric(
        "kvbm_remote_absent_blocks", "counter", _TIER, "blocks", "Blocks that were asked for and not there.",
        _remote("num_misses"),
    ),
    Metric(
        "kvbm_remote_garbage_blocks", "counter", _TIER, "blocks",
        "Objects under a right key that were not the block; each was a miss.", _remote("num_garbage"),
    ),
    Metric(
        "kvbm_remote_breaker_opens", "counter", _TIER, "openings",
        "Times that the store was given up for a while, after failures in a row.", _remote("num_breaker_opens"),
    ),
    Metric(
        "kvbm_remote_is_available", "gauge", _TIER, "0 or 1",
        "Whether the store is asked: 0 while the circuit breaker is open.",
        lambda reading: [] if reading.is_available is None else [((Tier.REMOTE.value,), int(reading.is_available))],
    ),
    Metric(
        "kvbm_tier_is_away", "gauge", _TIER, "0 or 1",
        "Whether requests leave a tier out because it could not be reached a short while ago.",
        lambda reading: [((tier,), int(is_away)) for tier, is_away in reading.away.items()],
    ),
    Metric(
        "kvbm_pinned_blocks", "gauge", _TIER, "blocks", "Blocks that a pin keeps where they are.",
        lambda reading: [((tier,), num_blocks) for tier, num_blocks in reading.pinned.items()],
    ),
    Metric(
        "kvbm_route_latency_seconds", "gauge", _ROUTE, "seconds",
        "Time of a job beside that of its bytes, as estimated from the jobs so far; absent before the first.",
        _estimates(lambda estimate: estimate.latency_s),
    ),
    Metric(
        "kvbm_route_bytes_per_second", "gauge", _ROUTE, "bytes a second",
        "Speed of a job's bytes, as estimated from the jobs so far; absent before the first.",
        _estimates(lambda estimate: estimate.bytes_per_s),
    ),
    Metric(
        "kvbm_route_measured_jobs", "counter", _ROUTE, "jobs", "Jobs that those estimates have learnt from.",
        _estimates(lambda estimate: estimate.num_jobs),
    ),
)  # fmt: skip
