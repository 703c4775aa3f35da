"""Blocks between tiers: what the manager adds to a hit in the host tier, and what offloading costs those beside it.

`run` measures both twins, the pure one in rows that end in ``_pure`` and with less beside its hits. This file holds
what a hit costs by itself: ``onboard_64`` is match, onboard and register of 64 blocks with an executor that answers at
once in the caller's thread, so no byte counts; ``onboard_1m`` is the same with the real executor and real bytes,
against the bare copy of the same blocks. `kvbm.bench.load` holds what happens at the same time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvbm._backend import Backend, default_backend, load_backend
from kvbm.bench.load import hit_rows, register_rows
from kvbm.bench.rig import (
    NUM_REQUEST_BLOCKS,
    Times,
    bring_up,
    make_manager,
    make_row,
    put_into_host,
    random_hashes,
)
from kvbm.jobs import CopyJob, Job, JobResult
from kvbm.manager import BlockManager
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.transfer import TransferEngine
from kvbm.types import IdArray, Tier

_BLOCK_NBYTES = 1 << 20


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes
    ----------
    nbytes : int
        Bytes of a round of ``onboard_1m``, at least 64 MiB.
    bulk_nbytes : int
        Bytes that are offloaded beside hits in a round.
    num_calls : int
        Requests of ``onboard_64``.
    rounds : int
        Of everything else, after one that is thrown away.
    round_s : float
        How long a round of registrations lasts.
    num_hits : int
        Idle hits of a round.
    """

    nbytes: int = 1 << 30
    bulk_nbytes: int = 1 << 30
    num_calls: int = 3000
    rounds: int = 7
    round_s: float = 0.5
    num_hits: int = 200


def run(extent: Extent | None = None, *, backend: Backend | None = None) -> list[dict[str, Any]]:
    """Measure what blocks between tiers cost.

    Parameters
    ----------
    extent : Extent, optional
    backend : Backend, optional
        The twin to measure; None measures the one in use. The pure one follows where it is another.

    Returns
    -------
    list of dict
        A row a case: name, unit, median, spread ([p10, p90]), reference and ratio (above 1: better than the
        reference). The reference is the pure twin, the bare copy, or the same without offloading, in the same run.
    """
    extent = extent or Extent()
    twin = default_backend() if backend is None else backend
    pure = load_backend("pure")
    times = _overheads(twin, extent.num_calls)
    pure_times = times if twin.name == "pure" else _overheads(pure, max(30, extent.num_calls // 10))
    rows = [
        make_row(name, "us/call", own, float(np.median(reference)))
        for name, own, reference in zip(("onboard_64", "pump_64"), times, pure_times, strict=True)
    ]
    rows += _rows_of(twin, extent)
    if twin.name != "pure":
        less = replace(extent, bulk_nbytes=max(1 << 20, extent.bulk_nbytes // 16), rounds=min(3, extent.rounds))
        rows += [row | {"name": f"{row['name']}_pure"} for row in _rows_of(pure, less)]
    return rows


def _rows_of(backend: Backend, extent: Extent) -> list[dict[str, Any]]:
    return [
        _onboard_row(backend, extent.nbytes, extent.rounds),
        *register_rows(backend, extent.rounds, extent.round_s),
        *hit_rows(backend, extent.bulk_nbytes, extent.rounds, extent.num_hits),
    ]


# -- without bytes ---------------------------------------------------------------------------------------------


class _Echo:
    """A channel to an executor that has done everything already."""

    def open(self, receive: Callable[[JobResult], None], lost: Callable[[str], None]) -> None:
        self._receive = receive

    def send(self, job: Job) -> None:
        assert isinstance(job, CopyJob), "no tier here keeps records"
        self._receive(JobResult(job_id=job.job_id, outcomes=np.zeros(len(job.hashes), dtype=np.uint8)))

    def revoke(self, job_id: int) -> bool:
        return False

    def knows(self, job_id: int) -> bool:
        """Say so always."""
        return True

    def run_here(self, job_id: int) -> bool:
        return False

    def close(self, timeout_s: float | None = None) -> bool:
        return True


def _overheads(backend: Backend, num_calls: int) -> tuple[Times, Times]:
    """Microseconds of each request, and of what the planner's thread does about it later; see `run`.

    The device tier holds 64 requests and the host tier 1024, so each request evicts another and is found below.
    """
    n, num_requests = NUM_REQUEST_BLOCKS, 1024
    device = BlockPool(64 * n, backend=backend)
    host = BlockPool(num_requests * n, tier=Tier.HOST, backend=backend)
    requests = random_hashes(num_requests * n).reshape(num_requests, n, 2)
    for request in requests:
        host.register_blocks(host.allocate_blocks(n).complete(request)).release()
    planner = Planner([device, host], [_Echo()])
    times = np.empty((2, num_calls))
    for i in range(-num_calls // 10, num_calls):
        request = requests[i % num_requests]
        request.sum()  # hashes come into the cache, as they are when a request has just been hashed
        began = time.perf_counter_ns()
        blocks = planner.onboard(planner.match(request)).result()
        ended = time.perf_counter_ns()
        assert len(blocks) == n, "all of it lies in the host tier"
        blocks.release()
        pumped = time.perf_counter_ns()
        planner.pump()
        if i >= 0:
            times[:, i] = ended - began, time.perf_counter_ns() - pumped
    planner.close()
    return times[0] / 1000, times[1] / 1000


# -- with bytes ------------------------------------------------------------------------------------------------


def _onboard_row(backend: Backend, nbytes: int, rounds: int) -> dict[str, Any]:
    """GB/s of onboarding blocks of 1 MiB, 64 a request, against the bare copy of the same pairs, in turns."""
    num_blocks = nbytes // _BLOCK_NBYTES // NUM_REQUEST_BLOCKS * NUM_REQUEST_BLOCKS
    hashes = random_hashes(num_blocks)
    seconds = np.empty((2, rounds))
    with (
        make_manager("1m", backend, device_blocks=num_blocks, host_blocks=num_blocks) as manager,
        TransferEngine(small_nbytes=sys.maxsize, backend=backend) as engine,
    ):
        put_into_host(manager, hashes)
        order = np.random.default_rng(6).permutation(num_blocks).reshape(-1, NUM_REQUEST_BLOCKS)
        requests = [np.ascontiguousarray(hashes[places]) for places in order]
        for i in range(-1, rounds):
            ours, targets = _onboard_all(manager, requests)
            theirs = _copy_all(manager, engine, requests, targets)
            if i >= 0:
                seconds[:, i] = ours, theirs
    speeds = num_blocks * _BLOCK_NBYTES / 1e9 / seconds
    return make_row("onboard_1m", "GB/s", speeds[0], float(np.median(speeds[1])), is_more_better=True)


def _onboard_all(manager: BlockManager, requests: list[Any]) -> tuple[float, list[IdArray]]:
    """Bring each request up; give the seconds of all and where their blocks went."""
    seconds, targets = 0.0, []
    for request in requests:
        began = time.perf_counter()
        blocks = bring_up(manager, request)
        seconds += time.perf_counter() - began
        targets.append(blocks.block_ids)
        blocks.release()
    manager.flush()
    manager.reset_pool("device")
    return seconds, targets


def _copy_all(manager: BlockManager, engine: TransferEngine, requests: list[Any], targets: list[IdArray]) -> float:
    """Copy the same blocks to the same places by themselves, checksums too; give the seconds of all."""
    assert manager.host is not None, "made with a host tier"
    source, destination = manager.storage("host"), manager.storage("device")
    seconds = 0.0
    for request, target in zip(requests, targets, strict=True):
        ids = manager.host.lookup(request)
        began = time.perf_counter()
        result = engine.copy(source, destination, ids, target, hashes=request).result()
        seconds += time.perf_counter() - began
        assert result.good.all(), "the blocks are as they were offloaded"
    return seconds
