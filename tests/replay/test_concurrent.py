"""Requests at once: their order, their room, and that nothing is lost or left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.errors import ConfigError, NotEnoughBlocksAvailable
from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, TraceRequest, replay_concurrently
from kvbm.replay.report import Served
from kvbm.replay.request import serve
from kvbm.types import HashArray


def make_manager(backend: Backend, path: Path | None = None, *, device: int = 60, host: int = 150) -> BlockManager:
    return BlockManager(
        num_layers=1,
        outer_dim=1,
        page_size=16,
        inner_dim=16,
        dtype="uint8",
        device_blocks=device,
        host_blocks=host,
        disk_blocks=400 if path else 0,
        disk_path=path,
        model="replay",
        backend=backend,
    )


def chains(num_requests: int, *, seed: int = 0, num_sessions: int = 12) -> list[TraceRequest]:
    rng = np.random.default_rng(seed)
    histories: list[HashArray] = [np.arange(6, dtype=np.uint64).reshape(3, 2)] * num_sessions
    requests = []
    for i in range(num_requests):
        session = int(rng.integers(num_sessions))
        fresh = rng.integers(0, 2**63, (int(rng.integers(1, 4)), 2), dtype=np.uint64)
        histories[session] = np.concatenate([histories[session], fresh])[:40]
        requests.append(TraceRequest(hashes=histories[session], session=f"s{session}", time_s=float(i)))
    return requests


def threads_of_ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("kvbm")}


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_requests_at_once_read_no_wrong_byte_and_leave_nothing_held(
    backend: Backend, tmp_path: Path, concurrency: int
) -> None:
    requests = chains(150)
    with make_manager(backend, tmp_path) as manager:
        report = replay_concurrently(manager, requests, concurrency=concurrency)
        manager.check()
        statuses = manager.status().values()
        assert all(status.free + status.inactive == status.total_blocks for status in statuses)
    assert not threads_of_ours()
    assert (report.requests, report.wrong_bytes, report.held_blocks) == (150, 0, 0)
    assert (report.refused, report.no_room, report.lost_blocks) == (0, 0, 0)
    assert report.blocks == sum(len(request.hashes) for request in requests if request.hashes is not None)
    assert report.written_bytes + report.verified_bytes == report.blocks * 256
    assert all(report.hits_by_tier[tier] for tier in ("device", "host", "disk"))


def test_a_pool_as_small_as_the_largest_request_serves_them_all(backend: Backend) -> None:
    requests = chains(120, seed=1)
    largest = max(len(request.hashes) for request in requests if request.hashes is not None)
    with make_manager(backend, device=largest) as manager:
        report = replay_concurrently(manager, requests, concurrency=8)
        manager.check()
    assert (report.requests, report.refused, report.no_room, report.wrong_bytes) == (120, 0, 0, 0)


def test_a_request_that_can_never_fit_is_refused_and_holds_nobody_up(backend: Backend) -> None:
    names = np.arange(200, dtype=np.uint64).reshape(100, 2)
    requests = [TraceRequest(hashes=names[:n]) for n in (10, 61, 10, 100, 60)]
    with make_manager(backend) as manager:
        report = replay_concurrently(manager, requests, concurrency=3)
    assert (report.requests, report.refused, report.blocks) == (5, 2, 80)


class Watch:
    """Stands in for `serve`: notes which requests run at once, and lets them end when there are enough, or no more."""

    def __init__(self, num_at_once: int) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Barrier(num_at_once)
        self.order: list[int] = []
        self.running: list[int] = []
        self.most_blocks = 0

    def __call__(self, manager: Any, hashes: HashArray, **_: Any) -> Any:
        name = int(hashes[0, 0])
        with self.lock:
            self.order.append(name)
            self.running.append(name)
            self.most_blocks = max(self.most_blocks, 10 * len(self.running))
        self.gate.wait(60)
        with self.lock:
            self.running.remove(name)
        return Served(blocks=len(hashes))


def ten_blocks(name: int, session: str = "", time_s: float = 0.0) -> TraceRequest:
    hashes = np.full((10, 2), name, dtype=np.uint64)
    return TraceRequest(hashes=hashes, session=session, time_s=time_s)


def test_only_requests_that_fit_beside_each_other_run_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(num_at_once=3)
    monkeypatch.setattr("kvbm.replay.concurrent.serve", watch)
    with make_manager(backend, device=35) as manager:
        replay_concurrently(manager, [ten_blocks(i) for i in range(9)], concurrency=8)
    assert watch.most_blocks == 30
    assert sorted(watch.order) == list(range(9))


def test_a_session_runs_one_request_at_a_time_and_others_pass(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(num_at_once=2)
    monkeypatch.setattr("kvbm.replay.concurrent.serve", watch)
    requests = [ten_blocks(0, "a"), ten_blocks(1, "a"), ten_blocks(2, "b"), ten_blocks(3, "b")]
    with make_manager(backend) as manager:
        replay_concurrently(manager, requests, concurrency=4)
    assert set(watch.order[:2]) == {0, 2}, "the second of a session waits for the first"
    assert set(watch.order[2:]) == {1, 3}


def test_a_real_clock_starts_each_request_at_its_time(backend: Backend) -> None:
    now = 1000.0
    started = []
    waits = []

    def wait(condition: threading.Condition, seconds: float | None) -> None:
        nonlocal now
        assert seconds is not None, "one thread never waits for another"
        waits.append(seconds)
        now += seconds

    def requests() -> Iterator[TraceRequest]:
        for i, time_s in enumerate((50.0, 50.0, 52.0, 60.0)):
            yield ten_blocks(i, time_s=time_s)

    def note(*_: Any, **__: Any) -> Any:
        started.append(now)
        return Served()

    with pytest.MonkeyPatch.context() as patch, make_manager(backend) as manager:
        patch.setattr("kvbm.replay.concurrent.serve", note)
        replay_concurrently(manager, requests(), concurrency=1, speed=2.0, now=lambda: now, wait=wait)
    assert started == [1000.0, 1000.0, 1001.0, 1005.0], "time begins with the first request, and runs twice as fast"
    assert waits == [1.0, 4.0]


def test_what_a_thread_raises_ends_the_replay_and_is_raised(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("in a thread")

    report = ReplayReport()
    with make_manager(backend) as manager:
        with monkeypatch.context() as patch:
            patch.setattr("kvbm.replay.concurrent.serve", fail)
            with pytest.raises(ZeroDivisionError, match="in a thread"):
                replay_concurrently(manager, chains(50), report=report)
        assert report.is_partial
        assert not [name for name in threads_of_ours() if name.startswith("kvbm-replay")]
        assert replay_concurrently(manager, chains(50)).requests == 50


def test_an_interrupt_between_requests_leaves_nothing_held(backend: Backend) -> None:
    def interrupt(report: ReplayReport) -> None:
        if report.requests:
            raise KeyboardInterrupt

    report = ReplayReport()
    with make_manager(backend) as manager:
        with pytest.raises(KeyboardInterrupt):
            replay_concurrently(manager, itertools.cycle(chains(100)), report=report, on_progress=interrupt)
        assert report.is_partial
        manager.flush(60)
        manager.check()
        assert all(status.active + status.mutable == 0 for status in manager.status().values())
    assert report.requests


def test_a_request_that_finds_no_room_in_time_is_counted_and_lets_go_of_its_hit(backend: Backend) -> None:
    hashes = np.arange(100, dtype=np.uint64).reshape(50, 2)
    with make_manager(backend) as manager:
        assert serve(manager, hashes, timeout_s=0.0, flush_timeout_s=60).refused == ""
        manager.reset_pool("device")
        with manager.allocate_blocks(20):
            served = serve(manager, hashes, timeout_s=0.0)
            assert (served.refused, served.blocks, served.hits_by_tier) == ("no_room", 0, {})
            assert serve(manager, hashes[:5] + np.uint64(1000), timeout_s=0.0).refused == ""
            with pytest.raises(NotEnoughBlocksAvailable):
                manager.allocate_blocks(41)
        assert serve(manager, hashes, timeout_s=0.0).hits_by_tier == {"host": 50}
        manager.check()


def test_threads_add_to_a_report_without_losing_a_count() -> None:
    report = ReplayReport()
    barrier = threading.Barrier(8)

    def add() -> None:
        barrier.wait(60)
        for _ in range(2_000):
            report.add(Served(blocks=3, hit_blocks=2, hits_by_tier={"device": 2}, call_ns=[("match", 1)]), until=1.0)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (report.requests, report.blocks, report.hit_blocks) == (16_000, 48_000, 32_000)
    assert (report.hits_by_tier["device"], report.call_ns["match"].count, report.seconds) == (32_000, 16_000, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "a concurrency of 0 is impossible, give 1 or more"),
        ({"speed": 0.0}, "a speed of 0.0 is impossible, give more than 0"),
    ],
)
def test_impossible_schedules_are_refused(backend: Backend, options: dict[str, Any], message: str) -> None:
    with make_manager(backend) as manager, pytest.raises(ConfigError, match=message):
        replay_concurrently(manager, chains(1), **options)
