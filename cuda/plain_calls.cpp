// Fills, delays and plain copies: one launch or call each.
#include "device_calls.h"
#include "kernels.h"

using namespace kvbm;

int kvbm_cuda_fill(int device, uint64_t address, uint64_t nbytes, uint64_t seed, uint64_t stream,
                   kvbm_cuda_error* error) {
  return on_device(device, "launch of the fill kernel", nbytes, error,
                   [&] { return launch_fill(address, nbytes, seed, as_stream(stream)); });
}

int kvbm_cuda_delay(int device, uint64_t nanoseconds, uint64_t stream, kvbm_cuda_error* error) {
  return on_device(device, "launch of the delay kernel", 0, error,
                   [&] { return launch_delay(nanoseconds, as_stream(stream)); });
}

int kvbm_cuda_memcpy(int device, uint64_t destination, uint64_t source, uint64_t nbytes, uint64_t stream,
                     kvbm_cuda_error* error) {
  return on_device(device, "cudaMemcpyAsync", nbytes, error, [&] {
    return cudaMemcpyAsync(as_pointer(destination), as_pointer(source), nbytes, cudaMemcpyDefault, as_stream(stream));
  });
}
