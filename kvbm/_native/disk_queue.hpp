// Positional reads and writes of one file in batches: reads before writes, a bounded number under way, the rest waiting.
//
// One mutex guards everything but an operation that is under way, which belongs to the thread that runs it. The mutex is
// held for bookkeeping only, never while bytes move and never while Python runs, so a holder of the GIL may take it.
// Kind "threads" runs preadv and pwritev in threads; kind "uring" has one thread that begins operations in a ring and
// sleeps in the kernel until some have ended. Either way `wait` gives batches that have ended, to one caller.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "disk_ring.hpp"

namespace kvbm {

struct DiskBatch;

// A run of bytes of the file, and the buffers that it goes to or comes from.
struct DiskOperation {
  DiskBatch* batch;
  int64_t offset, nbytes;
  iovec* buffers;  // of the caller
  int num_buffers;
  // What follows belongs to whoever runs it.
  iovec* rest = nullptr;  // what has not moved yet: of the buffers, or of the bounce buffer
  int num_rest = 0;
  int num_call = 0;  // buffers of the call that is made; none where a test answers for the kernel
  void* bounce_memory = nullptr;
  iovec bounce{};
  int64_t moved = 0;
  int error = 0, num_stuck = 0, num_calls = 0;
  int64_t forced = 0;  // a test's answer, or what it adds to the kernel's
  iovec* cut = nullptr;  // the buffer that a test has made shorter for one call
  size_t cut_nbytes = 0;
};

struct DiskBatch {
  uint64_t token = 0;
  bool is_read = false;
  int64_t block_nbytes = 0, slot_nbytes = 0;  // of blocks that go through a bounce buffer, else 0
  std::vector<iovec> buffers;
  std::vector<DiskOperation> operations;
  size_t next = 0;  // the first operation that has not begun
  size_t num_left = 0;
  int64_t num_calls = 0;
};

class DiskQueue {
 public:
  enum Kind { THREADS, URING };

  // Nothing runs before `open`. At most `depth` operations are under way, and as many as there are threads.
  DiskQueue(int fd, Kind kind, int depth, int num_threads);
  ~DiskQueue();
  DiskQueue(const DiskQueue&) = delete;
  DiskQueue& operator=(const DiskQueue&) = delete;

  int open();  // 0 or an errno: without a ring nothing works

  // Take a batch; 0, EEXIST when its token is in use, EPIPE after `close` (a batch that `wait` gave and that is not
  // acknowledged may still be submitted `again`), EAGAIN when no thread can be started.
  int submit(std::unique_ptr<DiskBatch> batch, bool is_again);
  // Drop what has not begun of a batch: it ends with ECANCELED. False when the token is not known.
  bool cancel(uint64_t token);
  // Sleep until batches have ended; none when `seconds` (negative: for ever) are over. False when all is over.
  // Calling it acknowledges what the call before gave.
  bool wait(double seconds, std::vector<std::unique_ptr<DiskBatch>>* ended);
  // Take nothing new; what was submitted runs to its end.
  void close();

  // For tests: begin nothing; answer calls with these, in order: a number of bytes, or a negative errno.
  void pause(bool is_paused);
  void inject(const std::vector<int64_t>& answers);

  uint64_t last_token();
  size_t num_waiting();  // operations that have not begun

 private:
  bool is_over() const;
  bool can_begin(bool is_read) const;
  DiskOperation* take();
  void finish(DiskOperation* operation);
  void finish_if_over(DiskBatch* batch);
  void wake(size_t num_operations);
  void kick();
  int start_threads(size_t num_operations);

  void serve_threads();
  void serve_ring();
  void push(DiskOperation* operation);
  void fail_queued(int error, std::vector<DiskOperation*>* ended);

  void begin(DiskOperation* operation);
  void begin_call(DiskOperation* operation);
  ssize_t call(DiskOperation* operation);
  bool end_call(DiskOperation* operation, int64_t result);
  void end(DiskOperation* operation);

  const int fd_;
  const Kind kind_;
  const int depth_, num_threads_;
  const bool is_direct_;
  std::atomic<bool> has_answers_{false};

  std::mutex mutex_;  // guards all below, but the ring
  std::condition_variable has_work_, has_ended_;
  std::unordered_map<uint64_t, std::unique_ptr<DiskBatch>> open_;
  std::deque<DiskBatch*> waiting_[2];  // by is_read; batches with operations that have not begun
  std::deque<std::unique_ptr<DiskBatch>> ended_;
  std::deque<int64_t> answers_;
  std::vector<std::thread> threads_;
  uint64_t last_token_ = 0;
  size_t num_given_ = 0;  // batches that `wait` gave and that are not acknowledged
  int num_under_way_ = 0, num_bounces_ = 0, num_reads_in_a_row_ = 0, num_idle_ = 0;
  bool is_paused_ = false, is_closing_ = false, is_dropped_ = false;

#ifdef __linux__
  DiskRing ring_;  // of the ring's thread alone
  bool is_listening_ = false;  // the ring's thread: a poll of wake_fd_ is under way
  int wake_fd_ = -1;
  bool is_asleep_ = false;  // it must be woken to see what is new
  bool has_opened_ = false;
  int open_error_ = 0;
#endif
};

}  // namespace kvbm
