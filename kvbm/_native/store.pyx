# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The native store: the contract of the pure twin over ``store_core.hpp``.

The interpreter lock is kept during a call: a batch takes microseconds, a hand-over between threads takes longer. It is
released only to wait for the store's own lock, so that a policy in Python may run under that.
"""

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr

cimport numpy as cnp

from kvbm._native.batches cimport _hashes, _ids, _is_hash_batch, _is_id_batch, _len, _mask, _new_hashes, _new_ids, _new_mask
from kvbm._native.store_core cimport (
    ACTIVE, COMPLETE, FREE, INACTIVE, MUTABLE, NO_FAULT, STALE_FAULT, STATE_FAULT,
    Fault, OutboxRow, OwnedLock, StoreCore, check, kind_of,
)

from operator import index

import numpy as np

from kvbm._plugged import PluggedPolicy
from kvbm.errors import (
    called_back,
    id_out_of_range,
    in_use,
    length_mismatch,
    negative_count,
    stale_restore,
    wrong_num_blocks,
    wrong_priority,
    wrong_state,
)
from kvbm.types import OUTBOX_DTYPE, hash_array, id_array

cnp.import_array()

cdef tuple LABELS = ("free", "mutable", "complete", "active", "inactive", "discarded")


cdef class Store:
    """Blocks 0..num_blocks-1, their states, references, hashes, and the order of eviction; see the pure twin."""

    cdef unique_ptr[StoreCore] _core
    cdef OwnedLock _lock
    cdef object _plugged
    cdef readonly int num_blocks

    def __cinit__(self, num_blocks, *, policy=None, outbox_capacity=65536):
        if not 1 <= index(num_blocks) <= 2**31 - 2:
            raise wrong_num_blocks(num_blocks)
        self.num_blocks = num_blocks
        self._core.reset(new StoreCore(num_blocks, policy is None, outbox_capacity))
        if policy is not None:
            self._plugged = PluggedPolicy(
                policy, num_blocks, hashes_of=self._hashes_of, priority_of=self._priority_of,
                is_inactive=self._is_inactive,
            )

    def allocate(self, n):
        """Take n blocks: free ones first, then evicted ones; None and nothing taken when there are fewer."""
        if index(n) < 0:
            raise negative_count(n)
        cdef StoreCore* core = self._core.get()
        cdef int64_t num_wanted = min(index(n), 2**31)  # no pool has as many
        cdef int64_t num_free, num_evicted
        cdef cnp.ndarray ids, evicted
        self._enter()
        try:
            if num_wanted > core.available():
                return None
            num_free = min(num_wanted, core.num_free())
            num_evicted = num_wanted - num_free
            ids = _new_ids(num_wanted)
            evicted = _new_hashes(num_evicted)
            if self._plugged is not None:
                ids[num_free:] = self._plugged.pop(num_evicted)
            else:
                core.choose_victims(_ids(ids) + num_free, num_evicted)
            core.take_free(_ids(ids), num_free)
            core.evict(_ids(ids) + num_free, num_evicted, _hashes(evicted))
            return ids, evicted
        finally:
            self._lock.unlock()

    def stage(self, ids, hashes, parents):
        """Name filled blocks: MUTABLE -> COMPLETE."""
        cdef cnp.ndarray names = _hash_batch(hashes), above = _hash_batch(parents)
        cdef cnp.ndarray batch = self._batch(ids, hashes=names, parents=above)
        self._enter()
        cdef Fault fault = self._core.get().stage(_ids(batch), _len(batch), _hashes(names), _hashes(above))
        self._lock.unlock()
        _raise(fault, "mutable", "complete")

    def register(self, ids):
        """Publish complete blocks; one whose hash is registered already folds onto the primary."""
        cdef cnp.ndarray batch = self._batch(ids)
        cdef cnp.ndarray primaries = _new_ids(_len(batch)), folded = _new_mask(_len(batch))
        self._enter()
        cdef Fault fault
        try:
            fault = self._core.get().register_(_ids(batch), _len(batch), _ids(primaries), _mask(folded))
            if self._plugged is not None:
                self._plugged.removed(self._noted())
        finally:
            self._lock.unlock()
        _raise(fault, "complete", "register")
        return primaries, folded

    def release(self, ids):
        """Drop one reference for each entry, last entry first; return how many became free or inactive."""
        cdef cnp.ndarray batch = self._batch(ids)
        cdef int64_t num_freed = 0
        cdef list inserted
        self._enter()
        cdef Fault fault
        try:
            fault = self._core.get().release(_ids(batch), _len(batch), &num_freed)
            if self._plugged is not None:
                inserted = self._noted()
                self._plugged.inserted(inserted, [self._priority_of(block_id) for block_id in inserted])
        finally:
            self._lock.unlock()
        _raise(fault, "mutable, complete or active", "release")
        return num_freed

    def match(self, hashes):
        """Find the longest registered prefix and take one reference on each of its blocks."""
        cdef cnp.ndarray names = _hash_batch(hashes)
        cdef cnp.ndarray ids = _new_ids(_len(names))
        cdef int64_t found
        self._enter()
        try:
            found = self._core.get().match(_hashes(names), _len(names), _ids(ids))
            if self._plugged is not None:
                self._plugged.removed(self._noted())
        finally:
            self._lock.unlock()
        return ids if found == _len(names) else ids[:found].copy()

    def find(self, hashes):
        """Give the id of each hash, -1 where absent; changes nothing."""
        cdef cnp.ndarray names = _hash_batch(hashes)
        cdef cnp.ndarray ids = _new_ids(_len(names))
        self._enter()
        self._core.get().find(_hashes(names), _len(names), _ids(ids))
        self._lock.unlock()
        return ids

    def acquire(self, ids, hashes):
        """Take one reference where the id still holds that hash; return where."""
        cdef cnp.ndarray names = _hash_batch(hashes)
        cdef cnp.ndarray batch = self._batch(ids, hashes=names)
        cdef cnp.ndarray mask = _new_mask(_len(batch))
        self._enter()
        try:
            self._core.get().acquire(_ids(batch), _hashes(names), _len(batch), _mask(mask))
            if self._plugged is not None:
                self._plugged.removed(self._noted())
        finally:
            self._lock.unlock()
        return mask

    def touch(self, hashes):
        """Make blocks young again, last entry first; return how many entries are registered."""
        cdef cnp.ndarray names = _hash_batch(hashes)
        self._enter()
        try:
            found = self._core.get().touch(_hashes(names), _len(names))
            if self._plugged is not None:
                self._plugged.touched(self._noted())
        finally:
            self._lock.unlock()
        return found

    def set_priority(self, hashes, priority):
        """Set how long blocks are kept, 0 to 100; return how many entries are registered."""
        if not 0 <= index(priority) <= 100:
            raise wrong_priority(priority)
        cdef cnp.ndarray names = _hash_batch(hashes)
        cdef list changed
        self._enter()
        try:
            found = self._core.get().set_priority(_hashes(names), _len(names), priority)
            if self._plugged is not None:
                changed = self._noted()
                self._plugged.prioritised(changed, [priority] * len(changed))
        finally:
            self._lock.unlock()
        return found

    def remove(self, hashes):
        """Free inactive blocks by hash; return the hashes reset, not found, and in use."""
        cdef cnp.ndarray names = _distinct(_hash_batch(hashes))
        cdef cnp.ndarray outcome = np.empty(_len(names), dtype=np.uint8)
        self._enter()
        try:
            self._core.get().remove(_hashes(names), _len(names), <uint8_t*>cnp.PyArray_DATA(outcome))
            if self._plugged is not None:
                self._plugged.removed(self._noted())
        finally:
            self._lock.unlock()
        return names[outcome == FREE], names[outcome == 5], names[outcome == ACTIVE]

    def discard(self, ids):
        """Unpublish blocks at once; they are FREE when nobody holds them."""
        cdef cnp.ndarray batch = self._batch(ids)
        self._enter()
        cdef Fault fault
        try:
            fault = self._core.get().discard(_ids(batch), _len(batch))
            if self._plugged is not None:
                self._plugged.removed(self._noted())
        finally:
            self._lock.unlock()
        _raise(fault, "active or inactive", "discard")

    def restore(self, ids, hashes, parents, priorities):
        """Put blocks back as inactive at exactly these ids, oldest first."""
        cdef cnp.ndarray names = _hash_batch(hashes), above = _hash_batch(parents)
        cdef list given = [index(priority) for priority in priorities]
        cdef cnp.ndarray levels = np.array([min(max(level, -1), 101) for level in given], dtype=np.int64)
        cdef cnp.ndarray batch = self._batch(ids, hashes=names, parents=above, priorities=levels)
        self._enter()
        cdef Fault fault
        try:
            fault = self._core.get().restore(_ids(batch), _len(batch), _hashes(names), _hashes(above),
                                             <int64_t*>cnp.PyArray_DATA(levels))
            if self._plugged is not None:
                self._plugged.inserted(self._noted(), levels.tolist())
        finally:
            self._lock.unlock()
        _raise(fault, "free", "restore", given)

    def clear(self):
        """Free every inactive block; raise and change nothing when any block is in use."""
        cdef StoreCore* core = self._core.get()
        cdef int64_t busy
        self._enter()
        try:
            busy = core.counts[MUTABLE] + core.counts[COMPLETE] + core.counts[ACTIVE]
            if busy:
                raise in_use(busy)
            cleared = core.clear()
            if self._plugged is not None:
                self._plugged.removed(self._noted())
            return cleared
        finally:
            self._lock.unlock()

    def counts(self):
        """Count blocks by state; the counts add up to num_blocks."""
        self._enter()
        counts = {LABELS[state]: self._core.get().counts[state] for state in range(5)}
        self._lock.unlock()
        return counts

    def states(self, ids):
        """Give the `BlockState` of each id."""
        cdef cnp.ndarray batch = self._batch(ids)
        self._enter()
        states = [self._core.get().record(_ids(batch)[i]).state for i in range(_len(batch))]
        self._lock.unlock()
        return np.array(states, dtype=np.uint8)

    def describe(self, ids):
        """Give hash, parent and priority of each id; zeros and the default where it is not registered."""
        cdef cnp.ndarray batch = self._batch(ids)
        cdef cnp.ndarray hashes = _new_hashes(_len(batch)), parents = _new_hashes(_len(batch))
        cdef cnp.ndarray priorities = np.empty(_len(batch), dtype=np.uint8)
        self._enter()
        self._core.get().describe(
            _ids(batch), _len(batch), _hashes(hashes), _hashes(parents), <uint8_t*>cnp.PyArray_DATA(priorities)
        )
        self._lock.unlock()
        return hashes, parents, priorities

    def registered(self):
        """Give ids, hashes and parents of all registered blocks by id, and the last outbox sequence number."""
        cdef StoreCore* core = self._core.get()
        cdef int32_t block_id
        cdef int64_t n = 0
        cdef cnp.ndarray ids, hashes, parents
        self._enter()
        try:
            ids = _new_ids(core.counts[ACTIVE] + core.counts[INACTIVE])
            hashes, parents = _new_hashes(_len(ids)), _new_hashes(_len(ids))
            for block_id in range(self.num_blocks):
                if core.is_published(block_id):
                    _ids(ids)[n] = block_id
                    _hashes(hashes)[n] = core.record(block_id).hash
                    _hashes(parents)[n] = core.parent(block_id)
                    n += 1
            return ids[:n], hashes[:n], parents[:n], core.outbox.last_seq()
        finally:
            self._lock.unlock()

    def check(self):
        """Verify the invariants; raise AssertionError where one is broken."""
        cdef const char* broken
        self._enter()
        try:
            broken = check(self._core.get()[0])
        finally:
            self._lock.unlock()
        if broken is not NULL:
            raise AssertionError(broken.decode())

    def subscribe(self):
        """Start keeping outbox rows for one more reader."""
        self._enter()
        self._core.get().outbox.subscribe()
        self._lock.unlock()

    def unsubscribe(self):
        """Stop keeping rows when the last reader goes."""
        self._enter()
        self._core.get().outbox.unsubscribe()
        self._lock.unlock()

    def drain(self, max_rows):
        """Take up to max_rows outbox rows, oldest first, as an `OUTBOX_DTYPE` array."""
        cdef cnp.ndarray rows
        cdef size_t limit = min(max(index(max_rows), 0), 2**62)
        self._enter()
        try:
            rows = np.empty(min(limit, self._core.get().outbox.size()), dtype=OUTBOX_DTYPE)
            self._core.get().outbox.drain(<OutboxRow*>cnp.PyArray_DATA(rows), _len(rows))
        finally:
            self._lock.unlock()
        return rows

    cdef int _enter(self) except -1:
        cdef unsigned long me = PyThread_get_thread_ident()
        if self._lock.is_mine(me):
            raise called_back()
        if not self._lock.try_lock(me):
            with nogil:
                self._lock.lock(me)
        return 0

    cdef cnp.ndarray _batch(self, object ids, cnp.ndarray hashes=None, cnp.ndarray parents=None,
                            cnp.ndarray priorities=None):
        """Check form, then lengths of the batches that go with it, then range."""
        cdef cnp.ndarray batch = ids if _is_id_batch(ids) else id_array(ids)
        cdef cbool is_narrow = cnp.PyArray_TYPE(batch) == cnp.NPY_INT32
        cdef int64_t i, block_id
        for name, other in (("hashes", hashes), ("parents", parents), ("priorities", priorities)):
            if other is not None and len(other) != _len(batch):
                raise length_mismatch(name, len(other), _len(batch))
        for i in range(_len(batch)):
            block_id = _ids(batch)[i] if is_narrow else (<int64_t*>cnp.PyArray_DATA(batch))[i]
            if block_id < 0 or block_id >= self.num_blocks:
                raise id_out_of_range(block_id, self.num_blocks)
        return batch if is_narrow else batch.astype(np.int32)

    cdef list _noted(self):
        """Take the ids that the policy must be told of."""
        ids = list(self._core.get().noted)
        self._core.get().noted.clear()
        return ids

    def _hashes_of(self, ids):
        cdef cnp.ndarray hashes = _new_hashes(len(ids))
        for i, block_id in enumerate(ids):
            _hashes(hashes)[<int64_t>i] = self._core.get().record(block_id).hash
        return hashes

    def _priority_of(self, int32_t block_id):
        return self._core.get().record(block_id).priority

    def _is_inactive(self, int32_t block_id):
        return self._core.get().record(block_id).state == INACTIVE


cdef inline cnp.ndarray _hash_batch(object hashes):
    return hashes if _is_hash_batch(hashes) else hash_array(hashes)


cdef cnp.ndarray _distinct(cnp.ndarray names):
    """Each hash once, in the order first seen."""
    _, first = np.unique(names, axis=0, return_index=True)
    return names[np.sort(first)]


cdef int _raise(const Fault& fault, str needed, str verb, list priorities=None) except -1:
    """Raise what a refused batch calls for."""
    cdef int kind = kind_of(fault.kind)
    if kind == NO_FAULT:
        return 0
    if kind == STATE_FAULT:
        raise wrong_state(fault.value, LABELS[fault.label], needed, verb)
    if kind == STALE_FAULT:
        raise stale_restore(fault.value)
    raise wrong_priority(priorities[fault.value])
