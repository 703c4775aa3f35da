"""Sessions at once over three tiers, for a long time: no wrong byte, no leak, no thread, no growth."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.manager import BlockManager
from kvbm.replay import TraceRequest, generate_conversations, read_trace, replay_concurrently

NUM_CONCURRENT = 8
NUM_ROUNDS = 6
MAX_GROWTH_NBYTES = 64 << 20  # between the end of the first round and that of the last


def workload(manager: BlockManager) -> list[TraceRequest]:
    """Give the requests of the trace in ``KVBM_SOAK_TRACE``, or generated ones, as hashes in order of time."""
    if path := os.environ.get("KVBM_SOAK_TRACE"):
        return sorted(read_trace(path), key=lambda request: request.time_s)
    made = generate_conversations(num_sessions=100, num_turns=5, seed=7)
    return [replace(request, hashes=manager.sequence(request.tokens).hashes, tokens=None) for request in made]


def endless(requests: list[TraceRequest]) -> Iterator[TraceRequest]:
    """Give the requests again and again, each time under other hashes, so that nothing of an earlier lap is a hit."""
    for lap in itertools.count():
        mask = np.array([lap * 0x9E3779B97F4A7C15 % 2**64, lap], dtype=np.uint64)
        for request in requests:
            assert request.hashes is not None
            yield replace(request, hashes=request.hashes ^ mask)


def resident_nbytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
def test_sessions_at_once_leave_nothing_behind(backend: Backend, minutes: float, tmp_path: Path) -> None:
    threads_before = {thread.name for thread in threading.enumerate()}
    round_s = 60 * minutes / 2 / NUM_ROUNDS  # half the time for each twin
    sizes: list[int] = []
    num_requests = num_hits = 0

    with BlockManager(
        num_layers=1, outer_dim=1, page_size=16, inner_dim=16, dtype="uint8", model="soak", backend=backend,
        device_blocks=6_000, host_blocks=12_000, disk_blocks=60_000, disk_path=tmp_path,
    ) as manager:  # fmt: skip
        requests = endless(workload(manager))
        for _ in range(NUM_ROUNDS):
            until = time.monotonic() + round_s
            part = itertools.takewhile(lambda _: time.monotonic() < until, requests)  # noqa: B023
            report = replay_concurrently(manager, part, concurrency=NUM_CONCURRENT)
            manager.check()
            assert (report.wrong_bytes, report.lost_blocks, report.no_room) == (0, 0, 0)
            for tier, status in manager.status().items():
                assert status.free + status.inactive == status.total_blocks, f"blocks of {tier} stay held: {status}"
            for route in manager.statistics().routes.values():
                assert (route.queued, route.in_flight, route.draining) == (0, 0, 0)
            num_requests += report.requests
            num_hits += report.hit_blocks
            sizes.append(resident_nbytes())
            print(
                f"{backend.name}: round {len(sizes)} of {NUM_ROUNDS}, {num_requests:,} requests, "
                f"hit rate {report.hit_rate:.4f}, {sizes[-1] >> 20} MiB resident"
            )
    assert {thread.name for thread in threading.enumerate()} == threads_before
    assert num_hits
    assert sizes[-1] - sizes[0] < MAX_GROWTH_NBYTES, f"memory grows by round: {sizes}"
