"""Replay over tiers: what each tier hits, byte for byte, and again the same (CONFORMANCE 28, 35, 36)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, TraceRequest, read_trace, replay
from kvbm.replay.content import content_of
from kvbm.replay.report import Served
from kvbm.replay.series import Series
from kvbm.types import HashArray

TRACE = Path(__file__).parents[3] / "shared" / "data" / "mooncake_conversation_trace.jsonl"
ROOMS = {"device": 50, "host": 140, "disk": 400}


def make_manager(rooms: dict[str, int], backend: Backend, path: Path, block_nbytes: int = 256) -> BlockManager:
    return BlockManager(
        num_layers=1,
        outer_dim=1,
        page_size=16,
        inner_dim=block_nbytes // 16,
        dtype="uint8",
        device_blocks=rooms.get("device", 0),
        host_blocks=rooms.get("host", 0),
        disk_blocks=rooms.get("disk", 0),
        disk_path=path if "disk" in rooms else None,
        model="replay",
        backend=backend,
    )


def conversations(num_sessions: int = 30, num_turns: int = 6, seed: int = 3) -> list[TraceRequest]:
    """Make conversations that share prompts, each turn a few blocks longer, all sessions mixed."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> HashArray:
        return rng.integers(0, 2**63, (int(rng.integers(low, high)), 2), dtype=np.uint64)

    prompts = [draw(2, 9) for _ in range(3)]
    histories = [prompts[int(rng.integers(3))] for _ in range(num_sessions)]
    requests = []
    for session in rng.permutation(np.repeat(np.arange(num_sessions), num_turns)).tolist():
        histories[session] = np.concatenate([histories[session], draw(1, 6)])
        requests.append(TraceRequest(hashes=histories[session]))
    return requests


class InclusiveTiers:
    """What tiers promise one request at a time: each is an LRU list of its own size that every request passes through.

    A block used is young in every tier, the head of a request younger than its tail, whichever tier it was found in;
    a block that is not in a tier enters it. So each list alone is a plain LRU cache, and a smaller one is the young end
    of a larger one.
    """

    def __init__(self, rooms: dict[str, int]) -> None:
        self.rooms = rooms
        self.lists: dict[str, OrderedDict[bytes, None]] = {tier: OrderedDict() for tier in rooms}
        self.hits = dict.fromkeys(rooms, 0)

    def serve(self, names: list[bytes]) -> None:
        if len(names) > next(iter(self.rooms.values())):
            return
        for name in names:
            tier = next((tier for tier, known in self.lists.items() if name in known), None)
            if tier is None:
                break
            self.hits[tier] += 1
        for tier, known in self.lists.items():
            for name in reversed(names):
                known[name] = None
                known.move_to_end(name)
            while len(known) > self.rooms[tier]:
                known.popitem(last=False)


@pytest.mark.parametrize("tiers", [("device", "host", "disk"), ("device", "host"), ("device", "disk")])
def test_every_tier_hits_what_inclusive_lru_lists_hit(backend: Backend, tmp_path: Path, tiers: tuple[str, ...]) -> None:
    rooms = {tier: ROOMS[tier] for tier in tiers}
    requests = conversations()
    model = InclusiveTiers(rooms)
    with make_manager(rooms, backend, tmp_path) as manager:
        for request in requests:
            assert request.hashes is not None
            model.serve([row.tobytes() for row in request.hashes])
        report = replay(manager, requests)
        manager.check()
    assert dict(report.hits_by_tier) == model.hits
    assert all(model.hits.values()), "every tier is needed"
    assert report.hit_blocks == sum(model.hits.values())
    assert (report.wrong_bytes, report.lost_blocks, report.no_room, report.held_blocks) == (0, 0, 0, 0)
    assert report.occupied_by_tier == rooms
    assert report.verified_bytes == report.hit_blocks * 256


def test_two_sequential_runs_give_the_same_figures(backend: Backend, tmp_path: Path) -> None:
    figures = []
    for run in ("one", "two"):
        path = tmp_path / run
        path.mkdir()
        with make_manager(ROOMS, backend, path) as manager:
            figures.append(replay(manager, conversations(num_sessions=15)).to_dict())
    for values in figures:
        for time in ("seconds", "gigabytes_per_second", "call_us"):
            del values[time]
        del values["series"]["seconds"]
    assert figures[0] == figures[1]


def test_routes_count_what_moved_and_nothing_of_an_earlier_replay(backend: Backend, tmp_path: Path) -> None:
    requests = conversations(num_sessions=12)
    with make_manager({"device": 50, "host": 1000}, backend, tmp_path) as manager:
        first = replay(manager, requests)
        again = replay(manager, requests)
    new = first.blocks - first.hit_blocks
    assert first.routes["device->host"] == {"blocks": new, "nbytes": new * 256, "present": first.hits_by_tier["host"],
                                            "dropped": {}}  # fmt: skip
    assert first.routes["host->device"]["blocks"] == first.hits_by_tier["host"]
    assert again.hit_rate == 1.0
    assert again.routes["device->host"]["blocks"] == 0
    assert again.routes["host->device"]["nbytes"] == again.hits_by_tier["host"] * 256


def test_a_byte_that_is_wrong_in_every_tier_alike_is_seen(backend: Backend, tmp_path: Path) -> None:
    """Checksums are computed on the way down: what was wrong before that, only the content can tell."""
    hashes = np.arange(8, dtype=np.uint64).reshape(4, 2)
    with make_manager({"device": 4, "host": 16}, backend, tmp_path) as manager:
        fresh = manager.allocate_blocks(4)
        data = content_of(hashes, 256)
        data[2, 100] ^= 1
        manager.storage("device").write(fresh.block_ids, data)
        manager.register_blocks(fresh.complete(hashes)).release()
        manager.flush(60)
        manager.reset_pool("device")
        report = replay(manager, [TraceRequest(hashes=hashes)])
    assert dict(report.hits_by_tier) == {"host": 4}
    assert report.wrong_bytes == 1
    assert report.first_wrong.endswith(hashes[2].tobytes().hex())
    assert report.is_failed


def test_a_damaged_copy_below_is_a_miss_and_counted(backend: Backend, tmp_path: Path) -> None:
    hashes = np.arange(8, dtype=np.uint64).reshape(4, 2)
    with make_manager({"device": 4, "host": 16}, backend, tmp_path) as manager:
        assert replay(manager, [TraceRequest(hashes=hashes)]).blocks == 4
        assert manager.host is not None
        view = np.asarray(manager.storage("host").buffers[0]).view(np.uint8).reshape(-1)
        stride = manager.storage("host").layout.strides.block
        view[int(manager.host.lookup(hashes[2:3])[0]) * stride + 7] ^= 1
        manager.reset_pool("device")
        report = replay(manager, [TraceRequest(hashes=hashes)])
        again = replay(manager, [TraceRequest(hashes=hashes)])
    assert (report.hit_blocks, report.lost_blocks, report.mismatches, report.wrong_bytes) == (2, 2, 1, 0)
    assert (again.hit_rate, again.wrong_bytes) == (1.0, 0)


def test_a_request_larger_than_the_top_tier_is_refused_with_tiers_below(backend: Backend, tmp_path: Path) -> None:
    sizes = (3, 9, 3)
    requests = [TraceRequest(hashes=np.arange(2 * n, dtype=np.uint64).reshape(n, 2)) for n in sizes]
    with make_manager({"device": 8, "host": 100}, backend, tmp_path) as manager:
        report = replay(manager, requests)
    assert (report.requests, report.refused, report.no_room, report.blocks, report.hit_blocks) == (3, 1, 0, 6, 3)


def test_a_block_that_somebody_keeps_is_reported(backend: Backend, tmp_path: Path) -> None:
    kept: list[Any] = []
    hashes = np.arange(8, dtype=np.uint64).reshape(4, 2)

    def keep(report: ReplayReport) -> None:
        kept.append(manager.match_sequence_hashes(hashes[:2]))

    with make_manager({"device": 8, "host": 16}, backend, tmp_path) as manager:
        report = replay(manager, [TraceRequest(hashes=hashes)], on_progress=keep)
        assert (report.held_blocks, report.is_failed) == (2, True)
        assert "blocks still held" in [cell for column in report.to_table("t").columns for cell in column.cells]
        kept.pop().release()


@pytest.mark.parametrize("num_requests", [1, 999, 1000, 1001, 5003])
def test_a_series_keeps_its_last_point_and_at_most_so_many(num_requests: int) -> None:
    report = ReplayReport(series=Series(max_points=100))

    class Manager:
        def status(self) -> dict[str, Any]:
            return {}

    for _ in range(num_requests):
        if report.add(Served(blocks=1)):
            report.take_point(Manager())  # type: ignore[arg-type]
    report.take_point(Manager())  # type: ignore[arg-type]
    requests = [point.requests for point in report.series.points]
    assert requests[-1] == num_requests
    assert min(num_requests, 50) <= len(requests) <= 101
    assert requests == sorted(set(requests))


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason="the real trace is not part of a checkout")
def test_conversation_trace_over_three_tiers_hits_what_inclusive_lru_lists_hit(
    backend: Backend, tmp_path: Path
) -> None:
    rooms = {"device": 500, "host": 2_000, "disk": 20_000}
    requests = read_trace(TRACE, limit=1_000 if backend.name == "pure" else None)
    model = InclusiveTiers(rooms)
    for request in requests:
        assert request.hashes is not None
        model.serve([row.tobytes() for row in request.hashes])
    with make_manager(rooms, backend, tmp_path, 64) as manager:
        report = replay(manager, requests)
        manager.check()
    assert dict(report.hits_by_tier) == model.hits
    assert report.wrong_bytes == 0
    if backend.name != "pure":  # which takes minutes for the whole
        rates = {tier: round(rate, 4) for tier, rate in report.hit_rate_by_tier.items()}
        assert rates == {"device": 0.0422, "host": 0.0121, "disk": 0.2335}
        assert (report.requests, report.blocks, round(report.hit_rate, 4)) == (12_031, 288_500, 0.2878)
