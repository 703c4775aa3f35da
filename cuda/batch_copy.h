// The batched copy of the driver, which the oldest CUDA that kvbm builds with does not know: it is looked up by name
// when it is first asked for. CUDA 12.8 named it without a suffix and with one parameter more than CUDA 13.
#ifndef KVBM_BATCH_COPY_H
#define KVBM_BATCH_COPY_H

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kvbm {

bool has_batch_copy();
// One call for `count` runs; the arrays are read before it returns. cudaErrorNotSupported where the driver lacks it.
cudaError_t memcpy_batch(uint64_t* destinations, uint64_t* sources, std::size_t* sizes, std::size_t count,
                         cudaStream_t stream);

}  // namespace kvbm

#endif
