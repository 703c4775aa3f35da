"""What a scrape says is what the manager counted, under the names that were promised."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import ModuleType
from typing import Any

import pytest

import kvbm
from kvbm.histogram import Histogram
from kvbm.metrics import METRICS, KvbmCollector, Reading
from kvbm.planner.counters import PlannerStatistics, RouteCounters
from kvbm.storage import HostStorage
from kvbm.testing.faults import FaultMode, FaultPlan, FaultyStorage
from kvbm.types import Tier

MakeManager = Callable[..., kvbm.BlockManager]
Scrape = Callable[[KvbmCollector], Any]
NBYTES = 256


def serve(manager: kvbm.BlockManager, first_token: int, num_blocks: int = 3) -> None:
    """Do what a request does: find what is cached, fill the rest, let go."""
    sequence = manager.sequence(range(first_token, first_token + 16 * num_blocks))
    with manager.onboard(manager.match_sequence_hashes(sequence.hashes)).result(60) as found:
        fresh = manager.try_allocate_blocks(num_blocks - len(found))
        if fresh is not None and len(fresh):
            parent = sequence.hashes[len(found) - 1].tobytes() if len(found) else None
            manager.register_blocks(fresh.complete(sequence.hashes[len(found) :], parent=parent)).release()


def test_names_of_the_requirements_are_there_exactly(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    serve(manager, 0)
    manager.flush(60)
    samples = scrape(KvbmCollector(manager))
    assert samples.value("kvbm_blocks_allocated", tier="device") == 0
    assert samples.value("kvbm_blocks_free", tier="device") == 5
    assert samples.value("kvbm_eviction_count", tier="device") == 0
    assert samples.value("kvbm_allocation_latency_count", tier="device") == 1
    assert samples.value("kvbm_allocation_latency_bucket", tier="device", le="+Inf") == 1


def test_both_formats_have_every_family_of_the_table(make_manager: MakeManager, prometheus: ModuleType) -> None:
    manager = make_manager()
    serve(manager, 0)
    from prometheus_client.openmetrics import exposition as open_metrics
    from prometheus_client.openmetrics import parser as open_metrics_parser
    from prometheus_client.parser import text_string_to_metric_families

    registry = prometheus.CollectorRegistry()
    KvbmCollector(manager).register(registry)
    plain = {
        family.name: family for family in text_string_to_metric_families(prometheus.generate_latest(registry).decode())
    }
    text = open_metrics.generate_latest(registry).decode()
    opened = {family.name: family for family in open_metrics_parser.text_string_to_metric_families(text)}
    for families in (plain, opened):
        assert set(families) == {metric.name for metric in METRICS}
        for metric in METRICS:
            family = families[metric.name]
            assert family.type == metric.kind
            assert family.documentation == metric.text
            labels = {"worker_id", *metric.labels} | ({"le"} if metric.kind == "histogram" else set())
            for sample in family.samples:
                assert set(sample.labels) in (labels, labels - {"le"})
                assert sample.name.startswith(metric.sample_name)


def test_figures_of_three_tiers_are_those_of_the_statistics(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    for turn in (0, 1000, 2000, 3000, 4000, 0, 1000, 2000):
        serve(manager, turn)
        manager.flush(60)
    samples, status, statistics = scrape(KvbmCollector(manager)), manager.status(), manager.statistics()
    for tier, pool in status.items():
        assert samples.value("kvbm_blocks_allocated", tier=tier) == pool.mutable + pool.complete + pool.active
        assert samples.value("kvbm_blocks_inactive", tier=tier) == pool.inactive
        assert samples.value("kvbm_blocks_free", tier=tier) == pool.free
        assert samples.value("kvbm_blocks_capacity", tier=tier) == pool.total_blocks
        assert samples.value("kvbm_block_size_bytes", tier=tier) == NBYTES
        assert samples.value("kvbm_eviction_count", tier=tier) == pool.evictions
        assert samples.value("kvbm_evictions_total", tier=tier) == pool.evictions
        assert samples.value("kvbm_registered_blocks_total", tier=tier) == pool.registered_total
        assert samples.value("kvbm_hit_blocks_total", tier=tier) == statistics.hits[tier]
        assert samples.value("kvbm_checksum_mismatches_total", tier=tier) == 0
    assert status["device"].evictions > 0
    assert samples.value("kvbm_miss_blocks_total") == statistics.misses == 15
    assert sum(statistics.hits.values()) == 9
    for source, destination in ((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK)):
        route, counters = (
            {"source": source.value, "destination": destination.value},
            statistics.routes[source, destination],
        )
        assert samples.value("kvbm_offload_blocks_total", **route) == counters.blocks == 15
        assert samples.value("kvbm_offload_bytes_total", **route) == counters.nbytes == 15 * NBYTES
        assert samples.value("kvbm_present_blocks_total", **route) == counters.present
        assert samples.value("kvbm_queued_blocks", **route) == samples.value("kvbm_in_flight_blocks", **route) == 0
        times = counters.seconds["ok"]
        assert samples.value("kvbm_transfer_seconds_count", **route, outcome="ok") == times.count > 0
        assert samples.value("kvbm_transfer_seconds_sum", **route, outcome="ok") == pytest.approx(times.total)
    up = [(source, to) for source, to in statistics.routes if to is Tier.DEVICE]
    assert up
    for source, to in up:
        route = {"source": source.value, "destination": to.value}
        assert samples.value("kvbm_onboard_blocks_total", **route) == statistics.routes[source, to].blocks > 0
        assert samples.value("kvbm_onboard_bytes_total", **route) == statistics.routes[source, to].blocks * NBYTES
    assert samples.value("kvbm_disk_written_blocks_total", tier="disk") == 15
    assert samples.value("kvbm_disk_written_bytes_total", tier="disk") == 15 * NBYTES
    assert samples.value("kvbm_disk_failed_blocks_total", tier="disk") == 0
    assert samples.value("kvbm_disk_is_direct", tier="disk") in (0, 1)


def test_routes_have_their_zeros_before_anything_moves(make_manager: MakeManager, scrape: Scrape) -> None:
    samples = scrape(KvbmCollector(make_manager()))
    for name in ("blocks", "bytes"):
        assert samples.value(f"kvbm_offload_{name}_total", source="device", destination="host") == 0
        assert samples.value(f"kvbm_offload_{name}_total", source="host", destination="disk") == 0
        assert samples.value(f"kvbm_onboard_{name}_total", source="host", destination="device") == 0
        assert samples.value(f"kvbm_onboard_{name}_total", source="disk", destination="device") == 0
    assert samples.value("kvbm_lost_executors_total") == samples.value("kvbm_joined_blocks_total") == 0


def test_one_tier_has_no_routes(make_manager: MakeManager, scrape: Scrape) -> None:
    samples = scrape(KvbmCollector(make_manager(host_blocks=0, disk_blocks=0, disk_path=None)))
    assert {dict(labels).get("tier") for _, labels in samples} == {None, "device"}
    assert not [labels for _, labels in samples if "source" in dict(labels)]


def test_counters_never_go_down(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    collector = KvbmCollector(manager)
    before = scrape(collector)
    for turn in (0, 1000, 2000, 0, 3000, 4000, 5000, 1000):
        serve(manager, turn)
        if turn == 3000:
            manager.flush(60)
            manager.reset_all()
        after = scrape(collector)
        assert not after.lower_than(before)
        before = after


def test_histogram_of_allocations_adds_up(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager(host_blocks=0, disk_blocks=0, disk_path=None)
    for n in (1, 2, 8, 0):
        manager.allocate_blocks(n).release()
    with manager.allocate_blocks(8):
        assert manager.try_allocate_blocks(1) is None  # no success, not counted
    samples = scrape(KvbmCollector(manager))
    buckets = [number for (name, labels), number in samples.items() if name == "kvbm_allocation_latency_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == samples.value("kvbm_allocation_latency_count", tier="device") == 5
    times = manager.top.allocation_times()
    assert samples.value("kvbm_allocation_latency_sum", tier="device") == pytest.approx(times.total)
    assert [count for _, count in times.cumulative()] == buckets


def faulty_host(make_manager: MakeManager, plan: FaultPlan) -> tuple[kvbm.BlockManager, FaultyStorage]:
    layout = kvbm.BlockLayout.fully_contiguous(
        num_blocks=16, num_layers=1, outer_dim=2, block_size=16, inner_dim=8, dtype="uint8"
    )
    storage = FaultyStorage(HostStorage(layout), plan)
    tiers = {"device_blocks": 0, "host_blocks": 0, "disk_blocks": 0, "disk_path": None}
    return make_manager(**tiers, storages={Tier.DEVICE: HostStorage(layout), Tier.HOST: storage}), storage


def test_failed_copy_counts_no_blocks_and_no_bytes(make_manager: MakeManager, scrape: Scrape) -> None:
    manager, _ = faulty_host(make_manager, FaultPlan([FaultMode.FAIL, None], affects="all", on="write"))
    collector, route = KvbmCollector(manager), {"source": "device", "destination": "host"}
    serve(manager, 0)
    manager.flush(60)
    samples = scrape(collector)
    assert samples.value("kvbm_offload_blocks_total", **route) == 0
    assert samples.value("kvbm_offload_bytes_total", **route) == 0
    assert samples.value("kvbm_dropped_blocks_total", **route, reason="failed") == 3
    assert samples.value("kvbm_transfer_seconds_count", **route, outcome="failed") == 1
    serve(manager, 1000)
    manager.flush(60)
    samples = scrape(collector)
    assert samples.value("kvbm_offload_blocks_total", **route) == 3
    assert samples.value("kvbm_offload_bytes_total", **route) == 3 * NBYTES
    assert samples.value("kvbm_dropped_blocks_total", **route, reason="failed") == 3
    assert samples.value("kvbm_transfer_seconds_count", **route, outcome="ok") == 1


def test_corrupt_block_counts_as_a_mismatch_and_brings_no_bytes(make_manager: MakeManager, scrape: Scrape) -> None:
    manager, _ = faulty_host(make_manager, FaultPlan([FaultMode.FLIP], affects="one", on="read"))
    serve(manager, 0)
    manager.flush(60)
    manager.reset_pool("device")
    hashes = manager.sequence(range(48)).hashes
    manager.onboard(manager.match_sequence_hashes(hashes)).result(60).release()
    samples, route = scrape(KvbmCollector(manager)), {"source": "host", "destination": "device"}
    assert samples.value("kvbm_checksum_mismatches_total", tier="host") == 1
    assert samples.value("kvbm_onboard_blocks_total", **route) == 2
    assert samples.value("kvbm_onboard_bytes_total", **route) == 2 * NBYTES
    assert samples.value("kvbm_dropped_blocks_total", **route, reason="corrupt") == 1
    assert samples.value("kvbm_hit_blocks_total", tier="host") == 3


def test_what_moves_is_in_flight_until_it_has_arrived(make_manager: MakeManager, scrape: Scrape) -> None:
    manager, storage = faulty_host(make_manager, FaultPlan([FaultMode.DELAY], on="write"))
    collector, route = KvbmCollector(manager), {"source": "device", "destination": "host"}
    serve(manager, 0)
    assert storage.wait_until_held(1)
    samples = scrape(collector)
    assert samples.value("kvbm_in_flight_blocks", **route) == 3
    assert samples.value("kvbm_blocks_allocated", tier="host") == 3
    assert samples.value("kvbm_offload_blocks_total", **route) == 0
    storage.release()
    manager.flush(60)
    samples = scrape(collector)
    assert samples.value("kvbm_in_flight_blocks", **route) == 0
    assert samples.value("kvbm_offload_blocks_total", **route) == 3


def test_every_number_of_the_planner_has_its_own_metric() -> None:
    times = Histogram((1.0,))
    times.observe(0.5)
    down = RouteCounters(blocks=1, nbytes=2, present=3, queued=4, in_flight=5, draining=6, seconds={"late": times})
    down.dropped["queue_full"] = 7
    up = RouteCounters(blocks=8, nbytes=9, in_flight=10, draining=11)
    routes = {(Tier.DEVICE, Tier.HOST): down, (Tier.HOST, Tier.DEVICE): up}
    planner = PlannerStatistics(misses=12, joined=13, lost_executors=14, routes=routes)
    reading = Reading({}, {}, planner, {}, None, None)
    rows = {metric.name: dict(metric.read(reading)) for metric in METRICS}
    there, back = ("device", "host"), ("host", "device")
    assert rows["kvbm_offload_blocks"] == {there: 1}
    assert rows["kvbm_offload_bytes"] == {there: 2}
    assert rows["kvbm_present_blocks"] == {there: 3}
    assert rows["kvbm_queued_blocks"] == {there: 4}
    assert rows["kvbm_in_flight_blocks"] == {there: 5, back: 10}
    assert rows["kvbm_draining_blocks"] == {there: 6, back: 11}
    assert rows["kvbm_transfer_seconds"] == {(*there, "late"): times}
    assert rows["kvbm_dropped_blocks"] == {(*there, "queue_full"): 7}
    assert rows["kvbm_onboard_blocks"] == {back: 8}
    assert rows["kvbm_onboard_bytes"] == {back: 9}
    assert [rows[f"kvbm_{name}"][()] for name in ("miss_blocks", "joined_blocks", "lost_executors")] == [12, 13, 14]


def test_scrape_while_threads_work_is_whole_and_rising(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    collector, is_over = KvbmCollector(manager), Event()

    def work(seed: int) -> int:
        for turn in range(60):
            serve(manager, 1000 * ((turn * 7 + seed) % 11), num_blocks=1)
        return 60

    def watch() -> int:
        before, num_scrapes = scrape(collector), 0
        while not is_over.is_set():
            after = scrape(collector)
            assert not after.lower_than(before)
            capacity = after.value("kvbm_blocks_capacity", tier="device")
            states = ("kvbm_blocks_allocated", "kvbm_blocks_inactive", "kvbm_blocks_free")
            assert sum(after.value(name, tier="device") for name in states) == capacity
            before, num_scrapes = after, num_scrapes + 1
        return num_scrapes

    with ThreadPoolExecutor(4) as threads:
        watching = threads.submit(watch)
        try:
            served = sum(threads.map(work, range(3)))
        finally:
            is_over.set()
        assert watching.result(60) > 0
    manager.flush(60)
    samples = scrape(collector)
    hits = sum(samples.value("kvbm_hit_blocks_total", tier=tier) for tier in ("device", "host", "disk"))
    assert hits + samples.value("kvbm_miss_blocks_total") == served == 180
    manager.check()
