// Copies and checksums of whole block batches, without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvbm {

// One batch. Block i, piece j lies at blocks[i] + pieces[j]; its bytes in logical order are its pieces in order.
struct CopyJob {
  const std::uint64_t* sources;
  const std::uint64_t* destinations;        // null: checksums only
  const std::uint64_t* source_pieces;
  const std::uint64_t* destination_pieces;  // null: checksums only
  const std::uint64_t* hashes;              // (num_blocks, 2); null: no checksums
  std::uint64_t* checksums;                 // (num_blocks,), zeroed by the caller; null: no checksums
  std::size_t num_blocks;
  std::size_t num_pieces;
  std::size_t piece_nbytes;
};

// Do the job with up to `num_threads` threads; a job under 256 KiB stays in the calling one.
void run_copy_job(const CopyJob& job, int num_threads);

// The same copy as a plain loop of memcpy in the calling thread: what benchmarks compare with.
void run_memcpy_job(const CopyJob& job);

}  // namespace kvbm
