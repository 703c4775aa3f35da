"""What a scrape says of the slab, the object store, pins and the estimates of routes."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import kvbm
from kvbm.metrics import METRICS, KvbmCollector, Reading, SlabReading
from kvbm.planner import RouteEstimate
from kvbm.planner.counters import PlannerStatistics
from kvbm.storage.disk.calls import OsCalls

MakeManager = Callable[..., kvbm.BlockManager]
Scrape = Callable[[KvbmCollector], Any]
NBYTES, SLOT_NBYTES = 256, 4096


def fill(manager: kvbm.BlockManager, first_token: int = 0, num_blocks: int = 3) -> Any:
    sequence = manager.sequence(range(first_token, first_token + 16 * num_blocks))
    manager.register_blocks(manager.allocate_blocks(num_blocks).complete(sequence.hashes)).release()
    manager.flush(60)
    return sequence.hashes


def rows_of(reading: Reading) -> dict[str, dict[tuple[str, ...], Any]]:
    return {metric.name: dict(metric.read(reading)) for metric in METRICS}


def test_slab_tells_bytes_with_padding_and_what_the_device_writes(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    fill(manager)
    samples, disk = scrape(KvbmCollector(manager)), manager.storage("disk")
    assert samples.value("kvbm_disk_written_bytes_total", tier="disk") == 3 * NBYTES
    assert samples.value("kvbm_disk_slot_bytes_total", tier="disk") == 3 * SLOT_NBYTES
    assert samples.value("kvbm_disk_slot_bytes_last_day", tier="disk") == 3 * SLOT_NBYTES
    assert samples.value("kvbm_disk_device_bytes_total", tier="disk") == disk.device_nbytes > 3 * SLOT_NBYTES  # type: ignore[attr-defined]
    names = {"engine": disk.engine_name, "io_mode": disk.io_mode}  # type: ignore[attr-defined]
    assert samples.value("kvbm_disk_engine_info", tier="disk", **names) == 1
    for name in ("sync_failures_total", "index_failures_total", "damaged_records"):
        assert samples.value(f"kvbm_disk_{name}", tier="disk") == 0


def test_failed_syncs_and_damaged_records_are_told(
    make_manager: MakeManager, scrape: Scrape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slab"
    manager = make_manager(disk_path=folder)
    fill(manager)
    manager.close()
    index = folder / "rank0.index"
    data = bytearray(index.read_bytes())
    record = next(place for place in range(len(data) - 64, 0, -64) if any(data[place : place + 64]))
    data[record + 3] ^= 1
    index.write_bytes(data)
    again = make_manager(disk_path=folder)
    collector = KvbmCollector(again)
    assert scrape(collector).value("kvbm_disk_damaged_records", tier="disk") == 1
    assert scrape(collector).value("kvbm_restored_blocks_total", tier="disk") == 2
    assert scrape(collector).value("kvbm_restored_blocks_total", tier="host") == 0
    assert scrape(collector).value("kvbm_disk_sync_failures_total", tier="disk") == 0

    def refuse(self: OsCalls, fd: int) -> None:
        raise OSError(errno.EIO, "no such luck")

    monkeypatch.setattr(OsCalls, "fdatasync", refuse)
    fill(again, 1000)
    again.storage("disk").sync()  # type: ignore[attr-defined]
    samples = scrape(collector)
    assert samples.value("kvbm_disk_sync_failures_total", tier="disk") >= 1
    assert samples.value("kvbm_disk_index_failures_total", tier="disk") >= 1


def test_object_store_tells_requests_and_that_it_is_there(
    make_manager: MakeManager, scrape: Scrape, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    manager = make_manager(host_blocks=0, disk_blocks=0, disk_path=None, remote_url=f"file://{tmp_path}/store")
    hashes = fill(manager)
    manager.reset_pool("device")
    manager.onboard(manager.match_sequence_hashes(hashes)).result(60).release()
    samples = scrape(KvbmCollector(manager))
    assert samples.value("kvbm_remote_written_blocks_total", tier="remote") == 3
    assert samples.value("kvbm_remote_written_bytes_total", tier="remote") == 3 * NBYTES
    assert samples.value("kvbm_remote_read_blocks_total", tier="remote") == 3
    assert samples.value("kvbm_remote_read_bytes_total", tier="remote") == 3 * NBYTES
    assert samples.value("kvbm_remote_requests_total", tier="remote") >= 6
    assert samples.value("kvbm_remote_is_available", tier="remote") == 1
    assert samples.value("kvbm_tier_is_away", tier="remote") == 0
    assert samples.value("kvbm_hit_blocks_total", tier="remote") == 3
    assert samples.value("kvbm_blocks_inactive", tier="remote") == 3
    with pytest.raises(KeyError):
        samples.value("kvbm_disk_slot_bytes_total", tier="disk")


def test_every_number_of_the_object_store_has_its_own_metric() -> None:
    from kvbm.storage.object_store import ObjectCounters

    numbers = [field.name for field in fields(ObjectCounters) if field.name != "last_error"]
    counters = ObjectCounters(**{name: 10 + place for place, name in enumerate(numbers)})
    reading = Reading({}, {}, PlannerStatistics(), {}, None, None, remote=counters, is_available=False)
    rows = rows_of(reading)
    told = {name: row[("remote",)] for name, row in rows.items() if name.startswith("kvbm_remote_")}
    assert told.pop("kvbm_remote_is_available") == 0
    assert sorted(told.values()) == [10 + place for place in range(len(numbers))]
    assert told["kvbm_remote_garbage_blocks"] == counters.num_garbage
    assert told["kvbm_remote_timeouts"] == counters.num_timeouts
    assert told["kvbm_remote_retries"] == counters.num_retries
    assert told["kvbm_remote_failures"] == counters.num_failures
    assert told["kvbm_remote_breaker_opens"] == counters.num_breaker_opens


def test_every_number_of_the_slab_has_its_own_metric() -> None:
    reading = Reading(
        {}, {}, PlannerStatistics(), {}, None, None, slab=SlabReading("uring", "direct", 1, 2, 3, 4, 5, 6)
    )
    rows = rows_of(reading)
    names = ("slot_bytes", "slot_bytes_last_day", "device_bytes", "sync_failures", "index_failures", "damaged_records")
    assert [rows[f"kvbm_disk_{name}"][("disk",)] for name in names] == [1, 2, 3, 4, 5, 6]
    assert rows["kvbm_disk_engine_info"] == {("disk", "uring", "direct"): 1}


def test_pins_are_told_by_tier_until_they_end(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    hashes = fill(manager)
    collector = KvbmCollector(manager)
    assert manager.pin(hashes[:2], ttl=1000) == 2
    samples = scrape(collector)
    assert (samples.value("kvbm_pinned_blocks", tier="device"), samples.value("kvbm_pinned_blocks", tier="host")) == (
        2,
        0,
    )
    assert manager.unpin() == 2
    assert scrape(collector).value("kvbm_pinned_blocks", tier="device") == 0


def test_what_a_prefetch_brings_counts_under_its_route(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    hashes = fill(manager)
    manager.reset_pool("device")
    manager.reset_pool("host")
    assert manager.prefetch(hashes).result(60) == 3
    assert manager.prefetch(hashes).rejected == 3
    samples = scrape(KvbmCollector(manager))
    assert samples.value("kvbm_onboard_blocks_total", source="disk", destination="host") == 3
    answers = ("accepted", "clipped", "rejected", "arrived")
    assert [samples.value("kvbm_prefetch_blocks_total", answer=answer) for answer in answers] == [3, 0, 3, 3]


def test_routes_have_estimates_once_they_were_measured(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    collector, route = KvbmCollector(manager), {"source": "device", "destination": "host"}
    with pytest.raises(KeyError):
        scrape(collector).value("kvbm_route_latency_seconds", **route)
    fill(manager)
    estimates = {(source.value, to.value): estimate for (source, to), estimate in manager.route_estimates().items()}
    samples, estimate = scrape(collector), estimates["device", "host"]
    assert samples.value("kvbm_route_latency_seconds", **route) == pytest.approx(estimate.latency_s)
    assert samples.value("kvbm_route_bytes_per_second", **route) == pytest.approx(estimate.bytes_per_s)
    assert samples.value("kvbm_route_measured_jobs_total", **route) == estimate.num_jobs >= 1


def test_an_estimate_and_a_tier_that_is_away_are_told_as_they_are() -> None:
    estimates = {("disk", "device"): RouteEstimate(0.5, 2e9, 7, time.monotonic())}
    reading = Reading({}, {}, PlannerStatistics(), {}, None, None, estimates=estimates, away={"remote": True})
    rows = rows_of(reading)
    assert rows["kvbm_route_latency_seconds"] == {("disk", "device"): 0.5}
    assert rows["kvbm_route_bytes_per_second"] == {("disk", "device"): 2e9}
    assert rows["kvbm_route_measured_jobs"] == {("disk", "device"): 7}
    assert rows["kvbm_tier_is_away"] == {("remote",): 1}
