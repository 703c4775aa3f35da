// Streams of the simulation: queues whose heads run by a worker thread, or by whoever steps or waits.
//
// A head may run when nothing of its stream runs and, if it waits for an event, that record has run. Operations run
// without the lock; marking and logging happens under it.
#include <thread>

#include "state.h"

namespace kvbm {
namespace simulated {
std::shared_ptr<Stream> stream_with(const Record* record) {
  for (const auto& [handle, stream] : state().streams) {
    for (const Operation& one : stream->queue) {
      if (one.kind == "record" && one.record.get() == record) return stream;
    }
  }
  return nullptr;
}

namespace {

constexpr std::size_t kLogCapacity = 1 << 16;

void finish(const Operation& operation, cudaError_t code) {
  if (operation.kind != "record") return;
  operation.record->is_done = true;
  operation.record->code = code;
  operation.record->at = Clock::now();
}

bool is_idle(const Stream& stream) { return stream.queue.empty() && !stream.is_busy; }

void forget_if_left(const std::shared_ptr<Stream>& stream) {
  if (stream->is_leaving && is_idle(*stream)) state().streams.erase(stream->handle);
}

// What a device holds is lost after an error in a kernel or copy; everybody who waits hears of it.
void poison(int device, cudaError_t code) {
  State& all = state();
  all.devices[device].sticky = code;
  for (auto next = all.streams.begin(); next != all.streams.end();) {
    const std::shared_ptr<Stream> stream = (next++)->second;
    if (stream->device != device) continue;
    discard(*stream, code);
    forget_if_left(stream);
  }
}

void write_log(uint64_t stream, const Operation& one) {
  auto& log = state().log;
  if (log.size() == kLogCapacity) log.pop_front();
  log.push_back({one.kind, stream, one.nbytes, one.source, one.destination});
}

bool can_run(Stream& stream) {
  if (stream.is_busy || stream.queue.empty()) return false;
  const Operation& head = stream.queue.front();
  if (head.kind == "wait") return head.record->is_done;
  if (head.kind == "delay" && state().mode == Mode::kRunning) {
    if (!stream.has_deadline) {
      stream.deadline = Clock::now() + std::chrono::nanoseconds(head.nanoseconds);
      stream.has_deadline = true;
    }
    return Clock::now() >= stream.deadline;
  }
  return true;
}

cudaError_t operation_fault() {
  auto& faults = state().operation_faults;
  for (auto fault = faults.begin(); fault != faults.end(); ++fault) {
    if (fault->after > 0) {
      --fault->after;
      continue;
    }
    const cudaError_t code = static_cast<cudaError_t>(fault->code);
    faults.erase(fault);
    return code;
  }
  return cudaSuccess;
}

void run_head(Lock& lock, const std::shared_ptr<Stream>& stream) {
  State& all = state();
  const Operation head = std::move(stream->queue.front());
  stream->queue.pop_front();
  stream->is_busy = true;
  stream->has_deadline = false;
  all.last_stream = stream->handle;
  cudaError_t code = head.run ? operation_fault() : cudaSuccess;
  if (code == cudaSuccess && head.run) {
    lock.unlock();
    code = head.run();
    lock.lock();
  }
  stream->is_busy = false;
  write_log(stream->handle, head);
  finish(head, code);
  if (code != cudaSuccess && stream->device < all.num_devices) poison(stream->device, code);
  forget_if_left(stream);
  all.changed.notify_all();
}

std::shared_ptr<Stream> next_stream() {
  State& all = state();
  auto next = all.streams.upper_bound(all.last_stream);
  for (std::size_t i = 0; i < all.streams.size(); ++i) {
    if (next == all.streams.end()) next = all.streams.begin();
    if (can_run(*next->second)) return next->second;
    ++next;
  }
  return nullptr;
}

[[noreturn]] void work() {
  State& all = state();
  Lock lock(all.lock);
  for (;;) {
    const std::shared_ptr<Stream> stream = all.mode == Mode::kRunning ? next_stream() : nullptr;
    if (stream != nullptr) {
      run_head(lock, stream);
      continue;
    }
    const Clock::time_point never = Clock::time_point::max();
    Clock::time_point until = never;
    for (const auto& [handle, one] : all.streams) {
      if (one->has_deadline && !one->is_busy) until = std::min(until, one->deadline);
    }
    if (until == never || all.mode != Mode::kRunning) {
      all.changed.wait(lock);
    } else {
      all.changed.wait_until(lock, until);
    }
  }
}

// Run one operation that brings `stream` forward; false: there is none.
bool step_towards(Lock& lock, const std::shared_ptr<Stream>& stream) {
  if (stream->is_busy) {
    state().changed.wait(lock);
    return true;
  }
  if (stream->queue.empty()) return false;
  const Operation& head = stream->queue.front();
  if (head.kind == "wait" && !head.record->is_done) {
    const std::shared_ptr<Stream> other = stream_with(head.record.get());
    return other != nullptr && step_towards(lock, other);
  }
  run_head(lock, stream);
  return true;
}

}  // namespace

cudaError_t reach(Lock& lock, bool is_urgent, const std::function<bool()>& is_done,
                  const std::function<std::shared_ptr<Stream>()>& stream) {
  State& all = state();
  while (!is_done()) {
    const bool is_driven = all.mode == Mode::kStepped || (is_urgent && all.mode == Mode::kHeld);
    if (!is_driven) {
      all.changed.wait(lock);
      continue;
    }
    const std::shared_ptr<Stream> next = stream();
    if (next == nullptr || !step_towards(lock, next)) return keep(cudaErrorUnknown);
  }
  return cudaSuccess;
}

void discard(Stream& stream, cudaError_t code) {
  for (const Operation& one : stream.queue) finish(one, code);
  stream.queue.clear();
}

std::shared_ptr<Stream> find_stream(cudaStream_t handle) {
  State& all = state();
  uint64_t number = reinterpret_cast<uint64_t>(handle);
  if (number <= 2) {  // the default stream by its three names: one for each device
    number = static_cast<uint64_t>(current_device()) + 3;
    auto& made = all.streams[number];
    if (made == nullptr) made = std::make_shared<Stream>(number, current_device(), 0);
    return made;
  }
  const auto found = all.streams.find(number);
  return found == all.streams.end() || found->second->is_leaving ? nullptr : found->second;
}

void start_worker(Lock&) {
  if (state().has_worker) return;
  state().has_worker = true;
  std::thread(work).detach();
}

cudaError_t queue(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation) {
  State& all = state();
  stream->queue.push_back(std::move(operation));
  if (all.mode == Mode::kRunning) start_worker(lock);
  all.changed.notify_all();
  return cudaSuccess;
}

cudaError_t drain(Lock& lock, const std::shared_ptr<Stream>& stream, bool is_urgent) {
  const cudaError_t code = reach(lock, is_urgent, [&] { return is_idle(*stream); }, [&] { return stream; });
  if (code != cudaSuccess) return code;
  return stream->device < state().num_devices ? keep(state().devices[stream->device].sticky) : cudaSuccess;
}

cudaError_t drain_device(Lock& lock, int device) {
  const auto busy = [device]() -> std::shared_ptr<Stream> {
    for (const auto& [handle, stream] : state().streams) {
      if (stream->device == device && !is_idle(*stream)) return stream;
    }
    return nullptr;
  };
  return reach(lock, true, [&] { return busy() == nullptr; }, busy);
}

int advance(Lock& lock, uint64_t handle, bool is_any, int n) {
  State& all = state();
  int num_run = 0;
  while (num_run < n) {
    std::shared_ptr<Stream> stream;
    if (is_any) {
      stream = next_stream();
    } else {
      const auto found = all.streams.find(handle <= 2 ? static_cast<uint64_t>(current_device()) + 3 : handle);
      if (found != all.streams.end() && can_run(*found->second)) stream = found->second;
    }
    if (stream == nullptr) break;
    run_head(lock, stream);
    ++num_run;
  }
  return num_run;
}

cudaError_t queue_kernel(const char* name, dim3 grid, dim3 block, std::size_t shared_nbytes, cudaStream_t handle,
                         const void* entry, std::function<void()> body) {
  constexpr std::size_t kPlainShared = 48 << 10;  // more needs cudaFuncSetAttribute
  Lock lock(state().lock);
  State& all = state();
  if (const cudaError_t code = enter(lock, "cudaLaunchKernel")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr || stream->device != current_device()) return keep(cudaErrorInvalidResourceHandle);
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  const auto allowed = all.shared_nbytes.find(entry);
  const bool is_allowed = allowed != all.shared_nbytes.end();
  const std::size_t most = is_allowed ? static_cast<std::size_t>(allowed->second) : kPlainShared;
  if (num_threads == 0 || num_threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffU || grid.y > 65535 || grid.z > 65535 || shared_nbytes > std::max(most, kPlainShared)) {
    return keep(cudaErrorInvalidConfiguration);
  }
  std::string title(name);
  if (!title.empty() && title.front() == '(') title = title.substr(1, title.size() - 2);
  Operation operation;
  operation.kind = "kernel:" + title;
  const int device = stream->device;
  operation.run = [=] {
    std::vector<Range> ranges;
    bool is_reversed;
    {
      Lock own(state().lock);
      for (const auto& [base, range] : state().ranges) ranges.push_back(range);
      is_reversed = state().is_reversed;
    }
    return run_grid(device, grid, block, shared_nbytes, is_reversed, ranges, body);
  };
  return queue(lock, stream, std::move(operation));
}

cudaError_t queue_delay(uint64_t nanoseconds, cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaLaunchKernel")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr || stream->device != current_device()) return keep(cudaErrorInvalidResourceHandle);
  Operation operation;
  operation.kind = "delay";
  operation.nanoseconds = nanoseconds;
  return queue(lock, stream, std::move(operation));
}

}  // namespace simulated
}  // namespace kvbm

using namespace kvbm::simulated;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int, int priority) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaStreamCreateWithPriority")) return code;
  State& all = state();
  const uint64_t handle = all.next_handle += 0x100;
  all.streams[handle] = std::make_shared<Stream>(handle, current_device(), priority);
  *stream = reinterpret_cast<cudaStream_t>(handle);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaStreamDestroy")) return keep(code);
  const uint64_t number = reinterpret_cast<uint64_t>(handle);
  if (number <= 2) return keep(cudaErrorInvalidResourceHandle);
  if (number <= state().forgotten_handle) return cudaSuccess;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr) return keep(cudaErrorInvalidResourceHandle);
  stream->is_leaving = true;
  forget_if_left(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaStreamSynchronize")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr) return keep(cudaErrorInvalidResourceHandle);
  return drain(lock, stream, false);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaStreamQuery")) return code;
  const std::shared_ptr<Stream> stream = find_stream(handle);
  if (stream == nullptr) return keep(cudaErrorInvalidResourceHandle);
  return is_idle(*stream) ? cudaSuccess : keep(cudaErrorNotReady);
}
