// The queue: who goes next, when a batch has ended, and how the threads of both kinds are started and stopped.
#include "disk_queue.hpp"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/eventfd.h>
#endif

#include <chrono>
#include <system_error>

namespace kvbm {
namespace {

constexpr int kReadsInARow = 16;  // then a waiting write goes, so that writes do not wait for ever
constexpr int kMaxBounces = 4;  // a bounce buffer has the size of its operation: this bounds them

bool is_direct(int fd) {
#ifdef O_DIRECT
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && (flags & O_DIRECT);
#else
  (void)fd;
  return false;
#endif
}

// Signals belong to Python's threads, and a write beyond a limit is to fail, not to kill.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

DiskQueue::DiskQueue(int fd, Kind kind, int depth, int num_threads)
    : fd_(fd), kind_(kind), depth_(depth), num_threads_(num_threads), is_direct_(is_direct(fd)) {}

int DiskQueue::open() {
  if (kind_ == THREADS) return 0;
#ifdef __linux__
  // A ring takes O_NONBLOCK at its word: where a file system cannot do without waiting, it would answer EAGAIN.
  const int flags = fcntl(fd_, F_GETFL);
  if (flags < 0) return errno;
  if ((flags & O_NONBLOCK) && fcntl(fd_, F_SETFL, flags & ~O_NONBLOCK) < 0) return errno;
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) return errno;
  try {
    BlockedSignals blocked;
    threads_.emplace_back([this] { serve_ring(); });
  } catch (const std::system_error&) {
    return EAGAIN;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  has_ended_.wait(lock, [this] { return has_opened_; });
  return open_error_;
#else
  return ENOSYS;
#endif
}

DiskQueue::~DiskQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_dropped_ = is_closing_ = true;
    is_paused_ = false;
    for (auto& queue : waiting_) {
      for (DiskBatch* batch : queue) {
        batch->num_left -= batch->operations.size() - batch->next;
        if (!batch->num_left) open_.erase(batch->token);
      }
      queue.clear();
    }
    kick();
  }
  for (std::thread& thread : threads_) thread.join();  // what is under way still moves bytes of our callers
#ifdef __linux__
  if (wake_fd_ >= 0) ::close(wake_fd_);
#endif
}

int DiskQueue::submit(std::unique_ptr<DiskBatch> batch, bool is_again) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_closing_ && !(is_again && num_given_)) return EPIPE;
  if (open_.count(batch->token)) return EEXIST;
  const size_t num_operations = batch->operations.size();
  if (kind_ == THREADS) {
    if (const int error = start_threads(num_operations)) return error;
  }
  DiskBatch* const taken = batch.get();
  if (!is_again) last_token_ = taken->token;
  taken->num_left = num_operations;
  open_.emplace(taken->token, std::move(batch));
  if (num_operations) {
    waiting_[taken->is_read].push_back(taken);
    wake(num_operations);
  }
  finish_if_over(taken);
  return 0;
}

bool DiskQueue::cancel(uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = open_.find(token);
  if (found == open_.end()) return false;
  DiskBatch* const batch = found->second.get();
  auto& queue = waiting_[batch->is_read];
  for (auto it = queue.begin(); it != queue.end(); ++it) {
    if (*it != batch) continue;
    queue.erase(it);
    for (; batch->next < batch->operations.size(); ++batch->next, --batch->num_left) {
      batch->operations[batch->next].error = ECANCELED;
    }
    finish_if_over(batch);
    kick();  // it may have held up others for want of a bounce buffer
    break;
  }
  return true;
}

bool DiskQueue::wait(double seconds, std::vector<std::unique_ptr<DiskBatch>>* ended) {
  std::unique_lock<std::mutex> lock(mutex_);
  num_given_ = 0;
  if (is_over()) kick();
  const auto is_ready = [this] { return !ended_.empty() || is_over(); };
  if (seconds < 0) {
    has_ended_.wait(lock, is_ready);
  } else {
    has_ended_.wait_for(lock, std::chrono::duration<double>(seconds), is_ready);
  }
  while (!ended_.empty()) {
    ended->push_back(std::move(ended_.front()));
    ended_.pop_front();
  }
  num_given_ = ended->size();
  return !is_over();
}

void DiskQueue::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_closing_ = true;
  kick();
  has_ended_.notify_all();
}

void DiskQueue::pause(bool is_paused) {
  std::lock_guard<std::mutex> lock(mutex_);
  is_paused_ = is_paused;
  kick();
}

void DiskQueue::inject(const std::vector<int64_t>& answers) {
  std::lock_guard<std::mutex> lock(mutex_);
  answers_.insert(answers_.end(), answers.begin(), answers.end());
  has_answers_ = !answers_.empty();
}

uint64_t DiskQueue::last_token() {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_token_;
}

size_t DiskQueue::num_waiting() {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const auto& queue : waiting_) {
    for (const DiskBatch* batch : queue) total += batch->operations.size() - batch->next;
  }
  return total;
}

// -- under the mutex ----------------------------------------------------------------------------------------------

bool DiskQueue::is_over() const {
  return is_closing_ && open_.empty() && (is_dropped_ || (ended_.empty() && !num_given_));
}

bool DiskQueue::can_begin(bool is_read) const {
  const auto& queue = waiting_[is_read];
  return !queue.empty() && (!queue.front()->slot_nbytes || num_bounces_ < kMaxBounces);
}

DiskOperation* DiskQueue::take() {
  if (is_paused_ || num_under_way_ >= depth_) return nullptr;
  const bool can_read = can_begin(true), can_write = can_begin(false);
  if (!can_read && !can_write) return nullptr;
  const bool is_read = can_read && (num_reads_in_a_row_ < kReadsInARow || !can_write);
  num_reads_in_a_row_ = is_read ? num_reads_in_a_row_ + 1 : 0;
  DiskBatch* const batch = waiting_[is_read].front();
  DiskOperation* const operation = &batch->operations[batch->next++];
  if (batch->next == batch->operations.size()) waiting_[is_read].pop_front();
  ++num_under_way_;
  if (batch->slot_nbytes) ++num_bounces_;
  return operation;
}

void DiskQueue::finish(DiskOperation* operation) {
  DiskBatch* const batch = operation->batch;
  --num_under_way_;
  if (batch->slot_nbytes) --num_bounces_;
  batch->num_calls += operation->num_calls;
  --batch->num_left;
  finish_if_over(batch);
}

void DiskQueue::finish_if_over(DiskBatch* batch) {
  if (batch->num_left) return;
  const auto found = open_.find(batch->token);
  ended_.push_back(std::move(found->second));
  open_.erase(found);
  has_ended_.notify_one();
  if (is_over()) has_work_.notify_all();
}

void DiskQueue::wake(size_t num_operations) {
  if (kind_ == THREADS) {
    const size_t num_idle = static_cast<size_t>(num_idle_);
    for (size_t i = 0; i < num_operations && i < num_idle; ++i) has_work_.notify_one();
  } else if (num_under_way_ < depth_) {  // else it wakes when one of them ends
    kick();
  }
}

// Let every thread look at what has changed.
void DiskQueue::kick() {
  has_work_.notify_all();
#ifdef __linux__
  if (is_asleep_) {
    is_asleep_ = false;
    const uint64_t one = 1;
    if (write(wake_fd_, &one, sizeof one) < 0) return;  // it is readable already
  }
#endif
}

int DiskQueue::start_threads(size_t num_operations) {
  const size_t wanted = static_cast<size_t>(num_threads_ < depth_ ? num_threads_ : depth_);
  BlockedSignals blocked;
  try {
    for (size_t i = 0; i < num_operations && threads_.size() < wanted; ++i) {
      threads_.emplace_back([this] { serve_threads(); });
    }
  } catch (const std::system_error&) {
    return threads_.empty() ? EAGAIN : 0;
  }
  return 0;
}

// -- the threads --------------------------------------------------------------------------------------------------

void DiskQueue::serve_threads() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    DiskOperation* const operation = take();
    if (!operation) {
      if (is_over()) return;
      ++num_idle_;
      has_work_.wait(lock);
      --num_idle_;
      continue;
    }
    lock.unlock();
    begin(operation);
    while (!operation->error && !end_call(operation, call(operation))) {
    }
    end(operation);
    lock.lock();
    finish(operation);
  }
}

#ifdef __linux__

void DiskQueue::serve_ring() {
  const int error = ring_.open(static_cast<unsigned>(depth_) + 1);  // and the poll
  std::unique_lock<std::mutex> lock(mutex_);
  open_error_ = error;
  has_opened_ = true;
  has_ended_.notify_all();
  if (error) return;
  std::vector<DiskOperation*> fresh, ended;
  for (;;) {
    while (DiskOperation* operation = take()) fresh.push_back(operation);
    if (fresh.empty() && !num_under_way_ && is_over()) break;
    is_asleep_ = true;
    lock.unlock();
    for (DiskOperation* operation : fresh) {
      begin(operation);
      if (operation->error) {
        ended.push_back(operation);
      } else {
        push(operation);
      }
    }
    if (!is_listening_) ring_.push(DiskRing::POLL, wake_fd_, 0, nullptr, 0, this);
    is_listening_ = true;
    if (ended.empty()) {
      if (const int failed = ring_.enter()) fail_queued(failed, &ended);
    }
    void* tag;
    int32_t result;
    while (ring_.pop(&tag, &result)) {
      DiskOperation* const operation = static_cast<DiskOperation*>(tag);
      if (tag == this) {  // woken
        uint64_t count;
        is_listening_ = false;
        if (read(wake_fd_, &count, sizeof count) < 0) continue;
      } else if (end_call(operation, result)) {
        ended.push_back(operation);
      } else {
        push(operation);
      }
    }
    for (DiskOperation* operation : ended) end(operation);
    lock.lock();
    is_asleep_ = false;
    for (DiskOperation* operation : ended) finish(operation);
    fresh.clear();
    ended.clear();
  }
  lock.unlock();
  ring_.close();
}

// The kernel took nothing: try again later where it lacks memory, else end what it did not take.
void DiskQueue::fail_queued(int error, std::vector<DiskOperation*>* ended) {
  if (error == EINTR) return;
  std::this_thread::sleep_for(std::chrono::milliseconds(1));  // it may say so for long: do not spin
  if (error == EAGAIN || error == EBUSY || error == ENOMEM) return;
  while (void* tag = ring_.take_back()) {
    if (tag == this) {
      is_listening_ = false;
      continue;
    }
    DiskOperation* const operation = static_cast<DiskOperation*>(tag);
    operation->error = error;
    ended->push_back(operation);
  }
}

void DiskQueue::push(DiskOperation* operation) {
  begin_call(operation);
  const bool is_read = operation->batch->is_read;
  const uint64_t offset = static_cast<uint64_t>(operation->offset + operation->moved);
  if (!operation->num_call) {
    ring_.push(DiskRing::NOP, -1, 0, nullptr, 0, operation);
  } else if (operation->num_call == 1) {
    constexpr size_t kMost = 1 << 30;  // whole pages; what is left goes next
    const size_t nbytes = operation->rest->iov_len;
    ring_.push(is_read ? DiskRing::READ : DiskRing::WRITE, fd_, offset, operation->rest->iov_base,
               static_cast<uint32_t>(nbytes < kMost ? nbytes : kMost), operation);
  } else {
    ring_.push(is_read ? DiskRing::READV : DiskRing::WRITEV, fd_, offset, operation->rest,
               static_cast<uint32_t>(operation->num_call), operation);
  }
}

#endif

}  // namespace kvbm
