// For tests and benchmarks: bytes that follow from a seed, and a kernel that keeps a stream busy.
#include "kernels.h"
#include "vectors.cuh"

namespace kvbm {
namespace {

constexpr uint32_t kThreads = 256;
constexpr int kFillBlocks = 1024;  // enough to fill every multiprocessor

// Eight bytes for each thread and turn, one store where the address allows it.
__global__ void __launch_bounds__(kThreads) fill_kernel(uint64_t address, uint64_t nbytes, uint64_t seed) {
  const uint64_t num_words = ceil_div(nbytes, sizeof(uint64_t));
  const uint64_t num_threads = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_words; i += num_threads) {
    const uint64_t at = i * sizeof(uint64_t);
    const uint64_t most = lesser(nbytes - at, sizeof(uint64_t));
    const uint64_t word = fill_word(seed, i);
    if (most == sizeof(uint64_t) && (address + at) % sizeof(uint64_t) == 0) {
      store_at<unsigned long long>(address + at, word);
    } else {
      for (uint64_t byte = 0; byte < most; ++byte)
        store_at<uint8_t>(address + at + byte, static_cast<uint8_t>(word >> (8 * byte)));
    }
  }
}

#ifdef __CUDACC__
KVBM_DEVICE uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(1) delay_kernel(uint64_t nanoseconds) {
  const uint64_t begin = now_ns();
  while (now_ns() - begin < nanoseconds) __nanosleep(1000);
}
#endif

}  // namespace

#ifdef __CUDACC__
cudaError_t load_fill_kernels() { return load_kernels(fill_kernel, delay_kernel); }
#else
cudaError_t load_fill_kernels() { return load_kernels(fill_kernel); }
#endif

cudaError_t launch_fill(uint64_t address, uint64_t nbytes, uint64_t seed, cudaStream_t stream) {
  if (nbytes == 0) return cudaSuccess;
  const uint64_t num_turns = ceil_div(nbytes, kThreads * sizeof(uint64_t));
  KVBM_LAUNCH(fill_kernel, grid_size(num_turns, 1, kFillBlocks), kThreads, 0, stream, address, nbytes, seed);
  return cudaGetLastError();
}

cudaError_t launch_delay(uint64_t nanoseconds, cudaStream_t stream) {
#ifdef __CUDACC__
  KVBM_LAUNCH(delay_kernel, 1, 1, 0, stream, nanoseconds);
  return cudaGetLastError();
#else
  return KVBM_SIMULATED_DELAY(nanoseconds, stream);
#endif
}

}  // namespace kvbm
