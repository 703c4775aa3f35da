// Bounded rows of what changed; a reader that falls behind finds one gap instead. Memory is taken at the first reader.
#pragma once

#include <cstring>
#include <memory>

#include "records.hpp"

namespace kvbm {

// kvbm.types.OUTBOX_DTYPE, byte for byte.
struct OutboxRow {
  uint64_t seq;
  Hash hash, parent;
  int32_t id;
  uint32_t kind;
};
static_assert(sizeof(OutboxRow) == 48, "must equal OUTBOX_DTYPE");

enum OutboxKind : uint32_t { CREATED = 1, DELETED = 2, GAP = 3 };

class OutboxRing {
 public:
  explicit OutboxRing(size_t capacity) : capacity_(capacity < 1 ? 1 : capacity) {}

  bool is_read() const { return num_subscribers_ > 0; }
  uint64_t last_seq() const { return last_seq_; }
  size_t size() const { return size_; }

  void subscribe() {
    if (!rows_) rows_.reset(new OutboxRow[capacity_]);
    ++num_subscribers_;
  }

  void unsubscribe() {
    if (num_subscribers_ > 0) --num_subscribers_;
    if (num_subscribers_ == 0) {
      rows_.reset();
      clear();
    }
  }

  void append(OutboxKind kind, int32_t id, const Hash& hash, const Hash& parent) {
    if (!is_read()) return;
    ++last_seq_;
    if (!has_gap_ && size_ < capacity_) {
      const size_t at = first_ + size_ < capacity_ ? first_ + size_ : first_ + size_ - capacity_;
      rows_[at] = OutboxRow{last_seq_, hash, parent, id, kind};
      ++size_;
      return;
    }
    clear();
    has_gap_ = true;
    rows_[0] = OutboxRow{last_seq_, {0, 0}, {0, 0}, -1, GAP};
    size_ = 1;
  }

  // Copies n rows out, n <= size().
  void drain(OutboxRow* out, size_t n) {
    const size_t straight = first_ + n <= capacity_ ? n : capacity_ - first_;
    if (straight > 0) std::memcpy(out, &rows_[first_], straight * sizeof(OutboxRow));
    if (n > straight) std::memcpy(out + straight, &rows_[0], (n - straight) * sizeof(OutboxRow));
    first_ = (first_ + n) % capacity_;
    size_ -= n;
    if (size_ == 0) clear();  // an empty ring starts again at the front, which is still in the cache
  }

 private:
  void clear() {
    first_ = size_ = 0;
    has_gap_ = false;
  }

  size_t capacity_, first_ = 0, size_ = 0;
  std::unique_ptr<OutboxRow[]> rows_;
  uint64_t last_seq_ = 0;
  int num_subscribers_ = 0;
  bool has_gap_ = false;
};

}  // namespace kvbm
