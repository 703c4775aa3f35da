// The two ways in which a block waits: free, in order of return; inactive, by priority and then by age.
// Both are lists through the records, so they cost no memory of their own.
#pragma once

#include "records.hpp"

namespace kvbm {

// First in, first out. Ids never used yet are a watermark, not entries.
class FreeList {
 public:
  FreeList(int32_t num_blocks, Record* records) : num_blocks_(num_blocks), records_(records) {}

  int64_t size() const { return int64_t(num_blocks_) - unused_ + num_returned_; }

  int32_t take() {
    if (unused_ < num_blocks_) return unused_++;
    const int32_t id = head_;
    head_ = records_[id].next;
    if (head_ == NONE) tail_ = NONE; else records_[head_].prev = NONE;
    --num_returned_;
    return id;
  }

  // The id that take() will give, for prefetching; NONE when there is none.
  int32_t peek() const { return unused_ < num_blocks_ ? unused_ : head_; }

  void put(int32_t id) {
    records_[id].prev = tail_;
    records_[id].next = NONE;
    if (tail_ == NONE) head_ = id; else records_[tail_].next = id;
    tail_ = id;
    ++num_returned_;
  }

  // Takes one given free id out. Ids below a wanted unused one become entries, so that the watermark can pass it.
  void take_exactly(int32_t id) {
    if (unused_ <= id) {
      int32_t end = num_blocks_;
      // Unused ids come before returned ones: the rest of the watermark goes in front, in order.
      for (int32_t other = end - 1; other >= unused_; --other) put_front(other);
      unused_ = end;
    }
    unlink(id);
  }

  int32_t head() const { return head_; }
  int32_t unused() const { return unused_; }

 private:
  void put_front(int32_t id) {
    records_[id].next = head_;
    records_[id].prev = NONE;
    if (head_ == NONE) tail_ = id; else records_[head_].prev = id;
    head_ = id;
    ++num_returned_;
  }

  void unlink(int32_t id) {
    const Record& record = records_[id];
    if (record.prev == NONE) head_ = record.next; else records_[record.prev].next = record.next;
    if (record.next == NONE) tail_ = record.prev; else records_[record.next].prev = record.prev;
    --num_returned_;
  }

  int32_t num_blocks_;
  Record* records_;
  int32_t unused_ = 0, head_ = NONE, tail_ = NONE;
  int64_t num_returned_ = 0;
};

// One list a priority, oldest at the head; a bit set finds the lowest that is not empty.
class EvictionLists {
 public:
  explicit EvictionLists(Record* records) : records_(records) {
    for (int p = 0; p < NUM_PRIORITIES; ++p) heads_[p] = tails_[p] = NONE;
  }

  // Young end of the block's own priority.
  void insert(int32_t id) {
    Record& record = records_[id];
    const int p = record.priority;
    record.prev = tails_[p];
    record.next = NONE;
    if (tails_[p] == NONE) {
      heads_[p] = id;
      filled_[p >> 6] |= uint64_t(1) << (p & 63);
    } else {
      records_[tails_[p]].next = id;
    }
    tails_[p] = id;
  }

  void remove(int32_t id) {
    const Record& record = records_[id];
    const int p = record.priority;
    if (record.prev == NONE) heads_[p] = record.next; else records_[record.prev].next = record.next;
    if (record.next == NONE) tails_[p] = record.prev; else records_[record.next].prev = record.prev;
    if (heads_[p] == NONE) filled_[p >> 6] &= ~(uint64_t(1) << (p & 63));
  }

  // Takes out a stretch of one list, from its oldest to its youngest block, without touching those between.
  void remove_run(int32_t oldest, int32_t youngest) {
    const int p = records_[oldest].priority;
    const int32_t before = records_[oldest].prev, behind = records_[youngest].next;
    if (before == NONE) heads_[p] = behind; else records_[before].next = behind;
    if (behind == NONE) tails_[p] = before; else records_[behind].prev = before;
    if (heads_[p] == NONE) filled_[p >> 6] &= ~(uint64_t(1) << (p & 63));
  }

  void prefetch_neighbours(int32_t id) const {
    const Record& record = records_[id];
    if (record.prev != NONE) prefetch(&records_[record.prev]);
    if (record.next != NONE) prefetch(&records_[record.next]);
  }

  // First of the lowest priority that is not empty and at least `from`; NONE when there is none.
  int32_t first(int from = 0) const {
    for (int p = from; p < NUM_PRIORITIES;) {
      const uint64_t bits = filled_[p >> 6] >> (p & 63);
      if (bits != 0) return heads_[p + __builtin_ctzll(bits)];
      p = (p | 63) + 1;
    }
    return NONE;
  }

  // The one that is evicted after `id`.
  int32_t after(int32_t id) const {
    const Record& record = records_[id];
    return record.next != NONE ? record.next : first(record.priority + 1);
  }

 private:
  Record* records_;
  int32_t heads_[NUM_PRIORITIES], tails_[NUM_PRIORITIES];
  uint64_t filled_[2] = {0, 0};
};

}  // namespace kvbm
