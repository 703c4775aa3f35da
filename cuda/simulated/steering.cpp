// What tests set, step and read in the simulation.
#include "simulation.h"

#include <climits>
#include <cstdio>
#include <cstring>

#include "state.h"

using namespace kvbm::simulated;

void kvbm_simulated_set_mode(int mode) {
  Lock lock(state().lock);
  state().mode = static_cast<Mode>(mode);
  if (state().mode == Mode::kRunning) start_worker(lock);
  state().changed.notify_all();
}

int kvbm_simulated_mode(void) {
  Lock lock(state().lock);
  return static_cast<int>(state().mode);
}

void kvbm_simulated_set_num_devices(int num_devices) {
  Lock lock(state().lock);
  state().num_devices = num_devices;
  state().devices.resize(static_cast<std::size_t>(num_devices));
}

int kvbm_simulated_num_devices(void) {
  Lock lock(state().lock);
  return state().num_devices;
}

int kvbm_simulated_current_device(void) { return current_device(); }

int kvbm_simulated_has_context(int device) {
  unsigned int flags = 0;
  int is_active = 0;
  return context_state(device, &flags, &is_active) == 0 && is_active != 0;
}

int kvbm_simulated_capture_mode(void) { return capture_mode(); }

void kvbm_simulated_set_capturing(int is_capturing, uint64_t stream) {
  Lock lock(state().lock);
  state().is_capturing = is_capturing != 0;
  state().capturing_stream = stream;
}

int kvbm_simulated_capturing(void) {
  Lock lock(state().lock);
  return state().is_capturing ? 1 : 0;
}

void kvbm_simulated_set_total_nbytes(uint64_t nbytes) {
  Lock lock(state().lock);
  state().total_nbytes = nbytes;
}

uint64_t kvbm_simulated_total_nbytes(void) {
  Lock lock(state().lock);
  return state().total_nbytes;
}

void kvbm_simulated_set_batch_copy(int version) {
  Lock lock(state().lock);
  state().batch_copy = version;
}

int kvbm_simulated_batch_copy(void) {
  Lock lock(state().lock);
  return state().batch_copy;
}

void kvbm_simulated_set_reversed(int is_reversed) {
  Lock lock(state().lock);
  state().is_reversed = is_reversed != 0;
}

int kvbm_simulated_reversed(void) {
  Lock lock(state().lock);
  return state().is_reversed ? 1 : 0;
}

int kvbm_simulated_advance(uint64_t stream, int is_any, int n) {
  Lock lock(state().lock);
  return advance(lock, stream, is_any != 0, n);
}

int kvbm_simulated_code(const char* name) {
  for (int code = 0; code < 1000; ++code) {
    if (std::strcmp(cudaGetErrorName(static_cast<cudaError_t>(code)), name) == 0) return code;
  }
  return -1;
}

void kvbm_simulated_fail_call(const char* name, int code, uint64_t after) {
  Lock lock(state().lock);
  state().call_faults[name].push_back({code, after});
}

void kvbm_simulated_fail_operation(int code, uint64_t after) {
  Lock lock(state().lock);
  state().operation_faults.push_back({code, after});
}

uint64_t kvbm_simulated_num_operations(void) {
  Lock lock(state().lock);
  return state().log.size();
}

uint64_t kvbm_simulated_operations(uint64_t first, uint64_t n, kvbm_simulated_operation* operations) {
  Lock lock(state().lock);
  const auto& log = state().log;
  uint64_t num_given = 0;
  for (; num_given < n && first + num_given < log.size(); ++num_given) {
    const LogEntry& entry = log[first + num_given];
    kvbm_simulated_operation& one = operations[num_given];
    std::snprintf(one.kind, sizeof one.kind, "%s", entry.kind.c_str());
    one.stream = entry.stream;
    one.nbytes = entry.nbytes;
    one.source = entry.source;
    one.destination = entry.destination;
  }
  return num_given;
}

void kvbm_simulated_counts_now(kvbm_simulated_counts* counts) {
  Lock lock(state().lock);
  const State& all = state();
  std::memset(counts, 0, sizeof *counts);
  for (const auto& [base, range] : all.ranges) {
    if (range.type == cudaMemoryTypeDevice) {
      ++counts->num_allocations;
      counts->allocated_nbytes += range.nbytes;
    } else {
      ++counts->num_registrations;
    }
  }
  for (const auto& [handle, stream] : all.streams) {
    counts->num_streams += handle >= kFirstHandle ? 1 : 0;
    counts->num_waiting += stream->queue.size() + (stream->is_busy ? 1 : 0);
  }
  counts->num_events = all.events.size();
}

void kvbm_simulated_reset(void) {
  Lock lock(state().lock);
  State& all = state();
  all.mode = Mode::kHeld;
  for (const auto& [handle, stream] : all.streams) discard(*stream, cudaErrorUnknown);
  for (int device = 0; device < all.num_devices; ++device) drain_device(lock, device);  // what runs now ends first
  release_everything(all);
  all.streams.clear();
  all.events.clear();
  all.forgotten_handle = all.next_handle;
  all.shared_nbytes.clear();
  all.call_faults.clear();
  all.operation_faults.clear();
  all.log.clear();
  all.devices.assign(1, DeviceState{});
  all.num_devices = 1;
  all.batch_copy = 13;
  all.is_reversed = false;
  all.is_capturing = false;
  all.capturing_stream = 0;
  all.total_nbytes = kTotalBytes;
  all.mode = Mode::kRunning;
  all.changed.notify_all();
}
