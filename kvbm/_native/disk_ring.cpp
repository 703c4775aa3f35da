// Heads and tails are shared with the kernel: what the other side moves is loaded with acquire, what we move is stored
// with release. The kernel copies a request when it accepts it.
#include "disk_ring.hpp"

#ifdef __linux__

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

namespace kvbm {

struct RingRequest {  // struct io_uring_sqe
  uint8_t code, flags;
  uint16_t priority;
  int32_t fd;
  uint64_t offset, address;
  uint32_t length, op_flags;
  uint64_t tag;
  uint64_t rest[3];
};
static_assert(sizeof(RingRequest) == 64, "the kernel's size");

struct RingCompletion {  // struct io_uring_cqe
  uint64_t tag;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(RingCompletion) == 16, "the kernel's size");

namespace {

enum { SQ_HEAD, SQ_TAIL, SQ_MASK, SQ_ENTRIES, SQ_FLAGS, SQ_DROPPED, SQ_ARRAY };
enum { CQ_HEAD, CQ_TAIL, CQ_MASK, CQ_ENTRIES, CQ_OVERFLOW, CQ_COMPLETIONS };

struct RingParameters {  // struct io_uring_params
  uint32_t sq_entries, cq_entries, flags, sq_cpu, sq_idle, features, wq_fd, reserved[3];
  uint32_t sq_offsets[10], cq_offsets[10];
};
static_assert(sizeof(RingParameters) == 120, "the kernel's size");

constexpr long kSetup = 425, kEnter = 426;  // the same on every architecture but alpha
constexpr uint32_t kSubmitAll = 1u << 7;  // a request that fails at once does not hold up the ones behind it
constexpr uint32_t kSingleIssuer = 1u << 12;
constexpr uint32_t kDeferTaskrun = 1u << 13;  // completions run where we wait for them: no interrupts between
constexpr uint32_t kGetEvents = 1u << 0;
constexpr uint32_t kSingleMmap = 1u << 0, kNoDrop = 1u << 1, kCurrentPosition = 1u << 3;  // the last: kernel 5.6
constexpr uint32_t kNeeded = kSingleMmap | kNoDrop | kCurrentPosition;
constexpr off_t kRingsAt = 0, kRequestsAt = 0x10000000;
constexpr uint32_t kPollIn = 1;

uint32_t load(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void store(uint32_t* p, uint32_t value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

}  // namespace

int DiskRing::open(unsigned num_entries) {
  RingParameters p;
  for (uint32_t flags : {kSubmitAll | kSingleIssuer | kDeferTaskrun, 0u}) {  // the flags came with kernel 6.1
    memset(&p, 0, sizeof p);
    p.flags = flags;
    fd_ = static_cast<int>(syscall(kSetup, num_entries, &p));
    if (fd_ >= 0 || errno != EINVAL) break;
  }
  if (fd_ < 0) return errno;
  const int error = (p.features & kNeeded) == kNeeded ? map(p.sq_offsets, p.cq_offsets, p.sq_entries, p.cq_entries)
                                                      : ENOSYS;
  if (error) close();
  return error;
}

int DiskRing::map(const uint32_t* sq, const uint32_t* cq, unsigned sq_entries, unsigned cq_entries) {
  const size_t sq_nbytes = sq[SQ_ARRAY] + sq_entries * sizeof(uint32_t);
  const size_t cq_nbytes = cq[CQ_COMPLETIONS] + cq_entries * sizeof(RingCompletion);
  const int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
  rings_nbytes_ = sq_nbytes > cq_nbytes ? sq_nbytes : cq_nbytes;
  void* rings = mmap(nullptr, rings_nbytes_, protection, flags, fd_, kRingsAt);
  if (rings == MAP_FAILED) return errno;
  rings_ = rings;
  requests_nbytes_ = sq_entries * sizeof(RingRequest);
  void* requests = mmap(nullptr, requests_nbytes_, protection, flags, fd_, kRequestsAt);
  if (requests == MAP_FAILED) return errno;
  requests_ = static_cast<RingRequest*>(requests);
  char* base = static_cast<char*>(rings);
  auto word = [base](uint32_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
  sq_head_ = word(sq[SQ_HEAD]);
  sq_tail_ = word(sq[SQ_TAIL]);
  cq_head_ = word(cq[CQ_HEAD]);
  cq_tail_ = word(cq[CQ_TAIL]);
  sq_mask_ = *word(sq[SQ_MASK]);
  cq_mask_ = *word(cq[CQ_MASK]);
  completions_ = reinterpret_cast<RingCompletion*>(base + cq[CQ_COMPLETIONS]);
  uint32_t* array = word(sq[SQ_ARRAY]);
  for (uint32_t i = 0; i < sq_entries; ++i) array[i] = i;  // requests go in the order of their places
  return 0;
}

void DiskRing::close() {
  if (requests_) munmap(requests_, requests_nbytes_);
  if (rings_) munmap(rings_, rings_nbytes_);
  if (fd_ >= 0) ::close(fd_);
  requests_ = nullptr;
  rings_ = nullptr;
  fd_ = -1;
}

void DiskRing::push(Code code, int fd, uint64_t offset, const void* address, uint32_t length, void* tag) {
  const uint32_t tail = *sq_tail_;
  RingRequest& request = requests_[tail & sq_mask_];
  memset(&request, 0, sizeof request);
  request.code = code;
  request.fd = fd;
  request.offset = offset;
  request.address = reinterpret_cast<uintptr_t>(address);
  request.length = length;
  if (code == POLL) request.op_flags = kPollIn;
  request.tag = reinterpret_cast<uintptr_t>(tag);
  store(sq_tail_, tail + 1);
}

int DiskRing::enter() {
  const uint32_t num_queued = *sq_tail_ - load(sq_head_);
  return syscall(kEnter, fd_, num_queued, 1u, kGetEvents, nullptr, size_t{0}) < 0 ? errno : 0;
}

void* DiskRing::take_back() {
  const uint32_t tail = *sq_tail_;
  if (tail == load(sq_head_)) return nullptr;
  store(sq_tail_, tail - 1);
  return reinterpret_cast<void*>(static_cast<uintptr_t>(requests_[(tail - 1) & sq_mask_].tag));
}

bool DiskRing::pop(void** tag, int32_t* result) {
  const uint32_t head = *cq_head_;
  if (head == load(cq_tail_)) return false;
  const RingCompletion& completion = completions_[head & cq_mask_];
  *tag = reinterpret_cast<void*>(static_cast<uintptr_t>(completion.tag));
  *result = completion.result;
  store(cq_head_, head + 1);
  return true;
}

}  // namespace kvbm

#endif
