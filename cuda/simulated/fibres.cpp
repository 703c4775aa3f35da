// Kernels of the simulation: blocks one after the other, the threads of a block as fibres that switch at barriers.
//
// A fibre runs thread after thread until one must wait; only then does another fibre take over. So a kernel without
// barriers runs on one fibre. When every thread that has not ended waits, the kernel diverged: a launch failure.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace kvbm {
namespace simulated {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kGuardBytes = 64 << 10;
constexpr int kWarp = 32;

struct KernelFault {
  cudaError_t code;
};

class Executor;

struct Fibre {
  explicit Fibre(Executor* owner);
  ~Fibre() { ::munmap(stack - kGuardBytes, kStackBytes + kGuardBytes); }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  Executor* owner;
  char* stack;
  ucontext_t context;
  int thread = 0;  // in its block
  uint3 index{};
  bool is_free = true;
  bool is_fresh = true;  // its stack holds nothing: it must start at the top
  void* asan = nullptr;
};

// Where the lanes of one mask meet. Two slots: a lane may bring the next value while others still read this one.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  uint64_t values[2][kWarp] = {};
  std::vector<Fibre*> waiting;
};

class Executor {
 public:
  cudaError_t run(int device, dim3 grid, dim3 block, std::size_t shared_nbytes, bool is_reversed,
                  const std::vector<Range>& ranges, const std::function<void()>& body);
  void* access(const void* at, std::size_t nbytes, std::size_t alignment);
  // Meet the lanes of `mask`: what each brought, and which there are.
  const uint64_t* meet(unsigned mask, uint64_t value, unsigned* present);
  void wait_block();
  void loop();  // of a fibre

  Fibre* current = nullptr;
  uint3 block_number{};
  dim3 block{}, grid{};
  std::vector<unsigned char> shared;
  unsigned char* shared_start = nullptr;

 private:
  void run_block();
  void resume(Fibre* fibre);
  void suspend();
  Fibre* free_fibre();
  Meeting& meeting(unsigned mask);
  void take_thread(Fibre* fibre);
  [[noreturn]] static void fault(cudaError_t code) { throw KernelFault{code}; }

  std::vector<std::unique_ptr<Fibre>> fibres;
  std::deque<Fibre*> ready;
  std::vector<std::vector<std::unique_ptr<Meeting>>> warps;
  std::vector<Fibre*> at_barrier;
  const std::function<void()>* body = nullptr;
  const std::vector<Range>* ranges = nullptr;
  const Range* last[2] = {};
  int device = 0;
  int num_threads = 0, num_started = 0, num_ended = 0;
  std::size_t shared_nbytes = 0;
  bool is_reversed = false;
  cudaError_t code = cudaSuccess;
  ucontext_t scheduler{};
  void* asan_scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_nbytes = 0;
};

thread_local Executor* running = nullptr;

void enter_fibre(unsigned high, unsigned low) {
  reinterpret_cast<Fibre*>((uint64_t{high} << 32) | low)->owner->loop();
}

Fibre::Fibre(Executor* executor) : owner(executor) {
  void* const at = ::mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  ::mprotect(at, kGuardBytes, PROT_NONE);
  stack = static_cast<char*>(at) + kGuardBytes;
}

void Executor::resume(Fibre* fibre) {
  if (fibre->is_fresh) {
    ::getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = fibre->stack;
    fibre->context.uc_stack.ss_size = kStackBytes;
    fibre->context.uc_link = nullptr;
    const uint64_t word = reinterpret_cast<uint64_t>(fibre);
    ::makecontext(&fibre->context, reinterpret_cast<void (*)()>(enter_fibre), 2, static_cast<unsigned>(word >> 32),
                  static_cast<unsigned>(word));
    fibre->is_fresh = false;
    fibre->asan = nullptr;
  }
  current = fibre;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&asan_scheduler, fibre->stack, kStackBytes);
#endif
  ::swapcontext(&scheduler, &fibre->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(asan_scheduler, nullptr, nullptr);
#endif
  current = nullptr;
}

void Executor::suspend() {
  Fibre* const fibre = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fibre->asan, scheduler_stack, scheduler_nbytes);
#endif
  ::swapcontext(&fibre->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre->asan, &scheduler_stack, &scheduler_nbytes);
#endif
}

void Executor::take_thread(Fibre* fibre) {
  const unsigned linear = static_cast<unsigned>(is_reversed ? num_threads - 1 - num_started : num_started);
  ++num_started;
  fibre->thread = static_cast<int>(linear);
  fibre->index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
}

void Executor::loop() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_nbytes);
#endif
  for (;;) {
    // Forwards every thread comes to its first wait before one goes on, so that warps which share memory by mistake
    // meet; backwards one warp goes as far as it can before the next begins.
    while (code == cudaSuccess && num_started < num_threads && (!is_reversed || ready.empty())) {
      take_thread(current);
      try {
        (*body)();
      } catch (const KernelFault& fault) {
        code = fault.code;
      }
      ++num_ended;
    }
    current->is_free = true;
    suspend();
  }
}

Fibre* Executor::free_fibre() {
  for (const auto& fibre : fibres) {
    if (fibre->is_free) return fibre.get();
  }
  fibres.push_back(std::make_unique<Fibre>(this));
  return fibres.back().get();
}

void Executor::run_block() {
  num_started = num_ended = 0;
  ready.clear();
  at_barrier.clear();
  for (auto& warp : warps) warp.clear();
  std::memset(shared_start, 0xA5, shared_nbytes);
  while (code == cudaSuccess && num_ended < num_threads) {
    Fibre* next;
    const bool can_start = num_started < num_threads;
    if (can_start && (!is_reversed || ready.empty())) {
      next = free_fibre();
      next->is_free = false;
    } else if (!ready.empty()) {
      next = ready.front();
      ready.pop_front();
    } else {
      code = cudaErrorLaunchFailure;  // the threads that are left wait for each other at different places
      break;
    }
    resume(next);
  }
  if (code == cudaSuccess) return;
  for (const auto& fibre : fibres) {  // what stands on their stacks is given up
    fibre->is_fresh = fibre->is_fresh || !fibre->is_free;
    fibre->is_free = true;
  }
}

cudaError_t Executor::run(int on_device, dim3 on_grid, dim3 on_block, std::size_t nbytes, bool reversed,
                          const std::vector<Range>& known, const std::function<void()>& kernel) {
  device = on_device;
  grid = on_grid;
  block = on_block;
  num_threads = static_cast<int>(block.x * block.y * block.z);
  shared_nbytes = nbytes;
  is_reversed = reversed;
  ranges = &known;
  body = &kernel;
  code = cudaSuccess;
  last[0] = last[1] = nullptr;
  shared.assign(nbytes + 15, 0);
  shared_start = shared.data() + (16 - reinterpret_cast<uint64_t>(shared.data()) % 16) % 16;
  warps.resize(static_cast<std::size_t>((num_threads + kWarp - 1) / kWarp));
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < num_blocks && code == cudaSuccess; ++i) {
    const uint64_t at = is_reversed ? num_blocks - 1 - i : i;
    block_number = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                    static_cast<unsigned>(at / grid.x / grid.y)};
    run_block();
  }
  return code;
}

void* Executor::access(const void* at, std::size_t nbytes, std::size_t alignment) {
  const uint64_t address = reinterpret_cast<uint64_t>(at);
  if (address % alignment != 0) fault(cudaErrorMisalignedAddress);
  const auto holds = [&](const Range* range) {
    return range != nullptr && address - range->base < range->nbytes &&
           nbytes <= range->nbytes - (address - range->base);
  };
  const Range* found = holds(last[0]) ? last[0] : holds(last[1]) ? last[1] : nullptr;
  if (found == nullptr) {
    const uint64_t start = reinterpret_cast<uint64_t>(shared_start);
    if (address - start < shared_nbytes && nbytes <= shared_nbytes - (address - start)) return const_cast<void*>(at);
    auto after = std::upper_bound(ranges->begin(), ranges->end(), address,
                                  [](uint64_t value, const Range& range) { return value < range.base; });
    if (after == ranges->begin() || !holds(&*--after)) fault(cudaErrorIllegalAddress);
    found = &*after;
    if (found->type == cudaMemoryTypeDevice && found->device != device) fault(cudaErrorIllegalAddress);
    last[1] = last[0];
    last[0] = found;
  }
  return found->bytes + (address - found->base);
}

Meeting& Executor::meeting(unsigned mask) {
  auto& meetings = warps[static_cast<std::size_t>(current->thread / kWarp)];
  for (const auto& one : meetings) {
    if (one->mask == mask) return *one;
  }
  meetings.push_back(std::make_unique<Meeting>());
  meetings.back()->mask = mask;
  return *meetings.back();
}

const uint64_t* Executor::meet(unsigned mask, uint64_t value, unsigned* present) {
  const int own = current->thread % kWarp;
  const int num_lanes = std::min(kWarp, num_threads - current->thread / kWarp * kWarp);
  *present = num_lanes == kWarp ? mask : mask & ((1U << num_lanes) - 1);
  if ((mask >> own & 1U) == 0) fault(cudaErrorLaunchFailure);
  Meeting& here = meeting(mask);
  const uint64_t slot = here.generation & 1;
  here.values[slot][own] = value;
  here.arrived |= 1U << own;
  if (here.arrived == *present) {
    here.arrived = 0;
    ++here.generation;
    ready.insert(ready.end(), here.waiting.begin(), here.waiting.end());
    here.waiting.clear();
  } else {
    here.waiting.push_back(current);
    suspend();
  }
  return here.values[slot];
}

void Executor::wait_block() {
  at_barrier.push_back(current);
  if (static_cast<int>(at_barrier.size()) < num_threads) {
    suspend();
    return;
  }
  at_barrier.pop_back();
  ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
  at_barrier.clear();
}

}  // namespace

cudaError_t run_grid(int device, dim3 grid, dim3 block, std::size_t shared_nbytes, bool is_reversed,
                     const std::vector<Range>& ranges, const std::function<void()>& body) {
  thread_local Executor executor;
  running = &executor;
  const cudaError_t code = executor.run(device, grid, block, shared_nbytes, is_reversed, ranges, body);
  running = nullptr;
  return code;
}

const uint3& thread_index() { return running->current->index; }
const uint3& block_index() { return running->block_number; }
const dim3& block_size() { return running->block; }
const dim3& grid_size() { return running->grid; }
void* shared_memory() { return running->shared_start; }
int lane_index() { return running->current->thread % kWarp; }
void wait_block() { running->wait_block(); }

uint64_t exchange(unsigned mask, uint64_t value, int lane) {
  unsigned present;
  const uint64_t* const values = running->meet(mask, value, &present);
  return lane >= 0 && lane < kWarp && (present >> lane & 1U) != 0 ? values[lane] : value;
}

unsigned ballot(unsigned mask, bool is_set) {
  unsigned present, bits = 0;
  const uint64_t* const values = running->meet(mask, is_set ? 1 : 0, &present);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((present >> lane & 1U) != 0 && values[lane] != 0) bits |= 1U << lane;
  }
  return bits;
}

void* check_access(const void* at, std::size_t nbytes, std::size_t alignment, bool) {
  return running->access(at, nbytes, alignment);
}

unsigned long long add_atomically(unsigned long long* at, unsigned long long value) {
  auto* const place = static_cast<unsigned long long*>(running->access(at, sizeof *at, sizeof *at));
  return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}

}  // namespace simulated
}  // namespace kvbm
