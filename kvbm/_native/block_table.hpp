// Sequence hash -> block id: buckets of one cache line, eight blocks to a bucket on average, so that the index of a
// million blocks is 8 MiB and stays in the cache when the records do not.
//
//   bucket, 64 bytes:  | slot 0 | slot 1 | ... | slot 14 | passed |
//   slot, 32 bits:     | tag, what the id leaves | id + 1 |            0 is empty; a tag is never 0
//
// An entry lies in the first bucket from its home on that had room. `passed` counts the entries that went past a bucket,
// so a search ends where it is 0 and a removal is exact. Chosen hashes can make it nonzero everywhere: a search also ends
// when it has been round. Equal tags are told apart by the record's full hash.
#pragma once

#include <vector>

#include "records.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvbm {

class BlockTable {
 public:
  BlockTable(size_t num_blocks, const Record* records)
      : num_buckets_(num_blocks / kLoad + 1), id_bits_(bits_of(num_blocks)), buckets_(num_buckets_), records_(records) {}

  void prefetch_bucket(const Hash& hash) const { prefetch(&buckets_[home_of(mix(hash))]); }

  // The id that a look-up will most likely find, NONE where its home has no such tag; its record is on its way.
  int32_t guess(const Hash& hash) const {
    const uint64_t mixed = mix(hash);
    const Bucket& bucket = buckets_[home_of(mixed)];
    const uint32_t lanes = lanes_with(bucket, tag_of(mixed));
    if (lanes == 0) return NONE;
    const int32_t id = id_of(bucket.slots[__builtin_ctz(lanes)]);
    prefetch(&records_[id]);
    return id;
  }

  // The id of a hash, given what guess() said.
  int32_t confirm(const Hash& hash, int32_t guessed) const {
    if (guessed != NONE && records_[guessed].hash == hash) return guessed;
    return find(hash);
  }

  int32_t find(const Hash& hash) const {
    const uint64_t mixed = mix(hash);
    const uint32_t tag = tag_of(mixed);
    size_t num_left = num_buckets_;
    for (size_t at = home_of(mixed);; at = after(at)) {
      const Bucket& bucket = buckets_[at];
      for (uint32_t lanes = lanes_with(bucket, tag); lanes != 0; lanes &= lanes - 1) {
        const int32_t id = id_of(bucket.slots[__builtin_ctz(lanes)]);
        if (records_[id].hash == hash) return id;
      }
      if (bucket.passed == 0 || --num_left == 0) return NONE;
    }
  }

  // Ids of hashes, NONE where absent; the number looked up. Three stages run kAhead entries apart: fetch the bucket,
  // fetch the record, compare.
  int64_t find_batch(const Hash* hashes, int64_t n, int32_t* ids, bool stops_at_miss) const {
    for (int64_t i = 0; i < n + 2 * kAhead; ++i) {
      if (i < n) prefetch_bucket(hashes[i]);
      if (i >= kAhead && i - kAhead < n) ids[i - kAhead] = guess(hashes[i - kAhead]);
      const int64_t at = i - 2 * kAhead;
      if (at < 0) continue;
      ids[at] = confirm(hashes[at], ids[at]);
      if (ids[at] == NONE && stops_at_miss) return at;
    }
    return n;
  }

  // The id that has the hash already, or else `id`, which then has it.
  int32_t find_or_insert(const Hash& hash, int32_t id) {
    const int32_t found = find(hash);
    if (found != NONE) return found;
    const uint64_t mixed = mix(hash);
    for (size_t at = home_of(mixed);; at = after(at)) {
      Bucket& bucket = buckets_[at];
      const uint32_t empty = lanes_equal(bucket, 0);
      if (empty != 0) {
        bucket.slots[__builtin_ctz(empty)] = tag_of(mixed) | (uint32_t(id) + 1);
        return id;
      }
      ++bucket.passed;
    }
  }

  // Removes the entry of a block that is in the table.
  void erase(const Hash& hash, int32_t id) {
    const uint64_t mixed = mix(hash);
    for (size_t at = home_of(mixed);; at = after(at)) {
      Bucket& bucket = buckets_[at];
      const uint32_t lanes = lanes_equal(bucket, tag_of(mixed) | (uint32_t(id) + 1));
      if (lanes != 0) {
        bucket.slots[__builtin_ctz(lanes)] = 0;
        return;
      }
      --bucket.passed;
    }
  }

  size_t count() const {
    size_t used = 0;
    for (size_t at = 0; at < num_buckets_; ++at)
      for (uint32_t slot : buckets_[at].slots) used += slot != 0;
    return used;
  }

  // Whether `passed` of each bucket is the number of entries that lie beyond it on their way from home.
  bool counts_are_right() const {
    std::vector<uint32_t> passed(num_buckets_);
    for (size_t lies = 0; lies < num_buckets_; ++lies)
      for (uint32_t slot : buckets_[lies].slots)
        if (slot != 0)
          for (size_t at = home_of(mix(records_[id_of(slot)].hash)); at != lies; at = after(at)) ++passed[at];
    for (size_t at = 0; at < num_buckets_; ++at) if (passed[at] != buckets_[at].passed) return false;
    return true;
  }

 private:
  static constexpr int64_t kAhead = 8;
  static constexpr size_t kLoad = 8;   // blocks to a bucket: one in a hundred buckets is full
  static constexpr int kSlots = 15;

  struct alignas(64) Bucket {
    uint32_t slots[kSlots];
    uint32_t passed;
  };

  // Hashes may be anything a caller chose, so the words are mixed before they are cut.
  static uint64_t mix(const Hash& hash) {
    uint64_t x = hash.lo ^ (hash.hi * 0x9E3779B97F4A7C15ULL);
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ULL;
    return x ^ (x >> 29);
  }

  static int bits_of(size_t largest) { return 64 - __builtin_clzll(largest); }

  size_t home_of(uint64_t mixed) const { return size_t((mixed >> 32) * num_buckets_ >> 32); }
  size_t after(size_t at) const { return at + 1 == num_buckets_ ? 0 : at + 1; }

  // In place, above the id's bits.
  uint32_t tag_of(uint64_t mixed) const {
    const uint32_t tag = uint32_t(mixed) & ~id_mask();
    return tag != 0 ? tag : 1u << id_bits_;
  }

  uint32_t id_mask() const { return (1u << id_bits_) - 1; }
  int32_t id_of(uint32_t slot) const { return int32_t(slot & id_mask()) - 1; }

  // One bit a slot.
  uint32_t lanes_with(const Bucket& bucket, uint32_t tag) const { return compare(bucket, tag, ~id_mask()); }
  static uint32_t lanes_equal(const Bucket& bucket, uint32_t slot) { return compare(bucket, slot, ~0u); }

  static uint32_t compare(const Bucket& bucket, uint32_t wanted, uint32_t mask) {
#if defined(__SSE2__)
    const __m128i* rows = reinterpret_cast<const __m128i*>(&bucket);
    const __m128i want = _mm_set1_epi32(int(wanted)), kept = _mm_set1_epi32(int(mask));
    const auto equal = [&](int row) { return _mm_cmpeq_epi32(_mm_and_si128(_mm_load_si128(rows + row), kept), want); };
    const __m128i low = _mm_packs_epi32(equal(0), equal(1)), high = _mm_packs_epi32(equal(2), equal(3));
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(low, high))) & ((1u << kSlots) - 1);
#else
    uint32_t lanes = 0;
    for (int i = 0; i < kSlots; ++i) lanes |= uint32_t((bucket.slots[i] & mask) == wanted) << i;
    return lanes;
#endif
  }

  size_t num_buckets_;
  int id_bits_;
  Mapped<Bucket> buckets_;
  const Record* records_;
};

}  // namespace kvbm
