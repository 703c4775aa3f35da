"""What must hold in a reference store between any two calls; tests ask after every step."""

from __future__ import annotations

from collections import Counter

from kvbm._plugged import PluggedPolicy
from kvbm._pure.containers import BlockRecord, FreeList, LruQueue
from kvbm.types import BlockState

REGISTERED = (BlockState.ACTIVE, BlockState.INACTIVE)
HELD = (BlockState.MUTABLE, BlockState.COMPLETE, BlockState.ACTIVE)


def check_records(num_blocks: int, num_in_state: list[int], records: dict[int, BlockRecord]) -> None:
    """Verify that the counts add up and that exactly the held blocks have references."""
    states = Counter(record.state for record in records.values())
    states[BlockState.FREE] += num_blocks - len(records)
    for state in BlockState:
        assert states[state] == num_in_state[state], (
            f"{states[state]} blocks {state.label}, {num_in_state[state]} counted"
        )
    for block_id, record in records.items():
        assert (record.references > 0) == (record.state in HELD), f"references of block {block_id}"


def check_registry(records: dict[int, BlockRecord], registry: dict[bytes, int]) -> None:
    """Verify that each published hash leads to its one primary, and nothing else is published."""
    num_published = 0
    for block_id, record in records.items():
        is_published = record.state in REGISTERED and not record.is_discarded
        num_published += is_published
        if is_published:
            assert registry.get(record.hash) == block_id, f"block {block_id} is not the primary of its hash"
    assert len(registry) == num_published, f"{len(registry)} hashes, {num_published} published blocks"


def check_queues(records: dict[int, BlockRecord], free: FreeList, inactive: LruQueue | PluggedPolicy) -> None:
    """Verify that the free list holds the free blocks and the LRU queue the inactive ones, once each."""
    free_ids = list(free)
    assert len(free_ids) == len(set(free_ids)), "an id is free twice"
    for block_id in free_ids:
        assert block_id not in records or records[block_id].state is BlockState.FREE, f"block {block_id} is not free"
    num_used = sum(record.state is not BlockState.FREE for record in records.values())
    assert len(free_ids) == free.num_blocks - num_used, "free blocks are missing from the free list"
    if isinstance(inactive, LruQueue):
        queued = list(inactive)
        expected = {block_id for block_id, record in records.items() if record.state is BlockState.INACTIVE}
        assert len(queued) == len(expected), "queued and inactive blocks differ in number"
        assert set(queued) == expected, "queued and inactive blocks differ"
        for block_id in queued:
            assert inactive.priority_of(block_id) == records[block_id].priority, f"priority of block {block_id}"
