// A mutex that knows its holder, so that a call from inside a call can be refused.
#pragma once

#include <atomic>
#include <mutex>

namespace kvbm {

class OwnedLock {
 public:
  bool is_mine(unsigned long me) const { return owner_.load(std::memory_order_relaxed) == me; }
  bool try_lock(unsigned long me) {
    if (!mutex_.try_lock()) return false;
    owner_.store(me, std::memory_order_relaxed);
    return true;
  }
  void lock(unsigned long me) {
    mutex_.lock();
    owner_.store(me, std::memory_order_relaxed);
  }
  void unlock() {
    owner_.store(0, std::memory_order_relaxed);
    mutex_.unlock();
  }

 private:
  std::mutex mutex_;
  std::atomic<unsigned long> owner_{0};
};

}  // namespace kvbm
