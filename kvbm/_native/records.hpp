// What the native store keeps of each block, in anonymous memory that costs nothing until it is touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace kvbm {

struct Hash {
  uint64_t lo, hi;
  bool operator==(const Hash& other) const { return lo == other.lo && hi == other.hi; }
};

// The numbers of kvbm.types.BlockState; DISCARDED only ever names a state in an error.
enum State : uint8_t { FREE = 0, MUTABLE = 1, COMPLETE = 2, ACTIVE = 3, INACTIVE = 4, DISCARDED = 5 };

enum class FaultKind : int { none, state, stale, priority };

// Why a batch was refused; the batch has changed nothing.
struct Fault {
  FaultKind kind = FaultKind::none;
  int64_t value = 0;  // block id, or place of the priority in its batch
  int label = FREE;   // the state it is in, or would be in by then
};

enum Flags : uint8_t { IS_DISCARDED = 1, IS_CHOSEN = 2 };  // IS_CHOSEN: only during a call

// Two records share a cache line. prev and next link the free list or one eviction list; a block is in at most one.
struct Record {
  Hash hash;
  int32_t prev, next;
  uint32_t refs;
  uint8_t state, priority, flags, unused;
};
static_assert(sizeof(Record) == 32, "two records fill a cache line");

constexpr int32_t NONE = -1;
constexpr uint8_t DEFAULT_PRIORITY = 50;
constexpr int NUM_PRIORITIES = 101;

// A zeroed array on huge pages where the kernel allows.
template <typename T>
class Mapped {
 public:
  explicit Mapped(size_t count) : nbytes_(count * sizeof(T)) {
    void* memory = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (nbytes_ >= (size_t(4) << 20)) madvise(memory, nbytes_, MADV_HUGEPAGE);
#endif
    data_ = static_cast<T*>(memory);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(data_, nbytes_); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* data() { return data_; }

 private:
  T* data_;
  size_t nbytes_;
};

template <typename T>
inline void prefetch(const T* address) {
  __builtin_prefetch(address, 1, 3);
}

}  // namespace kvbm
