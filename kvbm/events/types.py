"""The event that a subscriber sees, under the names of the commission."""

from __future__ import annotations

import enum

import msgspec

from kvbm.types import SequenceHash, Tier


class KvEventType(str, enum.Enum):
    """What an event tells."""

    CREATED = "created"  # registered: other requests can find the block from now on
    DELETED = "deleted"  # evicted, reset or discarded: it is found no more
    MIGRATED = "migrated"  # stored in another tier
    GAP = "gap"  # rows were lost: take the pool's registered blocks as the new state


class KvEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one block.

    Attributes
    ----------
    event_type : KvEventType
    block_id : int
        Slot in the tier; -1 for a gap.
    worker_id : str
    timestamp : int
        Nanoseconds since the epoch, taken when the row left the outbox.
    sequence_number : int
        Counts rows of one pool without holes; a gap carries the number of the last row lost.
    sequence_hash, parent_hash : SequenceHash
        Sixteen zero bytes as parent: the block begins a sequence.
    tier : Tier
    metadata : dict of str to str
        What the pool was given for its events, e.g. the model's name.
    """

    event_type: KvEventType
    block_id: int
    worker_id: str
    timestamp: int
    sequence_number: int
    sequence_hash: SequenceHash
    parent_hash: SequenceHash
    tier: Tier
    metadata: dict[str, str] = {}
