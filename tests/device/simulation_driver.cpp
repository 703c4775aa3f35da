// Kernels that break CUDA's rules, and some that keep them: each claim is a run that prints what the simulation said.
#include <cstdio>
#include <cstring>
#include <string>

#include "device_code.cuh"
#include "simulation.h"

namespace {

using kvbm::load;
using kvbm::store;

__global__ void misaligned(uint32_t* at) {
  const char* const odd = reinterpret_cast<const char*>(at) + 2;
  store(at, load(reinterpret_cast<const uint32_t*>(odd)));
}

__global__ void too_far(uint4* at) { store(at + threadIdx.x, make_uint4(1, 2, 3, 4)); }

__global__ void before(uint4* at) { store(at - 1, make_uint4(1, 2, 3, 4)); }

__global__ void diverge_block(uint32_t*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void diverge_warp(uint32_t*) {
  if (threadIdx.x % 2 == 0) __syncwarp();
}

__global__ void foreign_lane(uint32_t*) { __syncwarp(0x0000ffffU); }

// Sums 0..n-1 over a block: shuffles within warps, shared memory between them.
__global__ void sum_block(unsigned long long* total) {
  KVBM_SHARED(uint64_t, partial);
  uint64_t value = threadIdx.x + blockIdx.x * blockDim.x;
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffU, value, bits);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
    atomicAdd(total, static_cast<unsigned long long>(sum));
  }
}

// Without its barrier the order of threads decides: the simulation can take either.
__global__ void race(uint32_t* at) {
  KVBM_SHARED(uint32_t, word);
  if (threadIdx.x == 0) word[0] = 7;
  if (threadIdx.x == 1) store(at, word[0]);
}

__global__ void lanes(uint32_t* at) {
  const unsigned lane = threadIdx.x;
  const uint32_t down = __shfl_down_sync(0xffffffffU, lane, 3U);
  const uint32_t group = __shfl_xor_sync(0xffffffffU, lane, 5, 8);
  const unsigned odd = __ballot_sync(0xffffffffU, static_cast<int>(lane & 1U));
  store(at + lane, down | group << 8 | (odd == 0xaaaaaaaaU ? 1U << 16 : 0U));
}

__global__ void groups(uint32_t* at) {
  const unsigned mask = 0xffU << (threadIdx.x / 8 * 8);
  uint32_t value = 1;
  if (threadIdx.x / 8 != 2) {
    for (int bits = 4; bits > 0; bits /= 2) value += __shfl_xor_sync(mask, value, bits);
  }
  store(at + threadIdx.x, value);
}

__global__ void nothing(uint32_t*) {}

const char* said(cudaStream_t stream) {
  const cudaError_t launched = cudaGetLastError();
  return cudaGetErrorName(launched != cudaSuccess ? launched : cudaStreamSynchronize(stream));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string claim = argc > 1 ? argv[1] : "";
  cudaStream_t stream;
  void* memory;
  uint32_t host[64] = {};
  cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0);
  cudaMalloc(&memory, 1024);
  cudaMemsetAsync(memory, 0, 1024, stream);
  auto* const at = static_cast<uint32_t*>(memory);
  if (claim == "misaligned") KVBM_LAUNCH(misaligned, 1, 1, 0, stream, at);
  if (claim == "in_range") KVBM_LAUNCH(too_far, 1, 64, 0, stream, static_cast<uint4*>(memory));
  if (claim == "too_far") KVBM_LAUNCH(too_far, 1, 65, 0, stream, static_cast<uint4*>(memory));
  if (claim == "before") KVBM_LAUNCH(before, 1, 1, 0, stream, static_cast<uint4*>(memory));
  if (claim == "over_the_end") {
    void* odd;
    cudaMalloc(&odd, 1000);  // 62 vectors of 16 bytes and a half
    KVBM_LAUNCH(too_far, 1, 63, 0, stream, static_cast<uint4*>(odd));
  }
  if (claim == "diverge_block") KVBM_LAUNCH(diverge_block, 1, 64, 0, stream, at);
  if (claim == "diverge_warp") KVBM_LAUNCH(diverge_warp, 1, 32, 0, stream, at);
  if (claim == "foreign_lane") KVBM_LAUNCH(foreign_lane, 1, 32, 0, stream, at);
  if (claim == "too_many_threads") KVBM_LAUNCH(nothing, 1, 1025, 0, stream, at);
  if (claim == "no_blocks") KVBM_LAUNCH(nothing, 0, 1, 0, stream, at);
  if (claim == "too_much_shared") KVBM_LAUNCH(nothing, 1, 1, (48 << 10) + 1, stream, at);
  if (claim == "much_shared") {
    cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    KVBM_LAUNCH(nothing, 1, 1, 64 << 10, stream, at);
  }
  if (claim == "pageable") KVBM_LAUNCH(too_far, 1, 1, 0, stream, reinterpret_cast<uint4*>(host));
  if (claim == "sum") KVBM_LAUNCH(sum_block, 5, 256, 64, stream, static_cast<unsigned long long*>(memory));
  if (claim == "lanes") KVBM_LAUNCH(lanes, 1, 32, 0, stream, at);
  if (claim == "groups") KVBM_LAUNCH(groups, 1, 32, 0, stream, at);
  kvbm_simulated_set_reversed(claim == "race_reversed");
  if (claim.rfind("race", 0) == 0) KVBM_LAUNCH(race, 1, 32, 16, stream, at);
  const std::string answer = said(stream);
  std::printf("%s", answer.c_str());
  if (answer == "cudaSuccess") {
    cudaMemcpyAsync(host, memory, sizeof host, cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    for (int i = 0; i < 32; ++i) std::printf(" %u", host[i]);
  }
  std::printf("\n");
  return 0;
}
