// Copy of units (pieces of a plan, or heads of a permute that are long enough) straight from side to side.
//
//     warp w of W        tiles w, w + W, w + 2W, ...     a persistent grid: its size is what others lose
//     group of lanes     kSteps rows of a tile           one 16-byte vector a lane and row
//
// A thread loads its vectors of all rows before it stores the first. That hides latency: what must be in flight is
// bandwidth times latency. Over the link that is about 55 GB/s x 2 us = 110 KB: 2 thread blocks of 512 threads with 8
// vectors have 128 KB. Inside the device it is about 4.8 TB/s x 0.8 us = 3.8 MB: one thread block on each of 132
// multiprocessors has 8.6 MB, and 100 registers a thread leave no room for a second.
//
// Rows that are not aligned to 16 bytes on both sides, and the last bytes of units that are no multiple of 16, come
// after the vectors, in the widest words that both addresses allow.
#include "copy_units.cuh"
#include "kernels.h"
#include "vectors.cuh"

namespace kvbm {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kWarps = kThreads / kWarpLanes;
constexpr uint32_t kSteps = 8;

// Where a row lies on both sides.
struct Row {
  uint64_t source, destination;
  uint64_t nbytes;
};

KVBM_DEVICE Row row_at(const Units& units, const Rows& rows, const Tables& tables, const Place& place) {
  const uint64_t within = place.row * rows.nbytes;
  Row row;
  row.source = load(tables.source_blocks + place.block) + load(tables.source_regions + place.region) +
               source_offset(units, place) + within;
  row.destination = load(tables.destination_blocks + place.block) + load(tables.destination_regions + place.region) +
                    destination_offset(units, place) + within;
  row.nbytes = row_nbytes(units, rows, place.row);
  return row;
}

KVBM_DEVICE bool is_aligned(const Row& row) { return ((row.source | row.destination) & (kVectorBytes - 1)) == 0; }

// Copy what the vectors left of the rows in `left`, one bit for each step.
KVBM_DEVICE void copy_left(const Units& units, const Rows& rows, const Tables& tables, Place place, uint32_t lane,
                           uint32_t left) {
  for (; left != 0; left >>= 1, advance(units, rows, place, rows.groups)) {
    if ((left & 1) == 0) continue;
    const Row row = row_at(units, rows, tables, place);
    const uint64_t done = is_aligned(row) ? row.nbytes & ~(kVectorBytes - 1) : 0;
    copy_run(row.source + done, row.destination + done, row.nbytes - done, lane, rows.lanes);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    copy_units_kernel(const Units units, const Rows rows, const Tables tables) {
  const uint32_t lane = threadIdx.x % rows.lanes;
  const uint32_t group = threadIdx.x % kWarpLanes / rows.lanes;
  const uint64_t num_warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  for (uint64_t tile = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes; tile < rows.num_tiles;
       tile += num_warps) {
    const Place start = first_place(units, rows, tile, group);
    Place place = start;
    Vector data[kSteps];
    uint64_t destinations[kSteps];
    uint32_t loaded = 0, left = 0;
    KVBM_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) {
      if (place.block < units.num_blocks) {
        const Row row = row_at(units, rows, tables, place);
        if (!is_aligned(row)) {
          left |= 1U << step;
        } else {
          if ((lane + 1) * kVectorBytes <= row.nbytes) {
            data[step] = load_at<Vector>(row.source + lane * kVectorBytes);
            destinations[step] = row.destination + lane * kVectorBytes;
            loaded |= 1U << step;
          }
          if (row.nbytes % kVectorBytes != 0) left |= 1U << step;
        }
      }
      advance(units, rows, place, rows.groups);
    }
    KVBM_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step)
      if (loaded >> step & 1) store_at<Vector>(destinations[step], data[step]);
    copy_left(units, rows, tables, start, lane, left);
  }
}

}  // namespace

cudaError_t load_copy_kernels() { return load_kernels(copy_units_kernel); }

cudaError_t launch_copy_units(const Units& units, const Tables& tables, int num_thread_blocks, cudaStream_t stream) {
  const Rows rows = rows_of(units, kSteps);
  if (rows.total == 0) return cudaSuccess;
  const uint32_t grid = grid_size(rows.num_tiles, kWarps, num_thread_blocks);
  KVBM_LAUNCH(copy_units_kernel, grid, kThreads, 0, stream, units, rows, tables);
  return cudaGetLastError();
}

cudaError_t launch_copy_runs(const CopyRuns& runs, int num_thread_blocks, cudaStream_t stream) {
  if (runs.num_blocks <= 0 || runs.num_pieces <= 0 || runs.piece_nbytes <= 0) return cudaSuccess;
  const Axis one = {1, 0, 0};
  const Units units = {static_cast<uint64_t>(runs.num_blocks), static_cast<uint64_t>(runs.num_pieces), one, one,
                       static_cast<uint64_t>(runs.piece_nbytes)};
  const Tables tables = {runs.source_blocks, runs.destination_blocks, runs.source_pieces, runs.destination_pieces};
  return launch_copy_units(units, tables, num_thread_blocks, stream);
}

}  // namespace kvbm
