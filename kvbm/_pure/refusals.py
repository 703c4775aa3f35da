"""What a batch of ids is refused for, found before the store changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvbm._pure.containers import BlockRecord
from kvbm.errors import wrong_state
from kvbm.types import BlockState


def label_of(records: Mapping[int, BlockRecord], block_id: int) -> str:
    """Name the state of a block as messages do."""
    record = records.get(block_id)
    if record is None:
        return BlockState.FREE.label
    return "discarded" if record.is_discarded else record.state.label


def need_state(
    records: Mapping[int, BlockRecord], block_ids: Sequence[int], state: BlockState, then: BlockState, verb: str
) -> None:
    """Refuse a batch unless every id is in `state`; an id that comes again is seen as `then`."""
    seen: set[int] = set()
    for block_id in block_ids:
        label = then.label if block_id in seen else label_of(records, block_id)
        if label != state.label:
            raise wrong_state(block_id, label, state.label, verb)
        seen.add(block_id)


def need_references(records: Mapping[int, BlockRecord], block_ids: Sequence[int]) -> None:
    """Refuse a batch unless every id has a reference for each time it stands there."""
    dropped: dict[int, int] = {}
    for block_id in block_ids:
        record = records.get(block_id)
        already = dropped.get(block_id, 0)
        if record is None or already >= record.references:
            label = label_of(records, block_id)
            if already:
                label = "inactive" if label == "active" else "free"
            raise wrong_state(block_id, label, "mutable, complete or active", "release")
        dropped[block_id] = already + 1
