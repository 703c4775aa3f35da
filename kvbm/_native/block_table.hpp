// Sequence hash -> block id: open addressing, linear probing, four slots a block.
//
// A slot is 8 bytes: tag (32 bits of the mixed hash) << 32 | id + 1; 0 is empty. The tag alone gives a slot's home, so
// deletion shifts later entries back without reading a record. Equal tags are told apart by the record's full hash.
#pragma once

#include "records.hpp"

namespace kvbm {

class BlockTable {
 public:
  BlockTable(size_t num_blocks, const Record* records)
      : num_slots_(num_blocks < 4 ? 16 : 4 * num_blocks), slots_(num_slots_), records_(records) {}

  // Hashes may be anything a caller chose, so the words are mixed before they are cut.
  static uint32_t tag_of(const Hash& hash) {
    uint64_t x = hash.lo ^ (hash.hi * 0x9E3779B97F4A7C15ULL);
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ULL;
    return uint32_t(x >> 32);
  }

  void prefetch_slot(const Hash& hash) { prefetch(&slots_[home_of(tag_of(hash))]); }

  // The record that a look-up will most likely compare, before it is needed.
  void prefetch_record(const Hash& hash) {
    uint64_t slot = slots_[home_of(tag_of(hash))];
    if (slot != 0) prefetch(&records_[uint32_t(slot) - 1]);
  }

  int32_t find(const Hash& hash) const {
    const uint32_t tag = tag_of(hash);
    for (size_t at = home_of(tag);; at = after(at)) {
      const uint64_t slot = slots_[at];
      if (slot == 0) return NONE;
      if (uint32_t(slot >> 32) == tag && records_[uint32_t(slot) - 1].hash == hash) return int32_t(uint32_t(slot) - 1);
    }
  }

  // The id that has the hash already, or else `id`, which then has it.
  int32_t find_or_insert(const Hash& hash, int32_t id) {
    const uint32_t tag = tag_of(hash);
    for (size_t at = home_of(tag);; at = after(at)) {
      const uint64_t slot = slots_[at];
      if (slot == 0) {
        slots_[at] = uint64_t(tag) << 32 | (uint32_t(id) + 1);
        return id;
      }
      if (uint32_t(slot >> 32) == tag && records_[uint32_t(slot) - 1].hash == hash) return int32_t(uint32_t(slot) - 1);
    }
  }

  // Removes the entry of a block that is in the table.
  void erase(const Hash& hash, int32_t id) {
    const uint64_t wanted = uint64_t(tag_of(hash)) << 32 | (uint32_t(id) + 1);
    size_t hole = home_of(uint32_t(wanted >> 32));
    while (slots_[hole] != wanted) hole = after(hole);
    // An entry may fill the hole when its home does not lie in (hole, at], read around the end of the table.
    for (size_t at = after(hole); slots_[at] != 0; at = after(at)) {
      const size_t home = home_of(uint32_t(slots_[at] >> 32));
      if (distance(home, at) >= distance(hole, at)) {
        slots_[hole] = slots_[at];
        hole = at;
      }
    }
    slots_[hole] = 0;
  }

  size_t count() const {
    size_t used = 0;
    for (size_t at = 0; at < num_slots_; ++at) used += slots_[at] != 0;
    return used;
  }

 private:
  size_t home_of(uint32_t tag) const { return size_t(uint64_t(tag) * num_slots_ >> 32); }
  size_t after(size_t at) const { return at + 1 == num_slots_ ? 0 : at + 1; }
  size_t distance(size_t from, size_t to) const { return to >= from ? to - from : to + num_slots_ - from; }

  size_t num_slots_;
  Mapped<uint64_t> slots_;
  const Record* records_;
};

}  // namespace kvbm
