// What lets one .cu source be compiled by nvcc and, against cuda/simulated, by a plain C++ compiler.
//
// Kernels read and write all memory, descriptors too, through load, store and atomicAdd, which the simulation checks:
// an address outside device memory or registered host memory, or one that is not a multiple of the access's width,
// ends the kernel with CUDA's error. Its device addresses stand for bytes that lie elsewhere, so that a plain
// `*pointer` to device memory faults there, in kernels and in host code alike. Shared memory may be used either way.
#ifndef KVBM_DEVICE_CODE_CUH
#define KVBM_DEVICE_CODE_CUH

#include <cuda_runtime.h>
#include <stdint.h>

namespace kvbm {

// Have CUDA load kernels: asking for attributes does. The first error; the last error of CUDA's stays as it is then.
template <class... Kernels>
cudaError_t load_kernels(Kernels... kernels) {
  cudaError_t code = cudaSuccess;
  cudaFuncAttributes attributes{};
  ((code = code == cudaSuccess ? cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernels)) : code), ...);
  return code;
}

}  // namespace kvbm

#ifdef __CUDACC__

#define KVBM_BOTH __host__ __device__ __forceinline__
#define KVBM_DEVICE __device__ __forceinline__

// A kernel with commas in its template arguments is given in parentheses.
#define KVBM_LAUNCH(kernel, grid, block, shared_nbytes, stream, ...) \
  kernel<<<(grid), (block), (shared_nbytes), (stream)>>>(__VA_ARGS__)

// All dynamic shared memory of a block, aligned to 16 bytes.
#define KVBM_SHARED(type, name)                                        \
  extern __shared__ __align__(16) unsigned char kvbm_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(kvbm_shared_memory)

namespace kvbm {

template <class T>
KVBM_DEVICE T load(const T* at) {
  return *at;
}

template <class T>
KVBM_DEVICE void store(T* at, const T& value) {
  *at = value;
}

// For bytes that nobody reads again soon: they should not push others out of the cache.
template <class T>
KVBM_DEVICE T load_once(const T* at) {
  return __ldcs(at);
}

template <class T>
KVBM_DEVICE void store_once(T* at, const T& value) {
  __stcs(at, value);
}

}  // namespace kvbm

#else

#define KVBM_BOTH inline
#define KVBM_DEVICE inline

#define KVBM_LAUNCH(kernel, grid, block, shared_nbytes, stream, ...) \
  ::kvbm::simulated::launch(#kernel, (grid), (block), (shared_nbytes), (stream), kernel, __VA_ARGS__)

#define KVBM_SHARED(type, name) type* const name = static_cast<type*>(::kvbm::simulated::shared_memory())

namespace kvbm {

template <class T>
T load(const T* at) {
  return *static_cast<const T*>(simulated::check_access(at, sizeof(T), alignof(T), false));
}

template <class T>
void store(T* at, const T& value) {
  *static_cast<T*>(simulated::check_access(at, sizeof(T), alignof(T), true)) = value;
}

template <class T>
T load_once(const T* at) {
  return load(at);
}

template <class T>
void store_once(T* at, const T& value) {
  store(at, value);
}

}  // namespace kvbm

#endif

#endif
