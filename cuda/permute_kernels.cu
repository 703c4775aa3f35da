// Permutes of tokens and heads. Heads of 64 bytes or more are copied straight: each is whole sectors on both sides
// whatever its neighbours are. Shorter ones, where the order of the two axes differs, go through shared memory:
//
//     source               shared memory, one tile a warp          destination
//     line of inner units  |u u u u u|pad|   num_outer rows        line of outer units
//     read along lines     |u u u u u|pad|   of `pitch` bytes      written along lines, gathered from columns
//
// A warp reads a tile in 16-byte vectors along the source's lines where those are dense and aligned, else in the widest
// words that fit, all before it stores the first: 4 KiB a warp, as in a plain copy. The pitch is an odd multiple of the
// widest access, so that a column meets each bank once. Then every lane puts a word of the destination together. A tile
// belongs to one warp, so nothing waits for a whole thread block.
#include "copy_units.cuh"
#include "kernels.h"
#include "vectors.cuh"

namespace kvbm {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarpLanes;
constexpr uint32_t kSteps = kTileDataBytes / (kWarpLanes * static_cast<uint32_t>(kVectorBytes));

KVBM_DEVICE Vector load_shared(const uint8_t* at, uint32_t width) {
  switch (width) {
    case 16: return load(reinterpret_cast<const Vector*>(at));
    case 8: return {load(reinterpret_cast<const unsigned long long*>(at)), 0};
    case 4: return {load(reinterpret_cast<const uint32_t*>(at)), 0};
    case 2: return {load(reinterpret_cast<const uint16_t*>(at)), 0};
    default: return {load(at), 0};
  }
}

KVBM_DEVICE void store_shared(uint8_t* at, uint32_t width, const Vector& value) {
  switch (width) {
    case 16: store(reinterpret_cast<Vector*>(at), value); break;
    case 8: store(reinterpret_cast<unsigned long long*>(at), value.x); break;
    case 4: store(reinterpret_cast<uint32_t*>(at), static_cast<uint32_t>(value.x)); break;
    case 2: store(reinterpret_cast<uint16_t*>(at), static_cast<uint16_t>(value.x)); break;
    default: store(at, static_cast<uint8_t>(value.x));
  }
}

// The word of `width` bytes that stands at byte `at` of a vector.
KVBM_DEVICE Vector part_of(const Vector& vector, uint32_t width, uint32_t at) {
  if (width == kVectorBytes) return vector;
  return {(at < 8 ? vector.x : vector.y) >> (8 * (at % 8)), 0};
}

// Read a tile into shared memory; rows there are lines of the source.
KVBM_DEVICE void read_tile(uint64_t source, const Lines& lines, uint8_t* shared, uint32_t pitch, uint32_t lane) {
  const uint32_t total = num_words(lines);
  const uint32_t width = lines.width;
  const uint32_t part = static_cast<uint32_t>(lesser(width, width_of(pitch)));
  for (uint32_t first = lane; first < total; first += kSteps * kWarpLanes) {
    Vector data[kSteps];
    KVBM_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) {
      const uint32_t i = first + step * kWarpLanes;
      if (i < total) data[step] = load_width(source + word_of(lines, i).offset, width);
    }
    KVBM_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) {
      const uint32_t i = first + step * kWarpLanes;
      if (i >= total) continue;
      const Word word = word_of(lines, i);
      uint8_t* const to = shared + word.line * pitch + word.at;
      for (uint32_t at = 0; at < width; at += part) store_shared(to + at, part, part_of(data[step], part, at));
    }
  }
}

// Write a tile; a line of the destination is a column of units in shared memory.
KVBM_DEVICE void write_tile(uint64_t destination, const Lines& lines, const uint8_t* shared, uint32_t pitch,
                            uint32_t unit_nbytes, uint32_t lane) {
  const uint32_t total = num_words(lines);
  const uint32_t part = static_cast<uint32_t>(lesser(lines.width, width_of(unit_nbytes)));
  for (uint32_t i = lane; i < total; i += kWarpLanes) {
    const Word word = word_of(lines, i);
    uint32_t unit = word.at / unit_nbytes;
    uint32_t within = word.at - unit * unit_nbytes;
    Vector value = {0, 0};
    for (uint32_t at = 0; at < lines.width; at += part) {
      put_word(value, load_shared(shared + unit * pitch + word.line * unit_nbytes + within, part), part, at);
      within += part;
      if (within == unit_nbytes) {
        within = 0;
        ++unit;
      }
    }
    store_width(destination + word.offset, lines.width, value);
  }
}

__global__ void __launch_bounds__(kThreads) permute_tiles_kernel(const Units units, const Tiles tiles,
                                                                 const Tables tables) {
  KVBM_SHARED(uint8_t, all_tiles);
  const uint32_t lane = threadIdx.x % kWarpLanes;
  uint8_t* const shared = all_tiles + threadIdx.x / kWarpLanes * kTileBytes;
  const uint64_t num_warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes; i < tiles.num_tiles;
       i += num_warps) {
    const Tile tile = tile_at(units, tiles, i);
    const uint64_t source = load(tables.source_blocks + tile.block) + load(tables.source_regions + tile.region) +
                            tile_source(tiles, tile);
    const uint64_t destination = load(tables.destination_blocks + tile.block) +
                                 load(tables.destination_regions + tile.region) + tile_destination(tiles, tile);
    read_tile(source,
              lines_of(source, tiles.inner.source, tile.num_inner, tiles.outer.source, tile.num_outer, tiles.nbytes),
              shared, tiles.pitch, lane);
    __syncwarp();
    write_tile(destination,
               lines_of(destination, tiles.outer.destination, tile.num_outer, tiles.inner.destination, tile.num_inner,
                        tiles.nbytes),
               shared, tiles.pitch, tiles.nbytes, lane);
    __syncwarp();  // before another tile takes its place
  }
}

}  // namespace

cudaError_t load_permute_kernels() { return load_kernels(permute_tiles_kernel); }

cudaError_t launch_permute(const PermuteRegions& regions, int num_thread_blocks, cudaStream_t stream) {
  if (regions.num_blocks <= 0 || regions.num_regions <= 0 || regions.num_tokens <= 0 || regions.num_heads <= 0 ||
      regions.head_nbytes <= 0)
    return cudaSuccess;
  const Axis token = {static_cast<uint64_t>(regions.num_tokens), regions.source_token, regions.destination_token};
  const Axis head = {static_cast<uint64_t>(regions.num_heads), regions.source_head, regions.destination_head};
  const Units units = join_units({static_cast<uint64_t>(regions.num_blocks), static_cast<uint64_t>(regions.num_regions),
                                  token, head, static_cast<uint64_t>(regions.head_nbytes)});
  const Tables tables = {regions.source_blocks, regions.destination_blocks, regions.source_regions,
                         regions.destination_regions};
  if (!needs_tiles(units)) return launch_copy_units(units, tables, num_thread_blocks, stream);
  const Tiles tiles = tiles_of(units);
  const uint32_t grid = grid_size(tiles.num_tiles, kWarps, num_thread_blocks);
  KVBM_LAUNCH(permute_tiles_kernel, grid, kThreads, kWarps * kTileBytes, stream, units, tiles, tables);
  return cudaGetLastError();
}

}  // namespace kvbm
