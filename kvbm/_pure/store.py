"""The reference store: who holds which block, what it is called, and who leaves next.

Every call takes a batch, validates it whole before it changes anything, and holds the one lock. Records appear when a
block is first used. The native twin keeps the same contract; a test compares every answer of the two.
"""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._plugged import PluggedPolicy
from kvbm._pure.batches import ids_in, names_of, to_hash_array, to_id_array
from kvbm._pure.containers import ZERO, BlockRecord, FreeList, LruQueue, Outbox
from kvbm._pure.invariants import check_queues, check_records, check_registry
from kvbm._pure.lock import OwnedLock
from kvbm._pure.refusals import label_of, need_references, need_state
from kvbm.errors import (
    in_use,
    negative_count,
    stale_restore,
    wrong_num_blocks,
    wrong_priority,
    wrong_state,
)
from kvbm.types import (
    DEFAULT_PRIORITY,
    MAX_PRIORITY,
    BlockState,
    HashArray,
    IdArray,
    OutboxKind,
)

FREE, MUTABLE, COMPLETE = BlockState.FREE, BlockState.MUTABLE, BlockState.COMPLETE
ACTIVE, INACTIVE = BlockState.ACTIVE, BlockState.INACTIVE


class Store:
    """Blocks 0..num_blocks-1, their states, references, hashes, and the order of eviction.

    Parameters
    ----------
    num_blocks : int
        1 to 2**31 - 2.
    policy : object, optional
        An eviction policy (`kvbm.eviction.base.EvictionPolicy`); None is the built-in LRU.
    outbox_capacity : int
        Rows kept for a reader before it finds a GAP.
    """

    def __init__(self, num_blocks: int, *, policy: Any = None, outbox_capacity: int = 65536) -> None:
        if not 1 <= index(num_blocks) <= 2**31 - 2:
            raise wrong_num_blocks(num_blocks)
        self.num_blocks = num_blocks
        self._lock = OwnedLock()
        self._records: dict[int, BlockRecord] = {}  # absent = free and never used
        self._registry: dict[bytes, int] = {}  # sequence hash -> its one primary
        self._free = FreeList(num_blocks)
        self._inactive = LruQueue() if policy is None else self._plug(policy)
        self._num_in_state = [num_blocks, 0, 0, 0, 0]  # by BlockState
        self._outbox = Outbox(outbox_capacity)

    # -- life of a block ---------------------------------------------------------------------------------------

    def allocate(self, n: int) -> tuple[IdArray, HashArray] | None:
        """Take n blocks: free ones first, then evicted ones; None and nothing taken when there are fewer."""
        if index(n) < 0:
            raise negative_count(n)
        with self._lock.unless_mine():
            if n > self._num_in_state[FREE] + self._num_in_state[INACTIVE]:
                return None
            num_free = min(n, len(self._free))
            victims = self._inactive.pop(n - num_free)
            ids = self._free.take(num_free)
            evicted = [self._unpublish(block_id) for block_id in victims]
            ids.extend(victims)
            for block_id in ids:
                self._move(block_id, MUTABLE, references=1)
                self._records[block_id].priority = DEFAULT_PRIORITY
            return to_id_array(ids), to_hash_array(evicted)

    def stage(self, ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        """Name filled blocks: MUTABLE -> COMPLETE."""
        names, above = names_of(hashes), names_of(parents)
        block_ids = ids_in(self.num_blocks, ids, hashes=names, parents=above)
        with self._lock.unless_mine():
            need_state(self._records, block_ids, MUTABLE, COMPLETE, "complete")
            for block_id, name, parent in zip(block_ids, names, above, strict=True):
                self._move(block_id, COMPLETE, references=1)
                record = self._records[block_id]
                record.hash, record.parent = name, parent

    def register(self, ids: IdArray) -> tuple[IdArray, npt.NDArray[np.bool_]]:
        """Publish complete blocks; one whose hash is registered already folds onto the primary."""
        block_ids = ids_in(self.num_blocks, ids)
        with self._lock.unless_mine():
            need_state(self._records, block_ids, COMPLETE, ACTIVE, "register")
            primaries, folded = [], []
            revived: list[int] = []
            for block_id in block_ids:
                record = self._records[block_id]
                primary = self._registry.setdefault(record.hash, block_id)
                primaries.append(primary)
                folded.append(primary != block_id)
                if primary == block_id:
                    self._move(block_id, ACTIVE, references=1)
                    self._outbox.append(OutboxKind.CREATED, block_id, record.hash, record.parent)
                    continue
                self._reference(primary, revived)
                self._make_free(block_id)
                self._free.put([block_id])
            self._inactive.removed(revived)
            return to_id_array(primaries), np.array(folded, dtype=np.bool_)

    def release(self, ids: IdArray) -> int:
        """Drop one reference for each entry, last entry first; return how many became free or inactive."""
        block_ids = ids_in(self.num_blocks, ids)
        with self._lock.unless_mine():
            need_references(self._records, block_ids)
            freed, inserted = [], []
            for block_id in reversed(block_ids):
                record = self._records[block_id]
                record.references -= 1
                if record.references:
                    continue
                if record.state is ACTIVE and not record.is_discarded:
                    self._move(block_id, INACTIVE, references=0)
                    inserted.append(block_id)
                else:
                    self._make_free(block_id)
                    freed.append(block_id)
            self._free.put(freed)
            self._inactive.inserted(inserted, [self._records[block_id].priority for block_id in inserted])
            return len(freed) + len(inserted)

    # -- finding -----------------------------------------------------------------------------------------------

    def match(self, hashes: HashArray) -> IdArray:
        """Find the longest registered prefix and take one reference on each of its blocks."""
        names = names_of(hashes)
        with self._lock.unless_mine():
            ids: list[int] = []
            revived: list[int] = []
            for name in names:
                block_id = self._registry.get(name)
                if block_id is None:
                    break
                self._reference(block_id, revived)
                ids.append(block_id)
            self._inactive.removed(revived)
            return to_id_array(ids)

    def find(self, hashes: HashArray) -> IdArray:
        """Give the id of each hash, -1 where absent; changes nothing."""
        names = names_of(hashes)
        with self._lock.unless_mine():
            return to_id_array([self._registry.get(name, -1) for name in names])

    def acquire(self, ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Take one reference where the id still holds that hash; return where."""
        names = names_of(hashes)
        block_ids = ids_in(self.num_blocks, ids, hashes=names)
        with self._lock.unless_mine():
            revived: list[int] = []
            mask = []
            for block_id, name in zip(block_ids, names, strict=True):
                mask.append(self._registry.get(name) == block_id)
                if mask[-1]:
                    self._reference(block_id, revived)
            self._inactive.removed(revived)
            return np.array(mask, dtype=np.bool_)

    # -- order of eviction -------------------------------------------------------------------------------------

    def touch(self, hashes: HashArray) -> int:
        """Make blocks young again, last entry first; return how many entries are registered."""
        names = names_of(hashes)
        with self._lock.unless_mine():
            found = [self._registry[name] for name in reversed(names) if name in self._registry]
            self._inactive.touched([i for i in found if self._records[i].state is INACTIVE])
            return len(found)

    def set_priority(self, hashes: HashArray, priority: int) -> int:
        """Set how long blocks are kept, 0 to 100; return how many entries are registered."""
        if not 0 <= index(priority) <= MAX_PRIORITY:
            raise wrong_priority(priority)
        names = names_of(hashes)
        with self._lock.unless_mine():
            found = [self._registry[name] for name in reversed(names) if name in self._registry]
            changed = []
            for block_id in found:
                record = self._records[block_id]
                if record.priority != priority and record.state is INACTIVE:
                    changed.append(block_id)
                record.priority = priority
            self._inactive.prioritised(changed, [priority] * len(changed))
            return len(found)

    # -- taking names away -------------------------------------------------------------------------------------

    def remove(self, hashes: HashArray) -> tuple[HashArray, HashArray, HashArray]:
        """Free inactive blocks by hash; return the hashes reset, not found, and in use."""
        names = list(dict.fromkeys(names_of(hashes)))
        with self._lock.unless_mine():
            reset, not_found, busy, ids = [], [], [], []
            for name in names:
                block_id = self._registry.get(name)
                if block_id is None:
                    not_found.append(name)
                elif self._records[block_id].state is ACTIVE:
                    busy.append(name)
                else:
                    reset.append(name)
                    ids.append(block_id)
            self._free_inactive(ids)
            return to_hash_array(reset), to_hash_array(not_found), to_hash_array(busy)

    def discard(self, ids: IdArray) -> None:
        """Unpublish blocks at once, unless they are already; they are FREE when nobody holds them."""
        block_ids = ids_in(self.num_blocks, ids)
        with self._lock.unless_mine():
            chosen: dict[int, None] = {}
            for block_id in block_ids:
                label = label_of(self._records, block_id)
                if block_id in chosen and label == "inactive":
                    label = "free"
                if label not in ("active", "inactive", "discarded"):
                    raise wrong_state(block_id, label, "active or inactive", "discard")
                if label != "discarded":
                    chosen[block_id] = None
            freed = []
            for block_id in chosen:
                self._unpublish(block_id)
                if self._records[block_id].state is INACTIVE:
                    self._make_free(block_id)
                    freed.append(block_id)
                else:
                    self._records[block_id].is_discarded = True
            self._free.put(freed)
            self._inactive.removed(freed)

    def restore(self, ids: IdArray, hashes: HashArray, parents: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Put blocks back as inactive at exactly these ids, oldest first."""
        names, above = names_of(hashes), names_of(parents)
        levels = [index(priority) for priority in priorities]
        block_ids = ids_in(self.num_blocks, ids, hashes=names, parents=above, priorities=levels)
        with self._lock.unless_mine():
            seen_ids: set[int] = set()
            seen_names: set[bytes] = set()
            for block_id, name, priority in zip(block_ids, names, levels, strict=True):
                label = "inactive" if block_id in seen_ids else label_of(self._records, block_id)
                if label != "free":
                    raise wrong_state(block_id, label, "free", "restore")
                if name in self._registry or name in seen_names:
                    raise stale_restore(block_id)
                if not 0 <= priority <= MAX_PRIORITY:
                    raise wrong_priority(priority)
                seen_ids.add(block_id)
                seen_names.add(name)
            self._free.remove(block_ids)
            for block_id, name, parent, priority in zip(block_ids, names, above, levels, strict=True):
                self._move(block_id, INACTIVE, references=0)
                record = self._records[block_id]
                record.hash, record.parent, record.priority = name, parent, priority
                self._registry[name] = block_id
                self._outbox.append(OutboxKind.CREATED, block_id, name, parent)
            self._inactive.inserted(block_ids, levels)

    def clear(self) -> int:
        """Free every inactive block; raise and change nothing when any block is in use."""
        with self._lock.unless_mine():
            busy = sum(self._num_in_state[state] for state in (MUTABLE, COMPLETE, ACTIVE))
            if busy:
                raise in_use(busy)
            queue = self._inactive
            ids = list(queue) if isinstance(queue, LruQueue) else sorted(self._registry.values())
            self._free_inactive(ids)
            return len(ids)

    # -- looking -----------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Count blocks by state; the counts add up to num_blocks."""
        with self._lock.unless_mine():
            return {state.label: self._num_in_state[state] for state in BlockState}

    def states(self, ids: IdArray) -> npt.NDArray[np.uint8]:
        """Give the `BlockState` of each id."""
        block_ids = ids_in(self.num_blocks, ids)
        with self._lock.unless_mine():
            return np.array([self._record(i).state for i in block_ids], dtype=np.uint8)

    def describe(self, ids: IdArray) -> tuple[HashArray, HashArray, npt.NDArray[np.uint8]]:
        """Give hash, parent and priority of each id; zeros and the default where it is not registered."""
        block_ids = ids_in(self.num_blocks, ids)
        with self._lock.unless_mine():
            return self._described(block_ids)

    def registered(self) -> tuple[IdArray, HashArray, HashArray, int]:
        """Give ids, hashes and parents of all registered blocks by id, and the last outbox sequence number."""
        with self._lock.unless_mine():
            ids = sorted(self._registry.values())
            return to_id_array(ids), *self._described(ids)[:2], self._outbox.last_seq

    def check(self) -> None:
        """Verify the invariants; raise AssertionError where one is broken."""
        with self._lock.unless_mine():
            check_records(self.num_blocks, self._num_in_state, self._records)
            check_registry(self._records, self._registry)
            check_queues(self._records, self._free, self._inactive)

    # -- outbox ------------------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """Start keeping outbox rows for one more reader."""
        with self._lock.unless_mine():
            self._outbox.subscribe()

    def unsubscribe(self) -> None:
        """Stop keeping rows when the last reader goes."""
        with self._lock.unless_mine():
            self._outbox.unsubscribe()

    def drain(self, max_rows: int) -> npt.NDArray[Any]:
        """Take up to max_rows rows, oldest first, as an `OUTBOX_DTYPE` array."""
        with self._lock.unless_mine():
            return self._outbox.drain(max(index(max_rows), 0))

    def _plug(self, policy: Any) -> PluggedPolicy:
        records = self._records
        return PluggedPolicy(
            policy,
            self.num_blocks,
            hashes_of=lambda ids: to_hash_array([records[block_id].hash for block_id in ids]),
            priority_of=lambda block_id: records[block_id].priority,
            is_inactive=lambda block_id: block_id in records and records[block_id].state is INACTIVE,
        )

    def _record(self, block_id: int) -> BlockRecord:
        return self._records.get(block_id) or BlockRecord()

    def _described(self, block_ids: list[int]) -> tuple[HashArray, HashArray, npt.NDArray[np.uint8]]:
        is_named = [label_of(self._records, block_id) in ("active", "inactive") for block_id in block_ids]
        records = [self._record(i) if named else BlockRecord() for i, named in zip(block_ids, is_named, strict=True)]
        hashes, parents = to_hash_array([r.hash for r in records]), to_hash_array([r.parent for r in records])
        return hashes, parents, np.array([r.priority for r in records], dtype=np.uint8)

    def _move(self, block_id: int, state: BlockState, *, references: int) -> None:
        record = self._records.get(block_id)
        if record is None:
            record = self._records[block_id] = BlockRecord()
        self._num_in_state[record.state] -= 1
        self._num_in_state[state] += 1
        record.state, record.references = state, references

    def _reference(self, block_id: int, revived: list[int]) -> None:
        record = self._records[block_id]
        if record.state is INACTIVE:
            self._move(block_id, ACTIVE, references=1)
            revived.append(block_id)
        else:
            record.references += 1

    def _unpublish(self, block_id: int) -> bytes:
        record = self._records[block_id]
        del self._registry[record.hash]
        self._outbox.append(OutboxKind.DELETED, block_id, record.hash, record.parent)
        return record.hash

    def _make_free(self, block_id: int) -> None:
        self._move(block_id, FREE, references=0)
        record = self._records[block_id]
        record.hash, record.parent, record.is_discarded = ZERO, ZERO, False

    def _free_inactive(self, ids: list[int]) -> None:
        for block_id in ids:
            self._unpublish(block_id)
            self._make_free(block_id)
        self._free.put(ids)
        self._inactive.removed(ids)
