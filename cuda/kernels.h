// Launch functions of the kernels: device pointers and sizes in, the error of the launch out. They queue on the stream,
// never wait, and leave no error behind in cudaGetLastError. All arrays they name lie in device memory (the copy engine
// puts them there in the same stream); addresses inside the arrays may be device or registered host memory. Nothing is
// launched for 0 blocks, 0 pieces or 0 bytes. `num_thread_blocks` is the most that a grid may have.
#ifndef KVBM_KERNELS_H
#define KVBM_KERNELS_H

#include <cuda_runtime.h>
#include <stdint.h>

namespace kvbm {

// Load each file's kernels now: CUDA would do so at their first launch, and may wait for all that runs on the device
// then. cudaErrorNoKernelImageForDevice where the binary has no code for the current one.
cudaError_t load_copy_kernels();
cudaError_t load_checksum_kernels();
cudaError_t load_permute_kernels();
cudaError_t load_fill_kernels();

// Piece j of block i goes from source_blocks[i] + source_pieces[j] to destination_blocks[i] + destination_pieces[j];
// all pieces are piece_nbytes long and stand in the source's logical order. Any alignment.
struct CopyRuns {
  const uint64_t* source_blocks;
  const uint64_t* destination_blocks;  // not read by launch_checksum
  const uint64_t* source_pieces;
  const uint64_t* destination_pieces;  // not read by launch_checksum
  int64_t num_blocks;
  int64_t num_pieces;
  int64_t piece_nbytes;
  bool source_is_host;  // pinned memory, read over the link: more bytes in flight are needed
  bool destination_is_host;
};

// Checksums of blocks, equal to the CPU twins'. `sums` is (num_blocks,) of scratch that the launch clears itself.
struct Checksums {
  const uint64_t* hashes;  // (num_blocks, 2)
  uint64_t* sums;          // (num_blocks,)
  uint64_t* checksums;     // (num_blocks,), device memory too
};

// Elements (num_tokens, num_heads) of head_nbytes contiguous bytes, at any strides on each side.
struct PermuteRegions {
  const uint64_t* source_blocks;  // (num_blocks,)
  const uint64_t* destination_blocks;
  const uint64_t* source_regions;  // (num_regions,), added to a block's address
  const uint64_t* destination_regions;
  int64_t num_blocks, num_regions;
  int64_t num_tokens, num_heads, head_nbytes;
  int64_t source_token, source_head;  // strides, bytes
  int64_t destination_token, destination_head;
};

cudaError_t launch_copy_runs(const CopyRuns& runs, int num_thread_blocks, cudaStream_t stream);
// The copy, and the checksums of what was copied, in one pass.
cudaError_t launch_copy_checksum(const CopyRuns& runs, const Checksums& sums, int num_thread_blocks,
                                 cudaStream_t stream);
cudaError_t launch_checksum(const CopyRuns& runs, const Checksums& sums, int num_thread_blocks, cudaStream_t stream);
cudaError_t launch_permute(const PermuteRegions& regions, int num_thread_blocks, cudaStream_t stream);
// Byte i becomes byte i % 8 (little-endian) of splitmix64's output number i / 8:
// x = seed + (i / 8 + 1) * 0x9E3779B97F4A7C15, x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9, x = (x ^ x >> 27) * 0x94D049BB133111EB, x ^ x >> 31.
cudaError_t launch_fill(uint64_t address, uint64_t nbytes, uint64_t seed, cudaStream_t stream);
// One thread that spins; in the simulation KVBM_SIMULATED_DELAY(nanoseconds, stream) stands for the kernel.
cudaError_t launch_delay(uint64_t nanoseconds, cudaStream_t stream);

}  // namespace kvbm

#endif
