// What is looked up in the driver by name, when it is first asked for. The batched copy, which the oldest CUDA that kvbm
// builds with does not know: CUDA 12.8 named it without a suffix and with one parameter more than CUDA 13.
#ifndef KVBM_BATCH_COPY_H
#define KVBM_BATCH_COPY_H

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kvbm {

// What the driver's library gives for a name; NULL for one that it lacks, and where there is no driver.
void* find_driver_symbol(const char* name);

bool has_batch_copy();
// One call for `count` runs; the arrays are read before it returns. cudaErrorNotSupported where the driver lacks it.
cudaError_t memcpy_batch(uint64_t* destinations, uint64_t* sources, std::size_t* sizes, std::size_t count,
                         cudaStream_t stream);

}  // namespace kvbm

#endif
