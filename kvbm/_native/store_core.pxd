# What store.pyx uses of store_core.hpp, store_check.hpp and owned_lock.hpp.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

cdef extern from "store_core.hpp" namespace "kvbm" nogil:
    cdef enum:
        FREE
        MUTABLE
        COMPLETE
        ACTIVE
        INACTIVE
    cdef cppclass Hash:
        uint64_t lo
        uint64_t hi
    cdef cppclass FaultKind:
        pass
    cdef cppclass Fault:
        FaultKind kind
        int64_t value
        int label
    cdef cppclass Record:
        Hash hash
        uint8_t state
        uint8_t priority
    cdef cppclass OutboxRow:
        pass
    cdef cppclass OutboxRing:
        size_t size()
        uint64_t last_seq()
        void subscribe() except +
        void unsubscribe()
        void drain(OutboxRow* out, size_t n)
    cdef cppclass StoreCore:
        StoreCore(int32_t num_blocks, cbool has_lists, size_t outbox_capacity) except +
        int64_t num_free()
        int64_t available()
        void take_free(int32_t* ids, int64_t n)
        void choose_victims(int32_t* ids, int64_t n)
        void evict(const int32_t* ids, int64_t n, Hash* evicted)
        Fault stage(const int32_t* ids, int64_t n, const Hash* hashes, const Hash* parents)
        Fault register_(const int32_t* ids, int64_t n, int32_t* primaries, cbool* folded)
        Fault release(const int32_t* ids, int64_t n, int64_t* num_freed)
        int64_t match(const Hash* hashes, int64_t n, int32_t* ids)
        void find(const Hash* hashes, int64_t n, int32_t* ids)
        void acquire(const int32_t* ids, const Hash* hashes, int64_t n, cbool* mask)
        int64_t touch(const Hash* hashes, int64_t n)
        void describe(const int32_t* ids, int64_t n, Hash* hashes, Hash* parents, uint8_t* priorities)
        int64_t set_priority(const Hash* hashes, int64_t n, uint8_t priority)
        void remove(const Hash* hashes, int64_t n, uint8_t* outcome)
        Fault discard(const int32_t* ids, int64_t n)
        Fault restore(const int32_t* ids, int64_t n, const Hash* hashes, const Hash* parents, const int64_t* priorities)
        int64_t clear()
        const Record& record(int32_t block_id)
        const Hash& parent(int32_t block_id)
        cbool is_published(int32_t block_id)
        OutboxRing outbox
        int64_t[5] counts
        vector[int32_t] noted

cdef extern from "store_core.hpp" nogil:
    int NO_FAULT "int(kvbm::FaultKind::none)"
    int STATE_FAULT "int(kvbm::FaultKind::state)"
    int STALE_FAULT "int(kvbm::FaultKind::stale)"
    int kind_of "int" (FaultKind kind)

cdef extern from "store_check.hpp" namespace "kvbm" nogil:
    const char* check(const StoreCore& core) except +

cdef extern from "owned_lock.hpp" namespace "kvbm" nogil:
    cdef cppclass OwnedLock:
        cbool is_mine(unsigned long me)
        cbool try_lock(unsigned long me)
        void lock(unsigned long me)
        void unlock()
