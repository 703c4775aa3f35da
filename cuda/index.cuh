// Index arithmetic of the kernels: which thread touches which bytes. Integers only, so a CPU test drives all of it.
//
// A unit is the longest piece of memory that is contiguous on both sides: a piece of a copy, or a head of a permute.
// Units are numbered block, region, token, head; a copy has one token and one head. All numbers are 64 bits wide.
//
//     unit      |<------------- nbytes ------------->|
//     rows      |0 lanes x 16  |1 lanes x 16  |2     |       a row: one 16-byte vector for each lane of a group
//     tile      rows [tile * rows_per_tile, ...) of all units, in order; one warp takes a whole tile
#ifndef KVBM_INDEX_CUH
#define KVBM_INDEX_CUH

#include "device_code.cuh"

namespace kvbm {

constexpr uint64_t kVectorBytes = 16;
constexpr uint32_t kWarpLanes = 32;

// The largest power of two, at most 16, that divides all numbers or-ed into `bits`.
KVBM_BOTH uint32_t width_of(uint64_t bits) {
  const uint64_t limited = bits | kVectorBytes;
  return static_cast<uint32_t>(limited & (~limited + 1));
}

KVBM_BOTH uint64_t ceil_div(uint64_t value, uint64_t by) { return value / by + (value % by != 0); }
KVBM_BOTH uint64_t lesser(uint64_t a, uint64_t b) { return a < b ? a : b; }

// Bring `value` below `limit`; what it holds too much is returned, to be added to the next digit.
KVBM_BOTH uint64_t carry(uint64_t& value, uint64_t limit) {
  if (value < limit) return 0;
  if (limit == 1) {
    const uint64_t all = value;
    value = 0;
    return all;
  }
  if (value - limit < limit) {
    value -= limit;
    return 1;
  }
  const uint64_t over = value / limit;
  value -= over * limit;
  return over;
}

// -- a run of bytes ---------------------------------------------------------------------------------------------------

// A run cut for aligned access: `head` bytes one by one, `num_words` of `width` bytes, and `tail` bytes one by one.
struct Cut {
  uint32_t width;
  uint64_t head;
  uint64_t num_words;
  uint64_t tail;
};

// After the head, both addresses are multiples of the width: they differ by a multiple of it.
KVBM_BOTH Cut cut_run(uint64_t source, uint64_t destination, uint64_t nbytes) {
  Cut cut;
  cut.width = width_of(source ^ destination);
  while (cut.width > nbytes && cut.width > 1) cut.width /= 2;
  cut.head = lesser((~source + 1) & (cut.width - 1), nbytes);
  cut.num_words = (nbytes - cut.head) / cut.width;
  cut.tail = nbytes - cut.head - cut.num_words * cut.width;
  return cut;
}

// Offset in the run of the i-th of its single bytes, i < head + tail.
KVBM_BOTH uint64_t single_byte(const Cut& cut, uint64_t i) { return i < cut.head ? i : cut.num_words * cut.width + i; }
KVBM_BOTH uint64_t word_at(const Cut& cut, uint64_t i) { return cut.head + i * cut.width; }

// -- units ------------------------------------------------------------------------------------------------------------

struct Axis {
  uint64_t size;
  int64_t source;  // strides, bytes
  int64_t destination;
};

struct Units {
  uint64_t num_blocks;
  uint64_t num_regions;
  Axis token;
  Axis head;
  uint64_t nbytes;  // of one unit
};

// Units that lie side by side on both sides along an axis are one unit.
KVBM_BOTH bool join_axis(Axis& axis, uint64_t& nbytes) {
  if (axis.size == 1) return false;
  if (axis.source != axis.destination || axis.source != static_cast<int64_t>(nbytes)) return false;
  nbytes *= axis.size;
  axis.size = 1;
  return true;
}

KVBM_BOTH Units join_units(Units units) {
  if (join_axis(units.head, units.nbytes)) {
    join_axis(units.token, units.nbytes);
  } else if (join_axis(units.token, units.nbytes)) {
    join_axis(units.head, units.nbytes);
  }
  return units;
}

struct Place {
  uint64_t block, region, token, head;
  uint64_t row;  // of the unit
};

KVBM_BOTH uint64_t source_offset(const Units& units, const Place& place) {
  return place.token * static_cast<uint64_t>(units.token.source) +
         place.head * static_cast<uint64_t>(units.head.source);
}

KVBM_BOTH uint64_t destination_offset(const Units& units, const Place& place) {
  return place.token * static_cast<uint64_t>(units.token.destination) +
         place.head * static_cast<uint64_t>(units.head.destination);
}

// -- rows: how warps share units --------------------------------------------------------------------------------------

struct Rows {
  uint32_t lanes;     // of a group that moves one row; a power of two, at most 32
  uint32_t groups;    // in a warp
  uint64_t nbytes;    // of a row
  uint64_t per_unit;  // more than one only where a group is a whole warp
  uint64_t total;     // of all units
  uint64_t per_tile;  // `steps` rows of each group: what a thread has in flight
  uint64_t num_tiles;
};

KVBM_BOTH Rows rows_of(const Units& units, uint32_t steps) {
  Rows rows;
  rows.lanes = 1;
  while (rows.lanes < kWarpLanes && rows.lanes * kVectorBytes < units.nbytes) rows.lanes *= 2;
  rows.groups = kWarpLanes / rows.lanes;
  rows.nbytes = rows.lanes * kVectorBytes;
  rows.per_unit = ceil_div(units.nbytes, rows.nbytes);
  rows.total = units.num_blocks * units.num_regions * units.token.size * units.head.size * rows.per_unit;
  rows.per_tile = static_cast<uint64_t>(rows.groups) * steps;
  rows.num_tiles = ceil_div(rows.total, rows.per_tile);
  return rows;
}

// Step over `count` rows; past the last row the block is num_blocks or more.
KVBM_BOTH void advance(const Units& units, const Rows& rows, Place& place, uint64_t count) {
  place.row += count;
  place.head += carry(place.row, rows.per_unit);
  place.token += carry(place.head, units.head.size);
  place.region += carry(place.token, units.token.size);
  place.block += carry(place.region, units.num_regions);
}

// Where a group starts in a tile. Its next row is `groups` rows further on, so that the groups of a warp always stand
// side by side, and what lies side by side in memory is read by one instruction.
KVBM_BOTH Place first_place(const Units& units, const Rows& rows, uint64_t tile, uint32_t group) {
  Place place = {0, 0, 0, 0, 0};
  advance(units, rows, place, tile * rows.per_tile + group);
  return place;
}

// Bytes of a unit that belong to a row.
KVBM_BOTH uint64_t row_nbytes(const Units& units, const Rows& rows, uint64_t row) {
  return lesser(rows.nbytes, units.nbytes - row * rows.nbytes);
}

// -- tiles of a transpose ---------------------------------------------------------------------------------------------

// Tokens and heads named by what they are to the source: `inner` is the axis with the smaller stride there. A tile is
// num_inner x num_outer units of one region, kept in shared memory as num_outer rows of `pitch` bytes.
struct Tiles {
  Axis inner;
  Axis outer;
  uint32_t nbytes;  // of a unit
  uint32_t num_inner, num_outer;
  uint32_t pitch;
  uint64_t tiles_inner, tiles_outer;
  uint64_t num_tiles;
};

constexpr uint32_t kTileBytes = 5120;      // of shared memory, for each warp: 4 KiB and what the pitch adds
constexpr uint32_t kTileDataBytes = 4096;  // 8 vectors for each lane
constexpr uint64_t kSmallUnit = 64;        // below it, units are too short to be moved straight: two sectors of DRAM

KVBM_BOTH uint64_t distance(int64_t stride) { return static_cast<uint64_t>(stride < 0 ? -stride : stride); }

// Whether neighbours on one side are not neighbours on the other, and too short for that.
KVBM_BOTH bool needs_tiles(const Units& units) {
  if (units.nbytes >= kSmallUnit || units.token.size == 1 || units.head.size == 1) return false;
  return (distance(units.token.source) < distance(units.head.source)) !=
         (distance(units.token.destination) < distance(units.head.destination));
}

// An odd multiple of the widest access to shared memory, so that a column of units meets every bank.
KVBM_BOTH uint32_t tile_pitch(uint32_t num_inner, uint32_t nbytes) {
  const uint32_t width = width_of(nbytes);
  const uint32_t step = width < 4 ? 4 : width;
  const uint32_t steps = static_cast<uint32_t>(ceil_div(static_cast<uint64_t>(num_inner) * nbytes, step));
  return (steps | 1) * step;
}

KVBM_BOTH Tiles tiles_of(const Units& units) {
  Tiles tiles;
  const bool token_is_inner = distance(units.token.source) < distance(units.head.source);
  tiles.inner = token_is_inner ? units.token : units.head;
  tiles.outer = token_is_inner ? units.head : units.token;
  tiles.nbytes = static_cast<uint32_t>(units.nbytes);
  uint32_t side = 64;
  while (side * side * tiles.nbytes > kTileDataBytes) side /= 2;
  tiles.num_inner = static_cast<uint32_t>(lesser(tiles.inner.size, side));
  tiles.num_outer =
      static_cast<uint32_t>(lesser(tiles.outer.size, kTileBytes / tile_pitch(tiles.num_inner, tiles.nbytes)));
  // A short outer axis leaves room for longer rows.
  while (tiles.num_inner < tiles.inner.size &&
         tile_pitch(tiles.num_inner + 1, tiles.nbytes) * tiles.num_outer <= kTileBytes)
    ++tiles.num_inner;
  tiles.pitch = tile_pitch(tiles.num_inner, tiles.nbytes);
  tiles.tiles_inner = ceil_div(tiles.inner.size, tiles.num_inner);
  tiles.tiles_outer = ceil_div(tiles.outer.size, tiles.num_outer);
  tiles.num_tiles = units.num_blocks * units.num_regions * tiles.tiles_inner * tiles.tiles_outer;
  return tiles;
}

struct Tile {
  uint64_t block, region;
  uint64_t first_inner, first_outer;
  uint32_t num_inner, num_outer;  // fewer at the ends of the axes
};

KVBM_BOTH Tile tile_at(const Units& units, const Tiles& tiles, uint64_t number) {
  Tile tile;
  uint64_t inner = number;
  uint64_t outer = carry(inner, tiles.tiles_inner);
  tile.region = carry(outer, tiles.tiles_outer);
  tile.block = carry(tile.region, units.num_regions);
  tile.first_inner = inner * tiles.num_inner;
  tile.first_outer = outer * tiles.num_outer;
  tile.num_inner = static_cast<uint32_t>(lesser(tiles.num_inner, tiles.inner.size - tile.first_inner));
  tile.num_outer = static_cast<uint32_t>(lesser(tiles.num_outer, tiles.outer.size - tile.first_outer));
  return tile;
}

KVBM_BOTH uint64_t tile_source(const Tiles& tiles, const Tile& tile) {
  return tile.first_inner * static_cast<uint64_t>(tiles.inner.source) +
         tile.first_outer * static_cast<uint64_t>(tiles.outer.source);
}

KVBM_BOTH uint64_t tile_destination(const Tiles& tiles, const Tile& tile) {
  return tile.first_inner * static_cast<uint64_t>(tiles.inner.destination) +
         tile.first_outer * static_cast<uint64_t>(tiles.outer.destination);
}

// One side of a tile as lines of runs of words: along a line the axis with the smaller stride of that side.
struct Lines {
  uint64_t line_stride, run_stride;
  uint32_t num_lines, runs_per_line, words_per_run;
  uint32_t width;       // of a word: it divides every address and every run
  uint32_t run_nbytes;  // the whole line where its units touch, else one unit
};

KVBM_BOTH Lines lines_of(uint64_t address, int64_t run_stride, uint32_t num_runs, int64_t line_stride,
                         uint32_t num_lines, uint32_t unit_nbytes) {
  Lines lines;
  const bool touches = run_stride == static_cast<int64_t>(unit_nbytes);
  lines.run_nbytes = touches ? num_runs * unit_nbytes : unit_nbytes;
  lines.runs_per_line = touches ? 1 : num_runs;
  lines.num_lines = num_lines;
  lines.run_stride = static_cast<uint64_t>(run_stride);
  lines.line_stride = static_cast<uint64_t>(line_stride);
  lines.width = width_of(address | lines.run_nbytes | (num_lines > 1 ? lines.line_stride : 0) |
                         (lines.runs_per_line > 1 ? lines.run_stride : 0));
  lines.words_per_run = lines.run_nbytes / lines.width;
  return lines;
}

struct Word {
  uint64_t offset;  // from the tile's address
  uint32_t line;
  uint32_t at;  // byte of the line, as if all units touched
};

KVBM_BOTH uint32_t num_words(const Lines& lines) { return lines.num_lines * lines.runs_per_line * lines.words_per_run; }

KVBM_BOTH Word word_of(const Lines& lines, uint32_t i) {
  Word word;
  const uint32_t run = i / lines.words_per_run;
  const uint32_t within = (i - run * lines.words_per_run) * lines.width;
  word.line = run / lines.runs_per_line;
  const uint32_t run_of_line = run - word.line * lines.runs_per_line;
  word.offset = word.line * lines.line_stride + run_of_line * lines.run_stride + within;
  word.at = run_of_line * lines.run_nbytes + within;
  return word;
}

// -- chunks of a checksum ---------------------------------------------------------------------------------------------

constexpr uint64_t kChunkBytes = 4096;
constexpr uint32_t kChunkRows = 8;  // 32 lanes x 16 bytes each

// A place in the byte stream of a block: its pieces, one after the other.
struct StreamPlace {
  uint64_t piece;
  uint64_t within;
};

KVBM_BOTH void advance(StreamPlace& place, uint64_t piece_nbytes, uint64_t count) {
  place.within += count;
  place.piece += carry(place.within, piece_nbytes);
}

KVBM_BOTH StreamPlace stream_place(uint64_t piece_nbytes, uint64_t offset) {
  StreamPlace place = {0, 0};
  advance(place, piece_nbytes, offset);
  return place;
}

// -- bytes for tests --------------------------------------------------------------------------------------------------

// Output number `i` of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
KVBM_BOTH uint64_t fill_word(uint64_t seed, uint64_t i) {
  uint64_t word = seed + (i + 1) * 0x9E3779B97F4A7C15U;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9U;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBU;
  return word ^ (word >> 31);
}

// -- grids ------------------------------------------------------------------------------------------------------------

// A persistent grid: no more blocks than there is work for.
KVBM_BOTH uint32_t grid_size(uint64_t num_tiles, uint32_t warps_per_block, int num_thread_blocks) {
  const uint64_t most = num_thread_blocks < 1 ? 1 : static_cast<uint64_t>(num_thread_blocks);
  return static_cast<uint32_t>(lesser(most, ceil_div(num_tiles, warps_per_block)));
}

}  // namespace kvbm

#endif
