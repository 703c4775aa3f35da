// The team is made at the first large copy and lives as long as the process. It is never destroyed: its threads only
// sleep on it. A forked child has none of the parent's threads, so it drops the parent's team and makes its own.
#include "copy_threads.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace kvbm {
namespace {

constexpr int kMaxHelpers = 63;

class Team {
 public:
  void run(void (*work)(void*), void* context, int num_helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      work(context);
      return;
    }
    {
      std::lock_guard<std::mutex> guard(mutex_);
      grow(num_helpers);
      work_ = work;
      context_ = context;
      wanted_ = num_helpers < num_threads_ ? num_helpers : num_threads_;
    }
    wake_.notify_all();
    work(context);
    std::unique_lock<std::mutex> guard(mutex_);
    wanted_ = 0;  // a helper that has not begun is not needed any more
    idle_.wait(guard, [this] { return running_ == 0; });
  }

 private:
  // Start missing threads with all signals blocked: Python's handlers belong to its own threads.
  void grow(int num_helpers) {
    if (num_helpers > kMaxHelpers) num_helpers = kMaxHelpers;
    if (num_threads_ >= num_helpers) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; num_threads_ < num_helpers; ++num_threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // Too few threads are left on this machine; those that did start share the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      wake_.wait(guard, [this] { return wanted_ > 0; });
      --wanted_;
      ++running_;
      void (*const work)(void*) = work_;
      void* const context = context_;
      guard.unlock();
      work(context);
      guard.lock();
      if (--running_ == 0) idle_.notify_all();
    }
  }

  std::mutex turn_;  // held by the caller that has the team
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_;
  std::condition_variable idle_;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0;  // helpers that should still begin
  int running_ = 0;
  int num_threads_ = 0;
};

std::atomic<Team*> current_team{nullptr};

Team& team() {
  Team* found = current_team.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_team.store(nullptr); });
  static_cast<void>(registered);
  Team* made = new Team;
  if (current_team.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void run_in_team(void (*work)(void*), void* context, int num_threads) {
  if (num_threads <= 1) {
    work(context);
    return;
  }
  team().run(work, context, num_threads - 1);
}

}  // namespace kvbm
