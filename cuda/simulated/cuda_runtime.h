// The part of CUDA's runtime that kvbm uses, on the CPU: what <cuda_runtime.h> is to nvcc, this is to the simulated
// build. Names, values and rules are CUDA's; where CUDA leaves behaviour undefined the simulation gives an error.
#ifndef KVBM_SIMULATED_CUDA_RUNTIME_H
#define KVBM_SIMULATED_CUDA_RUNTIME_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>

#ifndef KVBM_SIMULATED
#define KVBM_SIMULATED 1
#endif
#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorCudartUnloading = 4,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotPermitted = 800,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorUnknown = 999,
};
using cudaError_t = cudaError;

struct CUstream_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

// -- vector types -------------------------------------------------------------------------------------------------

struct uchar4 { unsigned char x, y, z, w; } __attribute__((aligned(4)));
struct ushort4 { unsigned short x, y, z, w; } __attribute__((aligned(8)));
struct uint2 { unsigned int x, y; } __attribute__((aligned(8)));
struct uint3 { unsigned int x, y, z; };
struct uint4 { unsigned int x, y, z, w; } __attribute__((aligned(16)));
struct ulonglong2 { unsigned long long x, y; } __attribute__((aligned(16)));
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int a = 1, unsigned int b = 1, unsigned int c = 1) : x(a), y(b), z(c) {}
};

// -- what runs inside kernels -------------------------------------------------------------------------------------

namespace kvbm {
namespace simulated {

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
void* shared_memory();
// Check an access of a kernel and give the host address that stands for it; a wrong one ends the kernel.
void* check_access(const void* at, std::size_t nbytes, std::size_t alignment, bool is_write);
void wait_block();
// Meet the lanes of `mask` and give the value that `lane` brought; `lane` outside the mask gives one's own.
uint64_t exchange(unsigned mask, uint64_t value, int lane);
unsigned ballot(unsigned mask, bool is_set);
int lane_index();
unsigned long long add_atomically(unsigned long long* at, unsigned long long value);

cudaError_t queue_kernel(const char* name, dim3 grid, dim3 block, std::size_t shared_nbytes, cudaStream_t stream,
                         const void* entry, std::function<void()> body);
cudaError_t queue_delay(uint64_t nanoseconds, cudaStream_t stream);

template <class... Parameters, class... Arguments>
void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_nbytes, cudaStream_t stream,
            void (*kernel)(Parameters...), Arguments... arguments) {
  std::tuple<std::decay_t<Parameters>...> copies(arguments...);  // a kernel's parameters are taken at its launch
  queue_kernel(name, grid, block, shared_nbytes, stream, reinterpret_cast<const void*>(kernel),
               [kernel, copies] { std::apply(kernel, copies); });
}

template <class T>
T shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof value);
  word = exchange(mask, word, lane);
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace simulated
}  // namespace kvbm

#define threadIdx (::kvbm::simulated::thread_index())
#define blockIdx (::kvbm::simulated::block_index())
#define blockDim (::kvbm::simulated::block_size())
#define gridDim (::kvbm::simulated::grid_size())
#define warpSize 32
#define KVBM_SIMULATED_DELAY(nanoseconds, stream) ::kvbm::simulated::queue_delay((nanoseconds), (stream))

inline void __syncthreads() { kvbm::simulated::wait_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffU) { kvbm::simulated::exchange(mask, 0, 0); }
inline unsigned __ballot_sync(unsigned mask, int is_set) { return kvbm::simulated::ballot(mask, is_set != 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = kvbm::simulated::lane_index(), other = lane ^ bits;
  return kvbm::simulated::shuffle(mask, value, other / width > lane / width ? lane : other);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = kvbm::simulated::lane_index(), other = lane + static_cast<int>(distance);
  return kvbm::simulated::shuffle(mask, value, other / width == lane / width ? other : lane);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = kvbm::simulated::lane_index();
  return kvbm::simulated::shuffle(mask, value, lane / width * width + (from & (width - 1)));
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return kvbm::simulated::add_atomically(at, value);
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// -- devices ------------------------------------------------------------------------------------------------------

struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int l2CacheSize, major, minor, multiProcessorCount, asyncEngineCount;
  int pciDomainID, pciBusID, pciDeviceID;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCanMapHostMemory = 19,
  cudaDevAttrAsyncEngineCount = 40,
  cudaDevAttrCanUseHostPointerForRegisteredMem = 91,
};

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, binaryVersion, ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char* text, int capacity, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t code);
const char* cudaGetErrorString(cudaError_t code);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* entry);
cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute attribute, int value);
template <class T>
cudaError_t cudaFuncSetAttribute(T* entry, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(entry), attribute, value);
}
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* entry) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(entry));
}

// -- memory -------------------------------------------------------------------------------------------------------

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3,
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
  void* hostPointer;
};
enum { cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2 };

cudaError_t cudaMalloc(void** address, std::size_t nbytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemGetInfo(std::size_t* free_nbytes, std::size_t* total_nbytes);
cudaError_t cudaHostRegister(void* address, std::size_t nbytes, unsigned int flags);
cudaError_t cudaHostUnregister(void* address);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address);

// -- streams and events -------------------------------------------------------------------------------------------

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
// Of the thread: gives it the mode, and `mode` the one it had.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);

// -- copies -------------------------------------------------------------------------------------------------------

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
struct cudaPitchedPtr { void* ptr; std::size_t pitch, xsize, ysize; };
struct cudaExtent { std::size_t width, height, depth; };
struct cudaPos { std::size_t x, y, z; };
struct cudaMemcpy3DParms {
  void* srcArray;
  cudaPos srcPos;
  cudaPitchedPtr srcPtr;
  void* dstArray;
  cudaPos dstPos;
  cudaPitchedPtr dstPtr;
  cudaExtent extent;
  cudaMemcpyKind kind;
};
inline cudaPitchedPtr make_cudaPitchedPtr(void* at, std::size_t pitch, std::size_t xsize, std::size_t ysize) {
  return {at, pitch, xsize, ysize};
}
inline cudaExtent make_cudaExtent(std::size_t width, std::size_t height, std::size_t depth) {
  return {width, height, depth};
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t nbytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* destination, std::size_t destination_pitch, const void* source,
                              std::size_t source_pitch, std::size_t width, std::size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream);
cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* copy, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t nbytes, cudaStream_t stream);

namespace kvbm {
namespace simulated {
// What the driver's library gives for a name; NULL for one that it lacks.
void* find_symbol(const char* name);
}  // namespace simulated
}  // namespace kvbm

#endif
