// The native store without Python: states, references, hashes, order of eviction. The caller holds the lock.
//
// Every call validates its whole batch first and answers with a Fault, or changes everything. Batches are worked off in
// passes over slices of kSlice entries: one pass prefetches what the next one reads. Where a policy of the user's decides
// about eviction (has_lists false), ids that it must be told of are left in `noted`.
#pragma once

#include <algorithm>
#include <vector>

#include "block_lists.hpp"
#include "block_table.hpp"
#include "outbox_ring.hpp"

namespace kvbm {

constexpr int64_t kSlice = 256;

class StoreCore {
 public:
  StoreCore(int32_t num_blocks, bool has_lists, size_t outbox_capacity)
      : num_blocks_(num_blocks),
        has_lists_(has_lists),
        records_(size_t(num_blocks)),
        parents_(size_t(num_blocks)),
        table_(size_t(num_blocks), records_.data()),
        free_(num_blocks, records_.data()),
        lists_(records_.data()),
        outbox(outbox_capacity) {
    counts[FREE] = num_blocks;
  }

  int64_t num_free() const { return free_.size(); }
  int64_t available() const { return counts[FREE] + counts[INACTIVE]; }

  void take_free(int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      ids[i] = free_.take();
      const int32_t next = free_.peek();
      if (next != NONE) prefetch(&records_[next]);
      begin(ids[i]);
    }
    counts[FREE] -= n;
    counts[MUTABLE] += n;
  }

  // The n blocks that the built-in policy evicts next; their slots are on the way into the cache.
  void choose_victims(int32_t* ids, int64_t n) {
    int32_t id = lists_.first();
    for (int64_t i = 0; i < n; ++i) {
      ids[i] = id;
      table_.prefetch_bucket(records_[id].hash);
      prefetch(&parents_[id]);
      id = lists_.after(id);
    }
  }

  void evict(const int32_t* ids, int64_t n, Hash* evicted) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = ids[i];
      evicted[i] = records_[id].hash;
      if (has_lists_) lists_.remove(id);
      unpublish(id);
      begin(id);
    }
    counts[INACTIVE] -= n;
    counts[MUTABLE] += n;
  }

  Fault stage(const int32_t* ids, int64_t n, const Hash* hashes, const Hash* parents) {
    const Fault fault = mark(ids, n, MUTABLE, COMPLETE);
    if (fault.kind != FaultKind::none) return fault;
    for (int64_t i = 0; i < n; ++i) {
      records_[ids[i]].hash = hashes[i];
      parents_[ids[i]] = parents[i];
    }
    counts[MUTABLE] -= n;
    counts[COMPLETE] += n;
    return fault;
  }

  Fault register_(const int32_t* ids, int64_t n, int32_t* primaries, bool* folded) {
    const Fault fault = mark(ids, n, COMPLETE, ACTIVE);
    if (fault.kind != FaultKind::none) return fault;
    counts[COMPLETE] -= n;
    counts[ACTIVE] += n;
    for (int64_t start = 0; start < n; start += kSlice) {
      const int64_t stop = std::min(n, start + kSlice);
      for (int64_t i = start; i < stop; ++i) table_.prefetch_bucket(records_[ids[i]].hash);
      for (int64_t i = start; i < stop; ++i) {
        const int32_t id = ids[i];
        const int32_t primary = table_.find_or_insert(records_[id].hash, id);
        primaries[i] = primary;
        folded[i] = primary != id;
        if (primary == id) {
          outbox.append(CREATED, id, records_[id].hash, parents_[id]);
        } else {
          reference(primary);
          make_free(id);
        }
      }
    }
    return fault;
  }

  Fault release(const int32_t* ids, int64_t n, int64_t* num_freed) {
    bool has_shared = false;
    for (int64_t i = 0; i < n; ++i) {
      if (i + 16 < n) prefetch(&records_[ids[i + 16]]);
      Record& record = records_[ids[i]];
      const bool is_held = record.state >= MUTABLE && record.state <= ACTIVE;
      if (!is_held || record.refs == 0) {
        int label = label_of(record);
        if (is_held) label = record.state == ACTIVE && !(record.flags & IS_DISCARDED) ? INACTIVE : FREE;
        for (int64_t j = 0; j < i; ++j) ++records_[ids[j]].refs;
        return Fault{FaultKind::state, ids[i], label};
      }
      has_shared |= record.refs > 1;
      --record.refs;
    }
    // With shared blocks an id may stand in the batch more than once, and its last reference goes at its first entry.
    if (has_shared) for (int64_t i = 0; i < n; ++i) ++records_[ids[i]].refs;
    int64_t num_free = 0, num_inactive = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      Record& record = records_[ids[i]];
      if (has_shared && --record.refs != 0) continue;
      if (record.state == ACTIVE && !(record.flags & IS_DISCARDED)) {
        record.state = INACTIVE;
        ++num_inactive;
        if (has_lists_) lists_.insert(ids[i]); else noted.push_back(ids[i]);
      } else {
        make_free(ids[i]);
        ++num_free;
      }
    }
    counts[ACTIVE] -= num_inactive;
    counts[INACTIVE] += num_inactive;
    *num_freed = num_free + num_inactive;
    return Fault{};
  }

  // Length of the registered prefix; one reference on each of its blocks.
  int64_t match(const Hash* hashes, int64_t n, int32_t* ids) {
    const int64_t found = table_.find_batch(hashes, n, ids, true);
    reference_batch(ids, found);
    return found;
  }

  void find(const Hash* hashes, int64_t n, int32_t* ids) { table_.find_batch(hashes, n, ids, false); }

  void acquire(const int32_t* ids, const Hash* hashes, int64_t n, bool* mask) {
    for (int64_t i = 0; i < n; ++i) {
      if (i + 16 < n) prefetch(&records_[ids[i + 16]]);
      const Record& record = records_[ids[i]];
      const bool is_published = record.state >= ACTIVE && !(record.flags & IS_DISCARDED);
      mask[i] = is_published && record.hash == hashes[i];
      if (mask[i]) reference(ids[i]);
    }
  }

  int64_t touch(const Hash* hashes, int64_t n) {
    int64_t found = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      const int32_t id = table_.find(hashes[i]);
      if (id == NONE) continue;
      ++found;
      if (records_[id].state != INACTIVE) continue;
      if (has_lists_) {
        lists_.remove(id);
        lists_.insert(id);
      } else {
        noted.push_back(id);
      }
    }
    return found;
  }

  int64_t set_priority(const Hash* hashes, int64_t n, uint8_t priority) {
    int64_t found = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      const int32_t id = table_.find(hashes[i]);
      if (id == NONE) continue;
      ++found;
      Record& record = records_[id];
      const bool is_moved = record.state == INACTIVE && record.priority != priority;
      if (is_moved && has_lists_) lists_.remove(id);
      record.priority = priority;
      if (is_moved && has_lists_) lists_.insert(id);
      if (is_moved && !has_lists_) noted.push_back(id);
    }
    return found;
  }

  // For each of n distinct hashes: FREE where it was reset, ACTIVE where it is in use, DISCARDED where it is unknown.
  void remove(const Hash* hashes, int64_t n, uint8_t* outcome) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = table_.find(hashes[i]);
      outcome[i] = id == NONE ? DISCARDED : records_[id].state == ACTIVE ? ACTIVE : FREE;
      if (outcome[i] == FREE) free_inactive(id);
    }
  }

  // A block in use that is discarded already, here or before, stays so.
  Fault discard(const int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      Record& record = records_[ids[i]];
      const bool is_again = record.flags & (IS_DISCARDED | IS_CHOSEN);
      if (record.state == ACTIVE || (record.state == INACTIVE && !is_again)) {
        if (!is_again) record.flags |= IS_CHOSEN;
        continue;
      }
      const int label = record.state == INACTIVE ? int(FREE) : label_of(record);  // an earlier entry freed it
      for (int64_t j = 0; j < i; ++j) records_[ids[j]].flags &= uint8_t(~IS_CHOSEN);
      return Fault{FaultKind::state, ids[i], label};
    }
    for (int64_t i = 0; i < n; ++i) {
      Record& record = records_[ids[i]];
      if (!(record.flags & IS_CHOSEN)) continue;
      record.flags = record.state == ACTIVE ? IS_DISCARDED : 0;
      if (record.state == ACTIVE) unpublish(ids[i]); else free_inactive(ids[i]);
    }
    return Fault{};
  }

  Fault restore(const int32_t* ids, int64_t n, const Hash* hashes, const Hash* parents, const int64_t* priorities) {
    // Entries are published one by one and taken back when one is refused.
    Fault fault;
    int64_t done = 0;
    for (; done < n; ++done) {
      Record& record = records_[ids[done]];
      const Hash before = record.hash;
      if (record.state != FREE) {
        fault = Fault{FaultKind::state, ids[done], label_of(record)};
        break;
      }
      record.hash = hashes[done];
      if (table_.find_or_insert(hashes[done], ids[done]) != ids[done]) {
        record.hash = before;
        fault = Fault{FaultKind::stale, ids[done], FREE};
        break;
      }
      if (priorities[done] < 0 || priorities[done] >= NUM_PRIORITIES) {
        table_.erase(hashes[done], ids[done]);
        fault = Fault{FaultKind::priority, done, FREE};
        break;
      }
      record.state = INACTIVE;
    }
    if (fault.kind != FaultKind::none) {
      for (int64_t i = 0; i < done; ++i) {
        table_.erase(hashes[i], ids[i]);
        records_[ids[i]].state = FREE;
      }
      return fault;
    }
    for (int64_t i = 0; i < n; ++i) {
      free_.take_exactly(ids[i]);
      records_[ids[i]].priority = uint8_t(priorities[i]);
      parents_[ids[i]] = parents[i];
      if (has_lists_) lists_.insert(ids[i]); else noted.push_back(ids[i]);
      outbox.append(CREATED, ids[i], hashes[i], parents[i]);
    }
    counts[FREE] -= n;
    counts[INACTIVE] += n;
    return fault;
  }

  // Frees every inactive block, in eviction order; the caller has made sure that nothing is in use.
  int64_t clear() {
    const int64_t n = counts[INACTIVE];
    if (has_lists_) {
      for (int32_t id = lists_.first(); id != NONE; id = lists_.first()) free_inactive(id);
    } else {
      for (int32_t id = 0; id < num_blocks_ && counts[INACTIVE] > 0; ++id)
        if (records_[id].state == INACTIVE) free_inactive(id);
    }
    return n;
  }

  const Record& record(int32_t id) const { return records_[id]; }
  const Hash& parent(int32_t id) const { return parents_[id]; }
  bool is_published(int32_t id) const {
    return records_[id].state >= ACTIVE && !(records_[id].flags & IS_DISCARDED);
  }

  // Zero hashes and the default priority where a block is not registered.
  void describe(const int32_t* ids, int64_t n, Hash* hashes, Hash* parents, uint8_t* priorities) const {
    for (int64_t i = 0; i < n; ++i) {
      const bool is_named = is_published(ids[i]);
      hashes[i] = is_named ? records_[ids[i]].hash : Hash{0, 0};
      parents[i] = is_named ? parents_[ids[i]] : Hash{0, 0};
      priorities[i] = is_named ? records_[ids[i]].priority : DEFAULT_PRIORITY;
    }
  }

  friend const char* check(const StoreCore& core);

 private:
  static int label_of(const Record& record) { return record.flags & IS_DISCARDED ? int(DISCARDED) : int(record.state); }

  // Moves every entry from one state to the next, or none and says which entry is in another.
  Fault mark(const int32_t* ids, int64_t n, State from, State to) {
    for (int64_t i = 0; i < n; ++i) {
      Record& record = records_[ids[i]];
      if (record.state == from) {
        record.state = to;
        continue;
      }
      const Fault fault{FaultKind::state, ids[i], label_of(record)};
      for (int64_t j = 0; j < i; ++j) records_[ids[j]].state = from;
      return fault;
    }
    return Fault{};
  }

  void begin(int32_t id) {
    Record& record = records_[id];
    record.state = MUTABLE;
    record.refs = 1;
    record.priority = DEFAULT_PRIORITY;
  }

  void reference(int32_t id) {
    Record& record = records_[id];
    ++record.refs;
    if (record.state != INACTIVE) return;
    record.state = ACTIVE;
    --counts[INACTIVE];
    ++counts[ACTIVE];
    if (has_lists_) lists_.remove(id); else noted.push_back(id);
  }

  // Blocks that were released together lie side by side in their list, the later one older: they leave it together.
  void reference_batch(const int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < n;) {
      if (!has_lists_ || records_[ids[i]].state != INACTIVE) {
        reference(ids[i++]);
        continue;
      }
      const int64_t first = i;
      int32_t older;
      do {
        Record& record = records_[ids[i]];
        record.state = ACTIVE;
        record.refs = 1;
        older = record.prev;
        ++i;
      } while (i < n && ids[i] == older);
      lists_.remove_run(ids[i - 1], ids[first]);
      counts[INACTIVE] -= i - first;
      counts[ACTIVE] += i - first;
    }
  }

  void unpublish(int32_t id) {
    table_.erase(records_[id].hash, id);
    if (outbox.is_read()) outbox.append(DELETED, id, records_[id].hash, parents_[id]);
  }

  void make_free(int32_t id) {
    Record& record = records_[id];
    --counts[record.state];
    ++counts[FREE];
    record.state = FREE;
    record.refs = 0;
    record.flags = 0;
    free_.put(id);
  }

  void free_inactive(int32_t id) {
    if (has_lists_) lists_.remove(id); else noted.push_back(id);
    unpublish(id);
    make_free(id);
  }

  int32_t num_blocks_;
  bool has_lists_;
  Mapped<Record> records_;
  Mapped<Hash> parents_;
  BlockTable table_;
  FreeList free_;
  EvictionLists lists_;

 public:
  OutboxRing outbox;
  int64_t counts[5] = {0, 0, 0, 0, 0};
  std::vector<int32_t> noted;  // for a policy of the user's: revived, inserted, touched or freed ids, in order
};

}  // namespace kvbm
