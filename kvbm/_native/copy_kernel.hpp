// What a copy kernel is: one 4 KiB page copied with streaming stores, and XXH3-64 of a 4 KiB chunk.
//
// Included by sources that are compiled for different instruction sets, so nothing here may have external linkage
// and a body: a linker could keep the AVX-512 body of an inline function for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvbm {

constexpr std::size_t kChunkBytes = 4096;  // bytes under one XXH3 value, and one page of a copy
constexpr std::size_t kLineBytes = 64;     // destination alignment that the streaming copies need

struct CopyKernel {
  const char* name;
  // Copy one page with streaming stores; the destination is aligned to kLineBytes, the source need not be.
  void (*copy_page)(const std::uint8_t* source, std::uint8_t* destination);
  // The same, giving XXH3-64 (seed 0, default secret) of the page.
  std::uint64_t (*copy_hash_page)(const std::uint8_t* source, std::uint8_t* destination);
  // XXH3-64 of one chunk, any alignment.
  std::uint64_t (*hash_page)(const std::uint8_t* source);
  // Make streaming stores visible before whatever the thread stores next.
  void (*fence)();
};

extern const CopyKernel kBaselineKernel;
#if defined(__x86_64__)
extern const CopyKernel kAvx2Kernel;
extern const CopyKernel kAvx512Kernel;
#endif

// The kernel for this processor, or the lesser one that KVBM_CPU names; fixed at the first call.
const CopyKernel& copy_kernel();
// Names of the instruction sets found, space separated; the last one is what the kernel uses.
const char* cpu_feature_names();

}  // namespace kvbm
