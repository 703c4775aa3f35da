"""Sends every request of a trace through a manager: hash, match, allocate, fill, register, release as one guard.

Bytes are real: what a block must hold follows from its hash, is written on a miss and compared on every hit. Work on
bytes goes in slices, so memory stays bounded whatever a request's size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.manager import BlockManager
from kvbm.replay.content import content_of
from kvbm.replay.report import ReplayReport
from kvbm.replay.traces import TraceRequest
from kvbm.types import HashArray, SequenceHash

_SLICE_NBYTES = 4 << 20


def replay(
    manager: BlockManager,
    requests: Iterable[TraceRequest],
    *,
    report: ReplayReport | None = None,
    on_progress: Callable[[ReplayReport], None] | None = None,
) -> ReplayReport:
    """Replay requests one after the other.

    Parameters
    ----------
    manager : BlockManager
    requests : iterable of TraceRequest
        Making or reading them is not counted in the report's `seconds`.
    report : ReplayReport, optional
        Filled as the replay goes, so that it is there when the replay is interrupted.
    on_progress : callable, optional
        Called with the report after each request.

    Returns
    -------
    ReplayReport
        `wrong_bytes` is 0 when every hit held what had been written.
    """
    report = ReplayReport() if report is None else report
    try:
        for request in requests:
            began = time.perf_counter()
            try:
                _serve(manager, request, report)
            finally:
                report.seconds += time.perf_counter() - began
            if on_progress is not None:
                on_progress(report)
    finally:
        report.evictions = manager.top.status().evictions
    return report


def _serve(manager: BlockManager, request: TraceRequest, report: ReplayReport) -> None:
    hashes = request.hashes
    if hashes is None:
        hashes = manager.sequence(request.tokens, salt=request.salt).hashes
    report.requests += 1
    if len(hashes) > manager.top.total_blocks:
        report.refused += 1
        return
    clock = _Clock(report)
    hit = manager.match_sequence_hashes(hashes)
    tiers = hit.tiers
    blocks = manager.onboard(hit).result()
    clock.took("match")
    with blocks:
        _verify(manager, blocks, report)
        clock.restart()
        fresh = manager.try_allocate_blocks(len(hashes) - len(blocks))
        clock.took("allocate")
        if fresh is None:  # nothing else is in use here, so this is a leak and must not pass unseen
            raise AssertionError(f"{len(hashes)} blocks should fit: {manager.top.status()}")
        num_hits = len(blocks)
        report.blocks += len(hashes)
        report.hit_blocks += num_hits
        for tier, num_blocks in tiers.items():
            report.hits_by_tier[tier] = report.hits_by_tier.get(tier, 0) + num_blocks
        with fresh:
            _fill(manager, fresh, hashes[num_hits:], report)
            clock.restart()
            parent = SequenceHash(hashes[num_hits - 1].tobytes()) if num_hits else None
            whole = blocks + manager.register_blocks(fresh.complete(hashes[num_hits:], parent=parent))
            clock.took("register")
    whole.release()
    clock.took("release")


def _fill(manager: BlockManager, blocks: MutableBlocks, hashes: HashArray, report: ReplayReport) -> None:
    storage, ids, nbytes = manager.storage(manager.top.tier), blocks.block_ids, manager.layout.block_nbytes
    for part in _slices(len(ids), nbytes):
        storage.write(ids[part], content_of(hashes[part], nbytes))
    report.written_bytes += len(ids) * nbytes


def _verify(manager: BlockManager, blocks: ImmutableBlocks, report: ReplayReport) -> None:
    storage, ids, nbytes = manager.storage(manager.top.tier), blocks.block_ids, manager.layout.block_nbytes
    for part in _slices(len(ids), nbytes):
        found, expected = storage.read(ids[part]), content_of(blocks.hashes[part], nbytes)
        if not np.array_equal(found, expected):
            wrong = (found != expected).sum(axis=1)
            first = int(np.flatnonzero(wrong)[0])
            name = SequenceHash(blocks.hashes[part][first].tobytes()).hex()
            report.first_wrong = report.first_wrong or f"block {ids[part][first]}, hash {name}"
            report.wrong_bytes += int(wrong.sum())
    report.verified_bytes += len(ids) * nbytes


def _slices(num_blocks: int, block_nbytes: int) -> Sequence[slice]:
    step = max(1, _SLICE_NBYTES // block_nbytes)
    return [slice(start, start + step) for start in range(0, num_blocks, step)]


class _Clock:
    """Times the manager's calls, not the bytes between them."""

    def __init__(self, report: ReplayReport) -> None:
        self._report = report
        self._began = time.perf_counter_ns()

    def took(self, call: str) -> None:
        now = time.perf_counter_ns()
        self._report.call_ns[call].append(now - self._began)
        self._began = now

    def restart(self) -> None:
        self._began = time.perf_counter_ns()
