// Looks the driver's calls up, and makes the batched copy.
#include "batch_copy.h"

#ifndef KVBM_SIMULATED
#include <cuda.h>
#include <dlfcn.h>
#endif

namespace kvbm {
namespace {

// CUmemcpyAttributes of cuda.h, whose CUmemLocation is a type and an id; the hints mean nothing for pinned memory.
struct Attributes {
  int source_access_order = 1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
  int source_hint[2] = {};
  int destination_hint[2] = {};
  unsigned int flags = 0;
};
#if defined(CUDA_VERSION) && CUDA_VERSION >= 12080  // older toolkits build too, and cannot say
static_assert(sizeof(Attributes) == sizeof(CUmemcpyAttributes), "laid out as the driver reads it");
static_assert(offsetof(Attributes, source_hint) == offsetof(CUmemcpyAttributes, srcLocHint), "as the driver reads it");
static_assert(offsetof(Attributes, flags) == offsetof(CUmemcpyAttributes, flags), "as the driver reads it");
static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == 1 && sizeof(CUdeviceptr) == sizeof(uint64_t), "as the driver's");
#endif

using Batch12 = int (*)(uint64_t*, uint64_t*, std::size_t*, std::size_t, void*, std::size_t*, std::size_t,
                        std::size_t*, cudaStream_t);
using Batch13 = int (*)(uint64_t*, uint64_t*, std::size_t*, std::size_t, void*, std::size_t*, std::size_t,
                        cudaStream_t);

}  // namespace

void* find_driver_symbol(const char* name) {
#ifdef KVBM_SIMULATED
  return simulated::find_symbol(name);
#else
  static void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return library == nullptr ? nullptr : ::dlsym(library, name);
#endif
}

bool has_batch_copy() {
  return find_driver_symbol("cuMemcpyBatchAsync_v2") != nullptr || find_driver_symbol("cuMemcpyBatchAsync") != nullptr;
}

cudaError_t memcpy_batch(uint64_t* destinations, uint64_t* sources, std::size_t* sizes, std::size_t count,
                         cudaStream_t stream) {
  Attributes attributes;
  std::size_t first = 0, failed = 0;
  if (const auto call = reinterpret_cast<Batch13>(find_driver_symbol("cuMemcpyBatchAsync_v2"))) {
    return static_cast<cudaError_t>(call(destinations, sources, sizes, count, &attributes, &first, 1, stream));
  }
  if (const auto call = reinterpret_cast<Batch12>(find_driver_symbol("cuMemcpyBatchAsync"))) {
    return static_cast<cudaError_t>(call(destinations, sources, sizes, count, &attributes, &first, 1, &failed, stream));
  }
  return cudaErrorNotSupported;
}

}  // namespace kvbm
