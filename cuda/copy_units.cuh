// Copy of units between the addresses of two sides: what a plan and a permute of long heads have in common.
#ifndef KVBM_COPY_UNITS_CUH
#define KVBM_COPY_UNITS_CUH

#include "index.cuh"

namespace kvbm {

// Addresses of blocks, and what each region adds to them; device memory.
struct Tables {
  const uint64_t* source_blocks;
  const uint64_t* destination_blocks;
  const uint64_t* source_regions;
  const uint64_t* destination_regions;
};

// Nothing is launched where there are no units.
cudaError_t launch_copy_units(const Units& units, const Tables& tables, int num_thread_blocks, cudaStream_t stream);

}  // namespace kvbm

#endif
