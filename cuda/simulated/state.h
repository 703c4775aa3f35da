// What the parts of the simulation share. One lock guards everything here; operations run without it, a stream that
// runs one is `is_busy` meanwhile. The state is never destroyed: threads may still use it while the process ends.
#ifndef KVBM_SIMULATED_STATE_H
#define KVBM_SIMULATED_STATE_H

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace kvbm {
namespace simulated {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

struct Range {
  uint64_t base;
  uint64_t nbytes;
  cudaMemoryType type;
  int device;
  char* bytes;           // where the bytes of device memory are; registered memory is where it says
  uint64_t mapped_nbytes;  // of `bytes`, whole pages
};

// One record of an event on a stream; an event names its latest.
struct Record {
  bool is_done = false;
  cudaError_t code = cudaSuccess;
  Clock::time_point at;
};

struct Event {
  int device;
  bool has_timing;
  std::shared_ptr<Record> record;  // none: nothing was recorded yet
};

struct Operation {
  std::string kind;
  uint64_t nbytes = 0;
  uint64_t source = 0, destination = 0;
  std::function<cudaError_t()> run;  // none: nothing to do
  std::shared_ptr<Record> record;    // to mark when it runs, or, of a "wait", to wait for
  uint64_t nanoseconds = 0;          // of a "delay"
};

struct Stream {
  Stream(uint64_t number, int on, int of_priority) : handle(number), device(on), priority(of_priority) {}

  uint64_t handle;
  int device;
  int priority;
  bool is_busy = false;
  bool is_leaving = false;  // destroyed; what it holds still runs
  bool has_deadline = false;
  Clock::time_point deadline;  // of the delay at its head
  std::deque<Operation> queue;
};

struct LogEntry {
  std::string kind;
  uint64_t stream, nbytes, source, destination;
};

struct Fault {
  int code;
  uint64_t after;  // calls that still pass
};

struct DeviceState {
  cudaError_t sticky = cudaSuccess;
  bool has_context = false;  // made by the first that makes the device current, or works on it
  uint64_t used_nbytes = 0;
};

constexpr uint64_t kFirstHandle = 0x100000;            // of streams and events that a program makes
constexpr uint64_t kTotalBytes = uint64_t{1} << 31;  // of each device, unless a test says otherwise

enum class Mode { kRunning, kStepped, kHeld };

struct State {
  std::mutex lock;
  std::condition_variable changed;
  Mode mode = Mode::kRunning;
  int num_devices = 1;
  int batch_copy = 13;  // the CUDA whose batched copy the driver has; 12 names it otherwise, 0 has none
  bool is_reversed = false;  // threads of a block start with the last one
  bool is_capturing = false;  // some other thread captures a graph, in CUDA's default mode
  uint64_t capturing_stream = 0;  // on this stream; 0: one that we do not see
  uint64_t total_nbytes = kTotalBytes;
  std::vector<DeviceState> devices{1};
  std::map<uint64_t, Range> ranges;  // by base
  std::map<uint64_t, std::shared_ptr<Stream>> streams;
  std::map<uint64_t, std::shared_ptr<Event>> events;
  std::map<const void*, int> shared_nbytes;  // that cudaFuncSetAttribute allowed a kernel
  std::map<std::string, std::deque<Fault>> call_faults;
  std::deque<Fault> operation_faults;
  std::deque<LogEntry> log;
  uint64_t next_handle = kFirstHandle;
  uint64_t forgotten_handle = 0;  // the last one before a reset: up to it they are destroyed without an error
  uint64_t last_stream = 0;  // that ran something: others come first
  bool has_worker = false;
};

State& state();

// -- calls ----------------------------------------------------------------------------------------------------------

int current_device();
int capture_mode();  // of the thread
int context_state(int device, unsigned int* flags, int* is_active);  // cuDevicePrimaryCtxGetState
// Keep a code for cudaGetLastError.
cudaError_t keep(cudaError_t code);
// What a call that works on the current device gives before it does anything: faults, no such device, sticky errors.
cudaError_t enter(Lock& lock, const char* name);
cudaError_t injected(const char* name);  // the lock is held

// -- memory ---------------------------------------------------------------------------------------------------------

const Range* find_range(uint64_t address);                          // the lock is held
cudaError_t place_of(uint64_t address, uint64_t nbytes, int device, char** bytes);  // the lock is held
void release_everything(State& all);                                // the lock is held

// -- streams --------------------------------------------------------------------------------------------------------

std::shared_ptr<Stream> find_stream(cudaStream_t stream);  // the lock is held; NULL: no such stream
void start_worker(Lock& lock);
cudaError_t queue(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation);
// Give up what a stream holds; whoever waits for its events is told the code.
void discard(Stream& stream, cudaError_t code);  // the lock is held
// The stream that holds a record still, if any does.
std::shared_ptr<Stream> stream_with(const Record* record);  // the lock is held
// Wait, or run what is needed, until `is_done`; `stream` gives the one to bring forward.
cudaError_t reach(Lock& lock, bool is_urgent, const std::function<bool()>& is_done,
                  const std::function<std::shared_ptr<Stream>()>& stream);
// Wait until a stream is empty and idle, or run what that needs; `is_urgent`: run it in every mode but the running one.
cudaError_t drain(Lock& lock, const std::shared_ptr<Stream>& stream, bool is_urgent);
cudaError_t drain_device(Lock& lock, int device);
int advance(Lock& lock, uint64_t stream, bool is_any, int n);

// -- kernels --------------------------------------------------------------------------------------------------------

cudaError_t run_grid(int device, dim3 grid, dim3 block, std::size_t shared_nbytes, bool is_reversed,
                     const std::vector<Range>& ranges, const std::function<void()>& body);

}  // namespace simulated
}  // namespace kvbm

#endif
