// How the C interface calls CUDA: in this process only, with the device current, every failure told in full.
#ifndef KVBM_DEVICE_CALLS_H
#define KVBM_DEVICE_CALLS_H

#include <cuda_runtime.h>
#include <stdint.h>

#include "kvbm_cuda.h"

namespace kvbm {

// Fill `error` and clear CUDA's own last error, which would otherwise be taken for that of a later launch.
int tell(cudaError_t code, const char* call, int device, uint64_t nbytes, kvbm_cuda_error* error);
// The same for mistakes that no CUDA call has seen.
int refuse(cudaError_t code, const char* text, const char* call, int device, uint64_t nbytes, kvbm_cuda_error* error);
// CUDA does not survive a fork: a child may not use what its parent began. Non-zero after telling so. With `is_use`
// this process is from now on the one that began.
int check_process(const char* call, int device, kvbm_cuda_error* error, bool is_use = true);

// Makes a device current for one scope, and the thread one whose calls spoil nobody's capture of a graph: while an engine
// captures, in CUDA's default mode, a cudaMalloc or cudaHostRegister of any other thread would fail and end the capture.
// A device that nobody uses is not made current again: that would give it a context, some 500 MiB of its memory for
// each worker of a machine. Such a thread stays on the device it worked on.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t code() const { return code_; }
  const char* call() const { return call_; }

 private:
  int before_ = -1;  // to go back to; -1: nothing was changed
  bool is_relaxed_ = false;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // to go back to, once exchanged
  cudaError_t code_ = cudaSuccess;
  const char* call_ = "cudaGetDevice";
};

// Run `body`, which gives a CUDA error, with the device current.
template <class Body>
int on_device(int device, const char* call, uint64_t nbytes, kvbm_cuda_error* error, Body&& body) {
  if (const int code = check_process(call, device, error)) return code;
  const CurrentDevice current(device);
  if (current.code() != cudaSuccess) return tell(current.code(), current.call(), device, 0, error);
  return tell(body(), call, device, nbytes, error);
}

inline cudaStream_t as_stream(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
inline cudaEvent_t as_event(uint64_t handle) { return reinterpret_cast<cudaEvent_t>(handle); }
inline void* as_pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// The number of bytes from `address` on that no registration's edge divides: one copy must not cross from one
// registered range into the next. All that is left of `nbytes` where nothing was registered.
uint64_t nbytes_to_edge(uint64_t address, uint64_t nbytes);
void note_registration(uint64_t address, uint64_t nbytes);
void forget_registration(uint64_t address);

}  // namespace kvbm

#endif
