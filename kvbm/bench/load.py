"""What offloading costs those beside it: registrations in the device tier, and hits in the host tier.

Both sides of a row take turns in one run. ``register_16`` is allocate, complete, register and release of 16 blocks in a
closed loop, ``register_paced`` the same once a millisecond, as a busy engine's steps do; the reference has no host
tier. ``hit_*`` are hits in the host tier while `nbytes` go from the device tier to the host tier or through it to disk;
the reference has the same blocks waiting in the device tier, unregistered. A figure of theirs is the 99th percentile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.bench.rig import NUM_REQUEST_BLOCKS, Times, bring_up, make_manager, make_row, put_into_host, random_hashes
from kvbm.manager import BlockManager
from kvbm.planner.counters import RouteCounters
from kvbm.types import Tier

_STEP_BLOCKS = 16
_STEP_S = 1e-3
_HIT_CASES = (("64k", NUM_REQUEST_BLOCKS), ("1m", 1))
_NUM_HOT = 16  # requests that are asked for in turn; the device tier has room for a quarter of them


# -- registrations ---------------------------------------------------------------------------------------------


def register_rows(backend: Backend, rounds: int, round_s: float) -> list[dict[str, Any]]:
    """Microseconds of a step with write-through to a host tier, against a manager without one; turns of `round_s`."""
    rows: list[dict[str, Any]] = []
    with (
        make_manager("64k", backend, device_blocks=4096, host_blocks=8192) as busy,
        make_manager("64k", backend, device_blocks=4096) as alone,
    ):
        for name, step_s in (("register_16", 0.0), ("register_paced", _STEP_S)):
            times: tuple[list[Times], list[Times]] = ([], [])
            num_before = _num_moved(busy, Tier.HOST)
            for i in range(rounds + 1):
                for taken, manager in zip(times, (busy, alone), strict=True):
                    taken.append(_steps(manager, step_s, round_s, seed=i))
                    manager.flush()
            num_blocks = sum(len(taken) for taken in times[0]) * _STEP_BLOCKS
            median, reference = (float(np.median(np.concatenate(taken[1:]))) for taken in times)
            rows.append(
                make_row(
                    name,
                    "us/call",
                    [float(np.median(taken)) for taken in times[0][1:]],
                    reference,
                    median=median,
                    means=[float(np.mean(np.concatenate(taken[1:]))) for taken in times],
                    offloaded_share=(_num_moved(busy, Tier.HOST) - num_before) / num_blocks,
                )
            )
    return rows


def _steps(manager: BlockManager, step_s: float, round_s: float, seed: int) -> Times:
    """Microseconds of each step that fits into `round_s`."""
    rng = np.random.default_rng(seed)
    times: list[int] = []
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < round_s:
        if step_s:
            time.sleep(step_s - now % step_s)
        hashes = rng.integers(1, 1 << 63, (_STEP_BLOCKS, 2), dtype=np.uint64)
        began = time.perf_counter_ns()
        manager.register_blocks(manager.allocate_blocks(_STEP_BLOCKS).complete(hashes)).release()
        times.append(time.perf_counter_ns() - began)
    return np.array(times) / 1000


# -- hits ------------------------------------------------------------------------------------------------------


def hit_rows(backend: Backend, nbytes: int, rounds: int, num_hits: int) -> list[dict[str, Any]]:
    """99th percentile of a hit in the host tier while something is offloaded, against the same while nothing is."""
    rows = []
    for size, num_blocks in _HIT_CASES:
        for tier in (Tier.HOST, Tier.DISK):
            with _manager(backend, size, num_blocks, tier, nbytes) as manager:
                idle, busy = _hits(manager, num_blocks, tier, rounds, num_hits)
            reference, p99 = (float(np.percentile(np.concatenate(times), 99)) for times in (idle, busy))
            rows.append(
                make_row(
                    f"hit_{size}_{tier.value}",
                    "us p99",
                    [float(np.percentile(times, 99)) for times in busy],
                    reference,
                    median=p99,
                    num_hits=sum(len(times) for times in busy),
                    p50=[float(np.median(np.concatenate(times))) for times in (busy, idle)],
                )
            )
    return rows


@contextmanager
def _manager(backend: Backend, size: str, num_blocks: int, tier: Tier, nbytes: int) -> Iterator[BlockManager]:
    """Give a manager with room for a bulk of `nbytes` in every tier, and a quarter of the hot requests on top."""
    bulk = nbytes // ((64 << 10) if size == "64k" else (1 << 20))
    host_blocks = bulk + bulk // 4 + _NUM_HOT * num_blocks
    with ExitStack() as stack:
        disk = stack.enter_context(tempfile.TemporaryDirectory()) if tier is Tier.DISK else None
        yield stack.enter_context(
            make_manager(
                size,
                backend,
                device_blocks=bulk + _NUM_HOT * num_blocks // 4,
                host_blocks=host_blocks,
                disk_blocks=2 * host_blocks if disk else 0,
                disk_path=disk,
            )
        )


def _hits(
    manager: BlockManager, num_blocks: int, tier: Tier, rounds: int, num_hits: int
) -> tuple[list[Times], list[Times]]:
    """Microseconds of each hit of each round: idle, and while blocks are offloaded."""
    assert manager.host is not None, "made with a host tier"
    num_hot = _NUM_HOT * num_blocks
    bulk = manager.device.total_blocks - num_hot // 4
    hot = random_hashes(num_hot)
    put_into_host(manager, hot)
    requests = hot.reshape(_NUM_HOT, num_blocks, 2)
    idle, busy = [], []
    for i in range(rounds + 1):
        hashes = random_hashes(bulk, seed=i + 1)
        fresh = manager.allocate_blocks(bulk)
        idle.append(np.array([_hit(manager, requests[j % _NUM_HOT]) for j in range(num_hits)]))
        manager.flush()
        manager.host.touch_blocks(hot)  # also those that were not asked for: what comes down evicts others
        target = _num_offloaded(manager, tier) + bulk
        held = manager.register_blocks(fresh.complete(hashes))  # the device tier keeps them until they are below
        times: list[float] = []
        while _num_offloaded(manager, tier) < target:
            times.append(_hit(manager, requests[len(times) % _NUM_HOT]))
        busy.append(np.array(times))
        held.release()
        manager.flush()
        manager.reset_blocks("device", hashes)
    return idle[1:], busy[1:]


def _hit(manager: BlockManager, hashes: Any) -> float:
    """Bring a request up and let go of it; give its microseconds."""
    began = time.perf_counter_ns()
    blocks = bring_up(manager, hashes)
    ended = time.perf_counter_ns()
    blocks.release()
    return (ended - began) / 1000


def _num_offloaded(manager: BlockManager, tier: Tier) -> int:
    """Blocks that went down into this tier, or were dropped on the way."""
    counters = _counters(manager, tier)
    return counters.blocks + sum(counters.dropped.values())


def _num_moved(manager: BlockManager, tier: Tier) -> int:
    return _counters(manager, tier).blocks


def _counters(manager: BlockManager, tier: Tier) -> RouteCounters:
    """Give the counts of the route that ends in this tier."""
    return manager.statistics().routes[Tier.DEVICE if tier is Tier.HOST else Tier.HOST, tier]
