// Devices, errors and faults of the simulation.
#include <cstdio>
#include <cstring>
#include <utility>

#include "state.h"

namespace kvbm {
namespace simulated {
namespace {

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

struct ErrorText {
  cudaError_t code;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorCudartUnloading, "cudaErrorCudartUnloading", "driver shutting down"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotPermitted, "cudaErrorNotPermitted", "operation not permitted"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

// What a thread may not call while another captures, unless its own mode is relaxed. CUDA names them "potentially unsafe"
// and lists only some: here it is whatever takes or returns memory, or asks or waits for the device.
bool is_unsafe(const char* name) {
  for (const char* one : {"cudaMalloc", "cudaFree", "cudaHostRegister", "cudaHostUnregister", "cudaEventQuery",
                          "cudaEventSynchronize", "cudaStreamQuery", "cudaStreamSynchronize"}) {
    if (std::strcmp(one, name) == 0) return true;
  }
  return false;
}

const ErrorText& text_of(cudaError_t code) {
  static constexpr ErrorText unknown{cudaErrorUnknown, "unrecognized error code", "unrecognized error code"};
  for (const ErrorText& one : kErrors) {
    if (one.code == code) return one;
  }
  return unknown;
}

}  // namespace

State& state() {
  static State* const all = new State;
  return *all;
}

int current_device() { return device_of_thread; }

int capture_mode() { return static_cast<int>(mode_of_thread); }

int context_state(int device, unsigned int* flags, int* is_active) {
  Lock lock(state().lock);
  if (device < 0 || device >= state().num_devices) return cudaErrorInvalidDevice;
  *flags = 0;
  *is_active = state().devices[device].has_context ? 1 : 0;
  return cudaSuccess;
}

cudaError_t keep(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

cudaError_t injected(const char* name) {
  auto& faults = state().call_faults;
  const auto found = faults.find(name);
  if (found == faults.end()) return cudaSuccess;
  for (auto fault = found->second.begin(); fault != found->second.end(); ++fault) {
    if (fault->after > 0) {
      --fault->after;
      continue;
    }
    const cudaError_t code = static_cast<cudaError_t>(fault->code);
    found->second.erase(fault);
    return code;
  }
  return cudaSuccess;
}

cudaError_t enter(Lock&, const char* name) {
  State& all = state();
  if (const cudaError_t code = injected(name)) return keep(code);
  if (all.num_devices == 0) return keep(cudaErrorNoDevice);
  if (device_of_thread >= all.num_devices) return keep(cudaErrorInvalidDevice);
  all.devices[device_of_thread].has_context = true;
  if (all.is_capturing && mode_of_thread != cudaStreamCaptureModeRelaxed && is_unsafe(name)) {
    return keep(cudaErrorStreamCaptureUnsupported);
  }
  return keep(all.devices[device_of_thread].sticky);
}

}  // namespace simulated
}  // namespace kvbm

using namespace kvbm::simulated;

cudaError_t cudaGetDeviceCount(int* count) {
  Lock lock(state().lock);
  *count = 0;
  if (const cudaError_t code = injected("cudaGetDeviceCount")) return keep(code);
  if (state().num_devices == 0) return keep(cudaErrorNoDevice);
  *count = state().num_devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaGetDevice")) return keep(code);
  *device = device_of_thread;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaSetDevice")) return keep(code);
  if (state().num_devices == 0) return keep(cudaErrorNoDevice);
  if (device < 0 || device >= state().num_devices) return keep(cudaErrorInvalidDevice);
  device_of_thread = device;
  state().devices[device].has_context = true;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaStreamIsCapturing")) return code;
  const uint64_t handle = reinterpret_cast<uint64_t>(stream);
  const bool is_active = state().is_capturing && handle != 0 && handle == state().capturing_stream;
  *status = is_active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaThreadExchangeStreamCaptureMode")) return keep(code);
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaGetDeviceProperties")) return keep(code);
  if (device < 0 || device >= state().num_devices) return keep(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "Simulated GPU");
  properties->totalGlobalMem = state().total_nbytes;
  properties->l2CacheSize = 50 << 20;
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->asyncEngineCount = 3;
  properties->pciDomainID = 0xfffe;  // no machine has it: nobody finds a real device's NUMA node under it
  properties->pciBusID = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaDeviceGetAttribute")) return keep(code);
  if (device < 0 || device >= state().num_devices) return keep(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
    case cudaDevAttrAsyncEngineCount: *value = 3; return cudaSuccess;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrCanUseHostPointerForRegisteredMem: *value = 1; return cudaSuccess;
  }
  return keep(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int capacity, int device) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaDeviceGetPCIBusId")) return keep(code);
  if (device < 0 || device >= state().num_devices) return keep(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<std::size_t>(capacity), "FFFE:%02X:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaDeviceGetStreamPriorityRange")) return code;
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaDriverGetVersion")) return keep(code);
  *version = state().num_devices == 0 ? 0 : 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  Lock lock(state().lock);
  if (const cudaError_t code = injected("cudaRuntimeGetVersion")) return keep(code);
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t code) { return text_of(code).name; }

const char* cudaGetErrorString(cudaError_t code) { return text_of(code).text; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* entry) {
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaFuncGetAttributes")) return code;
  if (entry == nullptr) return keep(cudaErrorInvalidDeviceFunction);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute attribute, int value) {
  constexpr int kMostShared = 227 << 10;  // of a block, compute capability 9.0
  Lock lock(state().lock);
  if (const cudaError_t code = enter(lock, "cudaFuncSetAttribute")) return code;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kMostShared) {
    return keep(cudaErrorInvalidValue);
  }
  state().shared_nbytes[entry] = value;
  return cudaSuccess;
}
