"""Replay through the real manager: rates, real bytes, and wrong ones (CONFORMANCE 35, 36)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.manager import BlockManager
from kvbm.replay import TraceRequest, generate_conversations, read_trace, replay
from kvbm.replay.content import content_of

DATA = Path(__file__).parents[3] / "shared" / "data"
TRACE = DATA / "mooncake_conversation_trace.jsonl"
LRU_RATES = {
    **{500: 0.0422, 1_000: 0.0445, 2_000: 0.0543, 5_000: 0.1118},
    **{10_000: 0.2116, 20_000: 0.2878, 50_000: 0.3546, 100_000: 0.3637},
}


def make_manager(num_blocks: int, backend: Backend, block_nbytes: int = 256, **options: Any) -> BlockManager:
    return BlockManager(
        num_layers=1,
        outer_dim=1,
        page_size=16,
        inner_dim=block_nbytes // 16,
        dtype="uint8",
        device_blocks=num_blocks,
        backend=backend,
        **options,
    )


def lru_hits(requests: list[list[bytes]], capacity: int) -> int:
    """Twenty lines of LRU: leading cached blocks of each request; its blocks are inserted tail first."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    num_hits = 0
    for names in requests:
        if len(names) > capacity:
            continue
        leading = 0
        while leading < len(names) and names[leading] in cache:
            leading += 1
        num_hits += leading
        for name in names:
            cache.pop(name, None)
        while len(cache) + len(set(names)) > capacity:
            cache.popitem(last=False)
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
    return num_hits


@pytest.mark.parametrize("capacity", [300, 700, 5000])
def test_replay_equals_twenty_lines_of_lru(backend: Backend, capacity: int) -> None:
    requests = list(generate_conversations(num_sessions=30, num_turns=4, seed=3))
    with make_manager(capacity, backend) as manager:
        names = [
            [row.tobytes() for row in manager.sequence(request.tokens, salt=request.salt).hashes]
            for request in requests
        ]
        report = replay(manager, requests)
        manager.check()
        status = manager.device.status()
    assert report.hit_blocks == lru_hits(names, capacity)
    assert report.refused == sum(len(request) > capacity for request in names)
    assert report.wrong_bytes == 0
    assert report.verified_bytes == report.hit_blocks * 256
    assert status.free + status.inactive == capacity, "nothing is held when the replay is over"


@pytest.mark.skipif(not TRACE.exists(), reason="the real trace is not part of a checkout")
@pytest.mark.parametrize(
    "capacity", [pytest.param(n, marks=[] if n in (500, 5_000, 20_000) else pytest.mark.slow) for n in LRU_RATES]
)
def test_conversation_trace_gives_the_reference_rates(backend: Backend, capacity: int) -> None:
    requests = read_trace(TRACE)
    with make_manager(capacity, backend, 64) as manager:
        report = replay(manager, requests)
    assert round(report.hit_rate, 4) == LRU_RATES[capacity]
    assert (report.requests, report.blocks, report.wrong_bytes) == (12_031, 288_500, 0)


@pytest.mark.skipif(not DATA.exists(), reason="the real trace is not part of a checkout")
def test_agent_sessions_replay_without_a_wrong_byte(backend: Backend) -> None:
    requests = read_trace(DATA / "agent_sessions.jsonl.gz", limit=150)
    with make_manager(20_000, backend, 64) as manager:
        report = replay(manager, requests)
    assert report.wrong_bytes == 0
    assert report.hit_rate > 0.5


def test_a_request_larger_than_the_tier_is_refused_and_the_rest_goes_on(backend: Backend) -> None:
    sizes = (3, 9, 3)
    requests = [TraceRequest(hashes=np.arange(2 * n, dtype=np.uint64).reshape(n, 2)) for n in sizes]
    with make_manager(8, backend) as manager:
        report = replay(manager, requests)
    assert (report.requests, report.refused, report.blocks, report.hit_blocks) == (3, 1, 6, 3)


def test_one_wrong_byte_is_seen_and_named(backend: Backend) -> None:
    hashes = np.arange(8, dtype=np.uint64).reshape(4, 2)
    with make_manager(8, backend) as manager:
        assert replay(manager, [TraceRequest(hashes=hashes)]).wrong_bytes == 0
        data = content_of(hashes[2:3], 256)
        data[0, 100] ^= 1
        manager.storage("device").write(manager.device.lookup(hashes[2:3]), data)
        report = replay(manager, [TraceRequest(hashes=hashes)])
    assert report.wrong_bytes == 1
    assert report.first_wrong.endswith(hashes[2].tobytes().hex())


def test_an_interrupted_replay_leaves_nothing_held(backend: Backend) -> None:
    def interrupt(report: Any) -> None:
        if report.requests == 5:
            raise KeyboardInterrupt

    with make_manager(500, backend) as manager:
        with pytest.raises(KeyboardInterrupt):
            replay(manager, generate_conversations(num_sessions=9, seed=1), on_progress=interrupt)
        manager.check()
        assert manager.device.available_blocks == 500


def test_contents_of_blocks_differ_and_depend_on_the_hash_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, (50, 2), dtype=np.uint64)
    for nbytes in (1, 7, 8, 100):
        data = content_of(hashes, nbytes)
        assert data.shape == (50, nbytes)
        assert np.array_equal(data[10:20], content_of(hashes[10:20], nbytes))
    assert len({row.tobytes() for row in content_of(hashes, 64)}) == 50
    swapped = content_of(hashes[:, ::-1].copy(), 64)
    assert not (swapped == content_of(hashes, 64)).all(axis=1).any()
    for word in (0, 1):
        other = hashes.copy()
        other[:, word] ^= np.uint64(1)
        assert not (content_of(other, 64) == content_of(hashes, 64)).all(axis=1).any(), f"word {word} counts"


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_policies_by_name_replay(backend: Backend, policy: str) -> None:
    with make_manager(400, backend, policy=policy) as manager:
        report = replay(manager, generate_conversations(num_sessions=20, seed=5))
        manager.check()
    assert report.wrong_bytes == 0
    assert report.evictions > 0


def test_seconds_count_requests_and_not_the_making_of_the_workload(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("kvbm.replay.run.time.perf_counter", lambda: now)

    def slowly() -> Iterator[TraceRequest]:
        nonlocal now
        for request in generate_conversations(num_sessions=3, num_turns=1):
            now += 100.0
            yield request

    with make_manager(400, backend) as manager:
        assert replay(manager, slowly()).seconds == 0.0


def test_ids_that_repeat_within_a_request_replay_without_a_wrong_byte(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    names = rng.integers(0, 2**63, (6, 2), dtype=np.uint64)
    requests = [TraceRequest(hashes=names[rng.integers(0, 6, int(rng.integers(0, 9)))]) for _ in range(300)]
    for capacity in (1, 4, 7):
        with make_manager(capacity, backend) as manager:
            report = replay(manager, requests)
            manager.check()
            assert manager.device.available_blocks == capacity
        assert report.wrong_bytes == 0


def test_no_blocks_have_no_content() -> None:
    assert content_of(np.empty((0, 2), dtype=np.uint64), 33).shape == (0, 33)
