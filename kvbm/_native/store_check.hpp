// What must hold in a native store between any two calls; tests ask after every step.
#pragma once

#include "store_core.hpp"

namespace kvbm {

// What is broken, or nullptr.
inline const char* check(const StoreCore& core) {
  int64_t seen[5] = {0, 0, 0, 0, 0};
  int64_t num_published = 0, num_free = 0, num_queued = 0;
  for (int32_t id = 0; id < core.num_blocks_; ++id) {
    const Record& record = core.records_[id];
    ++seen[record.state];
    if ((record.refs > 0) != (record.state >= MUTABLE && record.state <= ACTIVE)) return "references";
    num_published += core.is_published(id);
    if (core.is_published(id) && core.table_.find(record.hash) != id) return "a block is not the primary of its hash";
  }
  for (int s = 0; s < 5; ++s) if (seen[s] != core.counts[s]) return "counts";
  if (int64_t(core.table_.count()) != num_published) return "hashes without a block";
  if (!core.table_.counts_are_right()) return "counts of passed entries in the index";
  for (int32_t id = core.free_.head(); id != NONE; id = core.records_[id].next, ++num_free)
    if (core.records_[id].state != FREE || num_free > core.num_blocks_) return "free list";
  for (int32_t id = core.free_.unused(); id < core.num_blocks_; ++id, ++num_free)
    if (core.records_[id].state != FREE) return "watermark of the free list";
  if (num_free != core.counts[FREE]) return "free blocks are missing from the free list";
  if (!core.has_lists_) return nullptr;
  for (int32_t id = core.lists_.first(); id != NONE; id = core.lists_.after(id), ++num_queued)
    if (core.records_[id].state != INACTIVE || num_queued > core.num_blocks_) return "eviction lists";
  return num_queued == core.counts[INACTIVE] ? nullptr : "inactive blocks are missing from the eviction lists";
}

}  // namespace kvbm
