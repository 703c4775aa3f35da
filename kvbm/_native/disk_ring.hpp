// An io_uring by its raw system calls, used by one thread: it queues requests, hands them over, sleeps for completions.
// Structures and numbers are our own copies of the kernel's stable interface, so old system headers do not matter.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvbm {

#ifdef __linux__

struct RingRequest;  // what the kernel takes
struct RingCompletion;

class DiskRing {
 public:
  enum Code : uint8_t { NOP = 0, READV = 1, WRITEV = 2, POLL = 6, READ = 22, WRITE = 23 };

  DiskRing() = default;
  DiskRing(const DiskRing&) = delete;
  DiskRing& operator=(const DiskRing&) = delete;
  ~DiskRing() { close(); }

  // Make a ring of at least `num_entries` requests for the calling thread, which alone may use it; 0 or an errno.
  int open(unsigned num_entries);
  void close();

  // Queue a request; the caller keeps within the entries it asked for.
  void push(Code code, int fd, uint64_t offset, const void* address, uint32_t length, void* tag);
  // Hand over what is queued and sleep until something has completed; 0 or an errno.
  int enter();
  // Take back the last request that the kernel has not accepted; its tag, or nullptr when none is left.
  void* take_back();
  // Give the next completion, false when there is none.
  bool pop(void** tag, int32_t* result);

 private:
  int map(const uint32_t* sq_offsets, const uint32_t* cq_offsets, unsigned sq_entries, unsigned cq_entries);

  int fd_ = -1;
  void* rings_ = nullptr;
  size_t rings_nbytes_ = 0;
  RingRequest* requests_ = nullptr;
  size_t requests_nbytes_ = 0;
  RingCompletion* completions_ = nullptr;
  uint32_t* sq_head_ = nullptr;  // moved by the kernel
  uint32_t* sq_tail_ = nullptr;
  uint32_t* cq_head_ = nullptr;
  uint32_t* cq_tail_ = nullptr;  // moved by the kernel
  uint32_t sq_mask_ = 0, cq_mask_ = 0;
};

#endif

}  // namespace kvbm
