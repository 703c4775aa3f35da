// Devices, memory, streams, events and errors of the C interface: each function is one CUDA call with its device made
// current, its failure told in full, and a forked child kept away.
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "batch_copy.h"
#include "device_calls.h"
#include "kernels.h"

namespace kvbm {
namespace {

std::atomic<pid_t> owner{0};  // the process that began to use a device

// Ranges that this process registered, by base. Never destroyed: threads may still copy while the process ends.
struct Registrations {
  std::mutex lock;
  std::map<uint64_t, uint64_t> ends;
};

Registrations& registrations() {
  static Registrations* const all = new Registrations;
  return *all;
}

// Whether somebody in this process uses a device; yes where the driver cannot say.
bool has_context(int device) {
  using GetState = int (*)(int, unsigned int*, int*);
  const auto get_state = reinterpret_cast<GetState>(find_driver_symbol("cuDevicePrimaryCtxGetState"));
  unsigned int flags = 0;
  int is_active = 1;
  return get_state == nullptr || get_state(device, &flags, &is_active) != 0 || is_active != 0;
}

// The first device that somebody uses, -1 where there is none: calls that need no certain device need a context.
int device_in_use() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  for (int device = 0; device < count; ++device) {
    if (has_context(device)) return device;
  }
  return -1;
}

void copy_text(char* to, std::size_t capacity, const char* from) { std::snprintf(to, capacity, "%s", from); }

int fill(cudaError_t code, const char* text, const char* call, int device, uint64_t nbytes, kvbm_cuda_error* error) {
  if (error != nullptr) {
    std::memset(error, 0, sizeof *error);
    error->code = static_cast<int>(code);
    error->device = device;
    error->nbytes = nbytes;
    copy_text(error->name, sizeof error->name, cudaGetErrorName(code));
    copy_text(error->text, sizeof error->text, text);
    copy_text(error->call, sizeof error->call, call);
  }
  return static_cast<int>(code);
}

}  // namespace

int tell(cudaError_t code, const char* call, int device, uint64_t nbytes, kvbm_cuda_error* error) {
  if (code == cudaSuccess) return 0;
  cudaGetLastError();
  return fill(code, cudaGetErrorString(code), call, device, nbytes, error);
}

int refuse(cudaError_t code, const char* text, const char* call, int device, uint64_t nbytes, kvbm_cuda_error* error) {
  return fill(code, text, call, device, nbytes, error);
}

int check_process(const char* call, int device, kvbm_cuda_error* error, bool is_use) {
  pid_t known = owner.load(std::memory_order_relaxed);
  const pid_t own = ::getpid();
  if (known == own) return 0;
  if (known == 0 && !is_use) return 0;
  if (known == 0 && owner.compare_exchange_strong(known, own)) return 0;
  if (known == own) return 0;
  return refuse(cudaErrorInitializationError,
                "this process was forked from one that uses CUDA, which does not survive it: start processes by spawn",
                call, device, 0, error);
}

CurrentDevice::CurrentDevice(int device) {
  int before = 0;
  code_ = cudaGetDevice(&before);
  if (code_ != cudaSuccess) return;
  if (before != device) {
    call_ = "cudaSetDevice";
    code_ = cudaSetDevice(device);
    if (code_ != cudaSuccess) return;
    before_ = before;
  }
  is_relaxed_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess;
  if (!is_relaxed_) cudaGetLastError();
}

CurrentDevice::~CurrentDevice() {
  cudaError_t code = is_relaxed_ ? cudaThreadExchangeStreamCaptureMode(&mode_) : cudaSuccess;
  if (code != cudaSuccess) cudaGetLastError();
  code = before_ >= 0 && has_context(before_) ? cudaSetDevice(before_) : cudaSuccess;
  if (code != cudaSuccess) cudaGetLastError();
}

uint64_t nbytes_to_edge(uint64_t address, uint64_t nbytes) {
  Registrations& all = registrations();
  const std::lock_guard<std::mutex> lock(all.lock);
  const auto after = all.ends.upper_bound(address);
  uint64_t edge = address + nbytes;
  if (after != all.ends.end() && after->first < edge) edge = after->first;
  if (after != all.ends.begin()) {
    const uint64_t end = std::prev(after)->second;
    if (end > address && end < edge) edge = end;
  }
  return edge - address;
}

void note_registration(uint64_t address, uint64_t nbytes) {
  const std::lock_guard<std::mutex> lock(registrations().lock);
  registrations().ends[address] = address + nbytes;
}

void forget_registration(uint64_t address) {
  const std::lock_guard<std::mutex> lock(registrations().lock);
  registrations().ends.erase(address);
}

}  // namespace kvbm

using namespace kvbm;

int kvbm_cuda_device_count(int* count, kvbm_cuda_error* error) {
  *count = 0;
  const bool is_first = owner.load() == 0;
  if (const int code = check_process("cudaGetDeviceCount", -1, error)) return code;
  const int code = tell(cudaGetDeviceCount(count), "cudaGetDeviceCount", -1, 0, error);
  if (is_first && *count == 0) owner = 0;  // nothing began here: children may ask for themselves
  return code;
}

int kvbm_cuda_versions(int* driver, int* runtime, kvbm_cuda_error* error) {
  *driver = *runtime = 0;
  if (const int code = check_process("cudaDriverGetVersion", -1, error, false)) return code;
  if (const int code = tell(cudaDriverGetVersion(driver), "cudaDriverGetVersion", -1, 0, error)) return code;
  return tell(cudaRuntimeGetVersion(runtime), "cudaRuntimeGetVersion", -1, 0, error);
}

int kvbm_cuda_get_properties(int device, kvbm_cuda_properties* properties, kvbm_cuda_error* error) {
  std::memset(properties, 0, sizeof *properties);
  if (const int code = check_process("cudaGetDeviceProperties", device, error)) return code;
  cudaDeviceProp found{};
  if (const int code = tell(cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties", device, 0, error)) {
    return code;
  }
  copy_text(properties->name, sizeof properties->name, found.name);
  properties->total_nbytes = found.totalGlobalMem;
  properties->l2_nbytes = static_cast<uint64_t>(found.l2CacheSize);
  properties->major = found.major;
  properties->minor = found.minor;
  const auto ask = [&](cudaDeviceAttr attribute, int* value) {
    return tell(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute", device, 0, error);
  };
  if (const int code = ask(cudaDevAttrMultiProcessorCount, &properties->num_multiprocessors)) return code;
  if (const int code = ask(cudaDevAttrAsyncEngineCount, &properties->num_copy_engines)) return code;
  int can_map = 0, is_same_address = 0;
  if (const int code = ask(cudaDevAttrCanMapHostMemory, &can_map)) return code;
  if (const int code = ask(cudaDevAttrCanUseHostPointerForRegisteredMem, &is_same_address)) return code;
  properties->can_map_host = can_map != 0 && is_same_address != 0;
  char* const bus = properties->pci_bus_id;
  const cudaError_t bus_code = cudaDeviceGetPCIBusId(bus, static_cast<int>(sizeof properties->pci_bus_id), device);
  if (const int code = tell(bus_code, "cudaDeviceGetPCIBusId", device, 0, error)) return code;
  for (char* at = bus; *at != '\0'; ++at) *at = static_cast<char>(std::tolower(static_cast<unsigned char>(*at)));
  return on_device(device, "cudaDeviceGetStreamPriorityRange", 0, error, [&] {
    return cudaDeviceGetStreamPriorityRange(&properties->priority_least, &properties->priority_greatest);
  });
}

int kvbm_cuda_has_kernels(int device, int* has, kvbm_cuda_error* error) {
  *has = 0;
  return on_device(device, "cudaFuncGetAttributes", 0, error, [&] {
    cudaError_t code = cudaSuccess;
    for (const auto load : {load_copy_kernels, load_checksum_kernels, load_permute_kernels, load_fill_kernels}) {
      if (code == cudaSuccess) code = load();
    }
    *has = code == cudaSuccess;
    if (code != cudaErrorNoKernelImageForDevice && code != cudaErrorInvalidDeviceFunction) return code;
    cudaGetLastError();
    return cudaSuccess;
  });
}

int kvbm_cuda_has_batch_copy(int* has) {
  *has = check_process("cuMemcpyBatchAsync", -1, nullptr, false) == 0 && has_batch_copy();
  return 0;
}

int kvbm_cuda_allocate(int device, uint64_t nbytes, uint64_t* address, kvbm_cuda_error* error) {
  *address = 0;
  return on_device(device, "cudaMalloc", nbytes, error, [&] {
    void* at = nullptr;
    const cudaError_t code = cudaMalloc(&at, nbytes);
    *address = reinterpret_cast<uint64_t>(at);
    return code;
  });
}

int kvbm_cuda_free(int device, uint64_t address, kvbm_cuda_error* error) {
  return on_device(device, "cudaFree", 0, error, [&] { return cudaFree(as_pointer(address)); });
}

int kvbm_cuda_memory_info(int device, uint64_t* free_nbytes, uint64_t* total_nbytes, kvbm_cuda_error* error) {
  *free_nbytes = *total_nbytes = 0;
  return on_device(device, "cudaMemGetInfo", 0, error, [&] {
    std::size_t left = 0, all = 0;
    const cudaError_t code = cudaMemGetInfo(&left, &all);
    *free_nbytes = left;
    *total_nbytes = all;
    return code;
  });
}

int kvbm_cuda_register_host(int device, uint64_t address, uint64_t nbytes, kvbm_cuda_error* error) {
  const unsigned int flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
  return on_device(device, "cudaHostRegister", nbytes, error, [&] {
    const cudaError_t code = cudaHostRegister(as_pointer(address), nbytes, flags);
    if (code == cudaSuccess) note_registration(address, nbytes);
    return code;
  });
}

int kvbm_cuda_unregister_host(int device, uint64_t address, kvbm_cuda_error* error) {
  return on_device(device, "cudaHostUnregister", 0, error, [&] {
    const cudaError_t code = cudaHostUnregister(as_pointer(address));
    if (code == cudaSuccess) forget_registration(address);
    return code;
  });
}

int kvbm_cuda_pointer_kind(uint64_t address, int* kind, int* device, kvbm_cuda_error* error) {
  *kind = KVBM_CUDA_PAGEABLE;
  *device = -1;
  if (const int code = check_process("cudaPointerGetAttributes", -1, error)) return code;
  cudaPointerAttributes attributes{};
  cudaError_t code = cudaSuccess;
  if (const int used = device_in_use(); used >= 0) {
    const CurrentDevice current(used);  // else the thread's own would get a context
    if (current.code() != cudaSuccess) return tell(current.code(), current.call(), used, 0, error);
    code = cudaPointerGetAttributes(&attributes, as_pointer(address));
  } else {
    code = cudaPointerGetAttributes(&attributes, as_pointer(address));
  }
  if (const int failed = tell(code, "cudaPointerGetAttributes", -1, 0, error)) return failed;
  *kind = static_cast<int>(attributes.type);
  *device = attributes.type == cudaMemoryTypeUnregistered ? -1 : attributes.device;
  return 0;
}

int kvbm_cuda_stream_create(int device, int priority, uint64_t* stream, kvbm_cuda_error* error) {
  *stream = 0;
  return on_device(device, "cudaStreamCreateWithPriority", 0, error, [&] {
    cudaStream_t made = nullptr;
    const cudaError_t code = cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, priority);
    *stream = reinterpret_cast<uint64_t>(made);
    return code;
  });
}

int kvbm_cuda_stream_destroy(int device, uint64_t stream, kvbm_cuda_error* error) {
  return on_device(device, "cudaStreamDestroy", 0, error, [&] { return cudaStreamDestroy(as_stream(stream)); });
}

int kvbm_cuda_stream_synchronize(int device, uint64_t stream, kvbm_cuda_error* error) {
  return on_device(device, "cudaStreamSynchronize", 0, error, [&] { return cudaStreamSynchronize(as_stream(stream)); });
}

int kvbm_cuda_stream_is_idle(int device, uint64_t stream, int* is_idle, kvbm_cuda_error* error) {
  *is_idle = 0;
  return on_device(device, "cudaStreamQuery", 0, error, [&] {
    const cudaError_t code = cudaStreamQuery(as_stream(stream));
    *is_idle = code == cudaSuccess;
    if (code != cudaErrorNotReady) return code;
    cudaGetLastError();
    return cudaSuccess;
  });
}

int kvbm_cuda_stream_wait(int device, uint64_t stream, uint64_t event, kvbm_cuda_error* error) {
  return on_device(device, "cudaStreamWaitEvent", 0, error,
                   [&] { return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0); });
}

int kvbm_cuda_event_create(int device, int with_timing, uint64_t* event, kvbm_cuda_error* error) {
  *event = 0;
  const unsigned int flags = cudaEventBlockingSync | (with_timing != 0 ? 0U : unsigned{cudaEventDisableTiming});
  return on_device(device, "cudaEventCreateWithFlags", 0, error, [&] {
    cudaEvent_t made = nullptr;
    const cudaError_t code = cudaEventCreateWithFlags(&made, flags);
    *event = reinterpret_cast<uint64_t>(made);
    return code;
  });
}

int kvbm_cuda_event_destroy(int device, uint64_t event, kvbm_cuda_error* error) {
  return on_device(device, "cudaEventDestroy", 0, error, [&] { return cudaEventDestroy(as_event(event)); });
}

int kvbm_cuda_event_record(int device, uint64_t event, uint64_t stream, kvbm_cuda_error* error) {
  constexpr const char* kCall = "cudaEventRecord";
  if (const int code = check_process(kCall, device, error)) return code;
  const CurrentDevice current(device);
  if (current.code() != cudaSuccess) return tell(current.code(), current.call(), device, 0, error);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t asked = cudaStreamIsCapturing(as_stream(stream), &status);
  if (const int code = tell(asked, "cudaStreamIsCapturing", device, 0, error)) return code;
  if (status != cudaStreamCaptureStatusNone) {
    return refuse(cudaErrorStreamCaptureUnsupported,
                  "the stream captures a graph, and copies that wait for it would be a part of that: attach another one",
                  kCall, device, 0, error);
  }
  return tell(cudaEventRecord(as_event(event), as_stream(stream)), kCall, device, 0, error);
}

int kvbm_cuda_event_is_done(int device, uint64_t event, int* is_done, kvbm_cuda_error* error) {
  *is_done = 0;
  return on_device(device, "cudaEventQuery", 0, error, [&] {
    const cudaError_t code = cudaEventQuery(as_event(event));
    *is_done = code == cudaSuccess;
    if (code != cudaErrorNotReady) return code;
    cudaGetLastError();
    return cudaSuccess;
  });
}

int kvbm_cuda_event_synchronize(int device, uint64_t event, kvbm_cuda_error* error) {
  return on_device(device, "cudaEventSynchronize", 0, error, [&] { return cudaEventSynchronize(as_event(event)); });
}

int kvbm_cuda_event_elapsed(int device, uint64_t begin, uint64_t end, float* milliseconds, kvbm_cuda_error* error) {
  *milliseconds = 0;
  return on_device(device, "cudaEventElapsedTime", 0, error,
                   [&] { return cudaEventElapsedTime(milliseconds, as_event(begin), as_event(end)); });
}
