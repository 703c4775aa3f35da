// Checksums of blocks, alone or while they are copied; one warp takes a chunk of 4 KiB (xxh3.cuh).
//
// A chunk is eight rows of 32 vectors. A thread loads its eight vectors before it uses the first, so as many bytes are
// in flight as in a plain copy, and a copy with its checksum reads the source once. A chunk costs a warp about 700
// instructions; at four a cycle one multiprocessor sums 40 GB/s, so four keep up with a link of 55 GB/s. A pass of its
// own over device memory wants more of them than that.
//
// Vectors that are not aligned, or lie across the seam of two pieces, are put together from narrower words.
#include "kernels.h"
#include "vectors.cuh"
#include "xxh3.cuh"

namespace kvbm {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kWarps = kThreads / kWarpLanes;
constexpr uint32_t kFinishThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffU;

KVBM_CONSTANT const uint64_t kSecretWords[kNumSecretWords] = KVBM_XXH3_SECRET;

// The byte streams of a plan's blocks.
struct Streams {
  const uint64_t* source_blocks;
  const uint64_t* destination_blocks;  // not read where nothing is copied
  const uint64_t* source_pieces;
  const uint64_t* destination_pieces;
  uint64_t num_blocks;
  uint64_t num_pieces;
  uint64_t piece_nbytes;
  uint64_t block_nbytes;
  uint64_t chunks_per_block;
  uint64_t* sums;
};

// One chunk as a lane sees it.
struct Chunk {
  uint64_t source, destination;  // of the block
  uint64_t offset;               // of the lane's vector of row 0, in the block's stream
};

template <bool Copies>
KVBM_DEVICE uint64_t destination_at(const Streams& streams, const Chunk& chunk, const StreamPlace& place) {
  return Copies ? chunk.destination + load(streams.destination_pieces + place.piece) + place.within : 0;
}

// Take 16 bytes of the stream word by word, zeros after its end.
template <bool Copies>
KVBM_DEVICE Vector take_words(const Streams& streams, const Chunk& chunk, uint64_t offset) {
  Vector vector = {0, 0};
  StreamPlace place = stream_place(streams.piece_nbytes, offset);
  for (uint32_t at = 0; at < kVectorBytes && place.piece < streams.num_pieces;) {
    const uint64_t source = chunk.source + load(streams.source_pieces + place.piece) + place.within;
    const uint64_t destination = destination_at<Copies>(streams, chunk, place);
    const uint64_t most = lesser(streams.piece_nbytes - place.within, kVectorBytes - at);
    uint32_t width = width_of(source | destination | at);
    while (width > most) width /= 2;
    const Vector word = load_width(source, width);
    if (Copies) store_width(destination, width, word);
    put_word(vector, word, width, at);
    at += width;
    advance(place, streams.piece_nbytes, width);
  }
  return vector;
}

// Add up the addends of a block of stripes over the lanes that hold the same pair of accumulators.
KVBM_DEVICE void add_over_lanes(Pair& sums) {
  for (int bits = 4; bits < 32; bits *= 2) {
    sums.low += __shfl_xor_sync(kAllLanes, sums.low, bits);
    sums.high += __shfl_xor_sync(kAllLanes, sums.high, bits);
  }
}

KVBM_DEVICE void end_stripe_block(Pair& sums, Pair& addends, uint32_t stripe_block, const LaneKeys& keys) {
  add_over_lanes(addends);
  sums.low += addends.low;
  sums.high += addends.high;
  addends = {0, 0};
  if (stripe_block + 1 < kNumStripeBlocks) scramble(sums, keys);
}

// Load a chunk's vectors all at once, copy them and mix them in; give 0 where one of any lane needs narrower words.
template <bool Copies>
KVBM_DEVICE bool take_vectors(const Streams& streams, const Chunk& chunk, const LaneKeys& keys, Pair& sums) {
  Vector data[kChunkRows];
  uint64_t sources[kChunkRows], destinations[kChunkRows];
  StreamPlace place = stream_place(streams.piece_nbytes, chunk.offset);
  bool is_easy = true;
  KVBM_UNROLL
  for (uint32_t row = 0; row < kChunkRows; ++row) {
    sources[row] = 0;
    destinations[row] = 0;
    if (place.piece < streams.num_pieces) {
      sources[row] = chunk.source + load(streams.source_pieces + place.piece) + place.within;
      destinations[row] = destination_at<Copies>(streams, chunk, place);
      is_easy = is_easy && place.within + kVectorBytes <= streams.piece_nbytes &&
                ((sources[row] | destinations[row]) & (kVectorBytes - 1)) == 0;
    }
    advance(place, streams.piece_nbytes, kWarpLanes * kVectorBytes);
  }
  if (__ballot_sync(kAllLanes, is_easy) != kAllLanes) return false;
  KVBM_UNROLL
  for (uint32_t row = 0; row < kChunkRows; ++row) {
    data[row] = {0, 0};
    if (sources[row] != 0) data[row] = load_at<Vector>(sources[row]);
  }
  Pair addends = {0, 0};
  KVBM_UNROLL
  for (uint32_t row = 0; row < kChunkRows; ++row) {
    if (Copies && sources[row] != 0) store_at<Vector>(destinations[row], data[row]);
    add_vector(addends, {data[row].x, data[row].y}, row_key(keys, row));
    if (row % 2 == 1) end_stripe_block(sums, addends, row / 2, keys);
  }
  return true;
}

template <bool Copies>
KVBM_DEVICE void take_rows(const Streams& streams, const Chunk& chunk, const LaneKeys& keys, Pair& sums) {
  Pair addends = {0, 0};
  KVBM_ROLLED
  for (uint32_t row = 0; row < kChunkRows; ++row) {
    const Vector data = take_words<Copies>(streams, chunk, chunk.offset + row * kWarpLanes * kVectorBytes);
    add_vector(addends, {data.x, data.y}, row_key(keys, row));
    if (row % 2 == 1) end_stripe_block(sums, addends, row / 2, keys);
  }
}

template <bool Copies>
__global__ void __launch_bounds__(kThreads, 1) sum_chunks_kernel(const Streams streams) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const LaneKeys keys = lane_keys(kSecretWords, lane);
  const uint64_t num_chunks = streams.num_blocks * streams.chunks_per_block;
  const uint64_t num_warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes; i < num_chunks;
       i += num_warps) {
    const uint64_t block = i / streams.chunks_per_block;
    const uint64_t number = i - block * streams.chunks_per_block;
    Chunk chunk;
    chunk.source = load(streams.source_blocks + block);
    chunk.destination = Copies ? load(streams.destination_blocks + block) : 0;
    chunk.offset = number * kChunkBytes + lane * kVectorBytes;
    Pair sums = initial_pair(lane);
    if (!take_vectors<Copies>(streams, chunk, keys, sums)) take_rows<Copies>(streams, chunk, keys, sums);
    uint64_t sum = merged(sums, keys);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane == 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(streams.sums + block), chunk_term(chunk_digest(sum), number));
  }
}

// One thread a block: its sum of chunks becomes its checksum.
__global__ void __launch_bounds__(kFinishThreads)
    finish_checksums_kernel(const Checksums sums, uint64_t num_blocks, uint64_t block_nbytes) {
  const uint64_t block = static_cast<uint64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (block >= num_blocks) return;
  const uint64_t sum = load(sums.sums + block);
  const uint64_t low = load(sums.hashes + 2 * block), high = load(sums.hashes + 2 * block + 1);
  store(sums.checksums + block, block_checksum(sum, block_nbytes, low, high));
}

template <bool Copies>
cudaError_t launch_sums(const CopyRuns& runs, const Checksums& sums, int num_thread_blocks, cudaStream_t stream) {
  if (runs.num_blocks <= 0) return cudaSuccess;
  Streams streams;
  streams.source_blocks = runs.source_blocks;
  streams.destination_blocks = runs.destination_blocks;
  streams.source_pieces = runs.source_pieces;
  streams.destination_pieces = runs.destination_pieces;
  streams.num_blocks = static_cast<uint64_t>(runs.num_blocks);
  streams.num_pieces = static_cast<uint64_t>(runs.num_pieces);
  streams.piece_nbytes = static_cast<uint64_t>(runs.piece_nbytes);
  streams.block_nbytes = streams.num_pieces * streams.piece_nbytes;
  streams.chunks_per_block = ceil_div(streams.block_nbytes, kChunkBytes);
  streams.sums = sums.sums;
  const cudaError_t cleared = cudaMemsetAsync(sums.sums, 0, streams.num_blocks * sizeof(uint64_t), stream);
  if (cleared != cudaSuccess) {
    cudaGetLastError();
    return cleared;
  }
  if (streams.chunks_per_block > 0) {
    const uint32_t grid = grid_size(streams.num_blocks * streams.chunks_per_block, kWarps, num_thread_blocks);
    KVBM_LAUNCH(sum_chunks_kernel<Copies>, grid, kThreads, 0, stream, streams);
    const cudaError_t launched = cudaGetLastError();
    if (launched != cudaSuccess) return launched;
  }
  const uint32_t grid = static_cast<uint32_t>(ceil_div(streams.num_blocks, kFinishThreads));
  KVBM_LAUNCH(finish_checksums_kernel, grid, kFinishThreads, 0, stream, sums, streams.num_blocks,
              streams.block_nbytes);
  return cudaGetLastError();
}

}  // namespace

cudaError_t load_checksum_kernels() {
  return load_kernels(sum_chunks_kernel<true>, sum_chunks_kernel<false>, finish_checksums_kernel);
}

cudaError_t launch_copy_checksum(const CopyRuns& runs, const Checksums& sums, int num_thread_blocks,
                                 cudaStream_t stream) {
  return launch_sums<true>(runs, sums, num_thread_blocks, stream);
}

cudaError_t launch_checksum(const CopyRuns& runs, const Checksums& sums, int num_thread_blocks, cudaStream_t stream) {
  return launch_sums<false>(runs, sums, num_thread_blocks, stream);
}

}  // namespace kvbm
