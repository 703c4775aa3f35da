"""Serves one request through a manager: hash, match, onboard, allocate, fill, register, release as one guard.

Bytes are real: what a block must hold follows from its hash, is written on a miss and compared on every hit. Work on
bytes goes in slices, so memory stays bounded whatever a request's size. Nothing is held when a request ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.errors import NotEnoughBlocksAvailable
from kvbm.manager import BlockManager
from kvbm.planner import Hit
from kvbm.replay.content import content_of
from kvbm.replay.report import Served
from kvbm.replay.traces import TraceRequest
from kvbm.types import HashArray, SequenceHash

_SLICE_NBYTES = 4 << 20


def hashes_of(manager: BlockManager, request: TraceRequest) -> HashArray:
    """Give the block hashes of a request: (num_blocks, 2) uint64, host."""
    if request.hashes is not None:
        return request.hashes
    return manager.sequence(request.tokens, salt=request.salt).hashes


def serve(
    manager: BlockManager, hashes: HashArray, *, timeout_s: float, flush_timeout_s: float | None = None
) -> Served:
    """Serve one request and check every byte of its hits.

    Parameters
    ----------
    manager : BlockManager
    hashes : (num_blocks, 2) uint64, host
    timeout_s : float
        Seconds to wait for room: what others release, and offloads under way.
    flush_timeout_s : float, optional
        Keep the blocks until they are offloaded, for so many seconds at most; None releases them at once.

    Raises
    ------
    TransferTimeout
        They are not offloaded by then.
    """
    served = Served()
    if len(hashes) > manager.top.total_blocks:
        served.refused = "too_large"
        return served
    clock = _Clock(served)
    hit = manager.match_sequence_hashes(hashes)
    clock.took("match")
    found = {tier: num_blocks for tier, num_blocks in hit.tiers.items() if num_blocks}
    try:
        blocks = _onboard(manager, hit, timeout_s)
    except NotEnoughBlocksAvailable:
        hit.release()
        served.refused = "no_room"
        return served
    clock.took("onboard")
    with blocks:
        _verify(manager, blocks, served)
        num_hits = len(blocks)
        clock.restart()
        try:
            fresh = manager.allocate_blocks(len(hashes) - num_hits, timeout=timeout_s)
        except NotEnoughBlocksAvailable:
            served.refused = "no_room"
            return served
        clock.took("allocate")
        served.blocks, served.hit_blocks, served.hits_by_tier = len(hashes), num_hits, found
        with fresh:
            _fill(manager, fresh, hashes[num_hits:], served)
            clock.restart()
            parent = SequenceHash(hashes[num_hits - 1].tobytes()) if num_hits else None
            whole = blocks + manager.register_blocks(fresh.complete(hashes[num_hits:], parent=parent))
            clock.took("register")
    with whole:
        if flush_timeout_s is not None and len(manager.status()) > 1:
            manager.flush(flush_timeout_s)
            clock.took("flush")
    clock.took("release")
    return served


def _onboard(manager: BlockManager, hit: Hit, timeout_s: float) -> ImmutableBlocks:
    """Onboard a hit; where offloads under way hold the room for it, wait for them."""
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            return manager.onboard(hit).result()
        except NotEnoughBlocksAvailable as error:
            remaining_s = give_up - time.monotonic()
            if remaining_s <= 0:
                raise
            manager.allocate_blocks(error.requested, timeout=remaining_s).release()


def _fill(manager: BlockManager, blocks: MutableBlocks, hashes: HashArray, served: Served) -> None:
    storage, ids, nbytes = manager.storage(manager.top.tier), blocks.block_ids, manager.layout.block_nbytes
    for part in _slices(len(ids), nbytes):
        storage.write(ids[part], content_of(hashes[part], nbytes))
    served.written_bytes += len(ids) * nbytes


def _verify(manager: BlockManager, blocks: ImmutableBlocks, served: Served) -> None:
    storage, ids, nbytes = manager.storage(manager.top.tier), blocks.block_ids, manager.layout.block_nbytes
    for part in _slices(len(ids), nbytes):
        found, expected = storage.read(ids[part]), content_of(blocks.hashes[part], nbytes)
        if not np.array_equal(found, expected):
            wrong = (found != expected).sum(axis=1)
            first = int(np.flatnonzero(wrong)[0])
            name = SequenceHash(blocks.hashes[part][first].tobytes()).hex()
            served.first_wrong = served.first_wrong or f"block {ids[part][first]}, hash {name}"
            served.wrong_bytes += int(wrong.sum())
    served.verified_bytes += len(ids) * nbytes


def _slices(num_blocks: int, block_nbytes: int) -> Sequence[slice]:
    step = max(1, _SLICE_NBYTES // block_nbytes)
    return [slice(start, start + step) for start in range(0, num_blocks, step)]


class _Clock:
    """Times the manager's calls, not the bytes between them."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._began = time.perf_counter_ns()

    def took(self, call: str) -> None:
        now = time.perf_counter_ns()
        self._served.call_ns.append((call, now - self._began))
        self._began = now

    def restart(self) -> None:
        self._began = time.perf_counter_ns()
