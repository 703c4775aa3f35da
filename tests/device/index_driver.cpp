// Drives cuda/index.cuh and cuda/xxh3.cuh on the CPU as the kernels do: one loop over tiles, lanes and steps.
// `index_driver NAME` proves one claim over every small shape; a failure prints what was tried and exits with 1.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "xxh3.cuh"

namespace {

using kvbm::Axis;
using kvbm::Units;

unsigned long long num_checks = 0;

#define CHECK(condition, ...)                                   \
  do {                                                          \
    ++num_checks;                                               \
    if (!(condition)) {                                         \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                 \
      std::printf("\n");                                        \
      std::exit(1);                                             \
    }                                                           \
  } while (0)

using u64 = unsigned long long;

void check_all_once(const std::vector<int>& counts, const char* what, u64 a, u64 b, u64 c) {
  for (std::size_t i = 0; i < counts.size(); ++i)
    CHECK(counts[i] == 1, "%s: byte %zu is touched %d times (%llu, %llu, %llu)", what, i, counts[i], a, b, c);
}

void cuts() {
  for (u64 source = 4096; source < 4096 + 32; ++source)
    for (u64 destination = 8192; destination < 8192 + 32; ++destination)
      for (u64 nbytes = 0; nbytes <= 100; ++nbytes) {
        const kvbm::Cut cut = kvbm::cut_run(source, destination, nbytes);
        std::vector<int> counts(nbytes, 0);
        for (u64 i = 0; i < cut.num_words; ++i) {
          const u64 at = kvbm::word_at(cut, i);
          CHECK((source + at) % cut.width == 0 && (destination + at) % cut.width == 0, "%llu", at);
          for (u64 byte = at; byte < at + cut.width; ++byte) ++counts.at(byte);
        }
        for (u64 i = 0; i < cut.head + cut.tail; ++i) ++counts.at(kvbm::single_byte(cut, i));
        check_all_once(counts, "cut", source, destination, nbytes);
        // As wide as the difference of the addresses allows, and less than one word at each end.
        u64 widest = 16;
        while ((source - destination) % widest != 0 || widest > (nbytes ? nbytes : 1)) widest /= 2;
        CHECK(cut.width == widest, "%u, not %llu: %llu, %llu, %llu", cut.width, widest, source, destination, nbytes);
        CHECK(cut.head < cut.width && cut.tail < cut.width, "%llu, %llu, %llu", source, destination, nbytes);
      }
}

Units plain_units(u64 blocks, u64 regions, u64 tokens, u64 heads, u64 nbytes) {
  return {blocks, regions, {tokens, 0, 0}, {heads, 0, 0}, nbytes};
}

void rows_of_shape(const Units& units, uint32_t steps) {
  const kvbm::Rows rows = kvbm::rows_of(units, steps);
  const u64 num_units = units.num_blocks * units.num_regions * units.token.size * units.head.size;
  CHECK(rows.lanes * rows.groups == 32 && rows.nbytes == rows.lanes * 16, "%llu", static_cast<u64>(units.nbytes));
  CHECK(rows.lanes == 32 || rows.nbytes >= units.nbytes, "a short unit is one row");
  std::vector<int> counts(num_units * units.nbytes, 0);
  for (u64 tile = 0; tile < rows.num_tiles; ++tile)
    for (uint32_t group = 0; group < rows.groups; ++group) {
      kvbm::Place place = kvbm::first_place(units, rows, tile, group);
      for (uint32_t step = 0; step < steps; ++step, kvbm::advance(units, rows, place, rows.groups)) {
        if (place.block >= units.num_blocks) continue;
        CHECK(place.region < units.num_regions && place.token < units.token.size && place.head < units.head.size &&
                  place.row < rows.per_unit, "out of range");
        const u64 region = place.block * units.num_regions + place.region;
        const u64 unit = (region * units.token.size + place.token) * units.head.size + place.head;
        const u64 nbytes = kvbm::row_nbytes(units, rows, place.row);
        CHECK(nbytes >= 1 && nbytes <= rows.nbytes, "%llu", nbytes);
        for (u64 byte = 0; byte < nbytes; ++byte) ++counts.at(unit * units.nbytes + place.row * rows.nbytes + byte);
      }
    }
  check_all_once(counts, "rows", num_units, units.nbytes, steps);
}

void rows() {
  const u64 sizes[] = {1,   2,   15,  16,  17,  31,  32,   33,   48,   64,   100,  127,  128,  129, 255,
                       256, 257, 500, 511, 512, 513, 1023, 1024, 1025, 1537, 4095, 4096, 4097, 8200};
  for (u64 nbytes : sizes)
    for (u64 blocks = 0; blocks <= 3; ++blocks)
      for (u64 regions = 1; regions <= 3; ++regions)
        for (u64 tokens = 1; tokens <= 3; ++tokens)
          for (u64 heads = 1; heads <= 5; ++heads)
            for (uint32_t steps : {1U, 3U, 8U})
              rows_of_shape(plain_units(blocks, regions, tokens, heads, nbytes), steps);
  for (u64 blocks : {31, 32, 33, 255, 256, 257})
    for (u64 nbytes : {1, 16, 17, 64, 512}) rows_of_shape(plain_units(blocks, 7, 1, 1, nbytes), 8);
}

// Totals beyond 2^32: the odometer against plain division in 128 bits.
void huge() {
  const u64 sizes[] = {1, 3, 7, 1000, (1ULL << 32) - 1, 1ULL << 32, (1ULL << 32) + 1};
  for (u64 blocks : sizes)
    for (u64 regions : {1ULL, 5ULL, 70000ULL})
      for (u64 tokens : {1ULL, 16ULL, 70000ULL})
        for (u64 heads : {1ULL, 3ULL, 70001ULL})
          for (u64 nbytes : {1ULL, 16ULL, 513ULL, 1ULL << 33}) {
            const Units units = plain_units(blocks, regions, tokens, heads, nbytes);
            const kvbm::Rows rows = kvbm::rows_of(units, 8);
            const unsigned __int128 total =
                static_cast<unsigned __int128>(blocks) * regions * tokens * heads * rows.per_unit;
            if (total >> 62) continue;
            CHECK(rows.total == total, "total");
            for (u64 tile : {0ULL, 1ULL, static_cast<u64>(rows.num_tiles / 2), static_cast<u64>(rows.num_tiles - 1)}) {
              if (tile >= rows.num_tiles) continue;
              kvbm::Place place = kvbm::first_place(units, rows, tile, rows.groups - 1);
              u64 index = tile * rows.per_tile + rows.groups - 1;
              for (int step = 0; step < 8; ++step) {
                u64 rest = index;
                CHECK(place.row == rest % rows.per_unit, "row");
                rest /= rows.per_unit;
                CHECK(place.head == rest % heads, "head");
                rest /= heads;
                CHECK(place.token == rest % tokens, "token");
                rest /= tokens;
                CHECK(place.region == rest % regions && place.block == rest / regions, "region and block");
                kvbm::advance(units, rows, place, rows.groups);
                index += rows.groups;
              }
            }
          }
  for (u64 nbytes : {1ULL, 15ULL, 511ULL, 512ULL, 513ULL, 4097ULL, (1ULL << 32) + 1})
    for (u64 offset : {0ULL, 1ULL, 4095ULL, (1ULL << 32) - 1, 1ULL << 40}) {
      kvbm::StreamPlace place = kvbm::stream_place(nbytes, offset);
      for (int step = 0; step < 9; ++step, offset += 512) {
        CHECK(place.piece == offset / nbytes && place.within == offset % nbytes, "stream %llu of %llu", offset, nbytes);
        kvbm::advance(place, nbytes, 512);
      }
    }
}

void joins() {
  for (u64 tokens = 1; tokens <= 3; ++tokens)
    for (u64 heads = 1; heads <= 3; ++heads)
      for (u64 nbytes = 1; nbytes <= 3; ++nbytes)
        for (int mode = 0; mode < 16; ++mode) {
          // Each side: heads inside, tokens inside, and either with a gap behind each unit.
          const auto axes = [&](int kind, int64_t& token, int64_t& head) {
            const int64_t unit = static_cast<int64_t>(nbytes + (kind & 2 ? 1 : 0));
            token = kind & 1 ? unit : unit * static_cast<int64_t>(heads);
            head = kind & 1 ? unit * static_cast<int64_t>(tokens) : unit;
          };
          Units units = {1, 1, {tokens, 0, 0}, {heads, 0, 0}, nbytes};
          axes(mode & 3, units.token.source, units.head.source);
          axes(mode >> 2, units.token.destination, units.head.destination);
          const auto pairs = [](const Units& of) {
            std::map<u64, u64> found;
            for (u64 token = 0; token < of.token.size; ++token)
              for (u64 head = 0; head < of.head.size; ++head)
                for (u64 byte = 0; byte < of.nbytes; ++byte) {
                  const kvbm::Place place = {0, 0, token, head, 0};
                  found[kvbm::destination_offset(of, place) + byte] = kvbm::source_offset(of, place) + byte;
                }
            return found;
          };
          const Units joined = kvbm::join_units(units);
          CHECK(pairs(units) == pairs(joined), "mode %d of %llu x %llu x %llu", mode, tokens, heads, nbytes);
          const bool is_dense = mode == 0 || mode == 5;
          if (is_dense) CHECK(joined.nbytes == tokens * heads * nbytes, "mode %d is not joined", mode);
        }
}

// A tile as its warp reads it into shared memory and writes it from there, byte by byte.
void tile_bytes(const kvbm::Tiles& tiles, const kvbm::Tile& tile, u64 source, u64 destination) {
  const kvbm::Lines reads =
      kvbm::lines_of(source, tiles.inner.source, tile.num_inner, tiles.outer.source, tile.num_outer, tiles.nbytes);
  const kvbm::Lines writes = kvbm::lines_of(destination, tiles.outer.destination, tile.num_outer,
                                            tiles.inner.destination, tile.num_inner, tiles.nbytes);
  constexpr u64 kNothing = ~0ULL;
  std::vector<u64> shared(kvbm::kTileBytes, kNothing);  // which byte of the source stands there
  const u64 nbytes = static_cast<u64>(tile.num_inner) * tile.num_outer * tiles.nbytes;
  u64 num_read = 0;
  for (uint32_t i = 0; i < kvbm::num_words(reads); ++i) {
    const kvbm::Word word = kvbm::word_of(reads, i);
    CHECK((source + word.offset) % reads.width == 0, "unaligned read");
    CHECK(word.at + reads.width <= tiles.pitch, "beyond the row");
    for (uint32_t byte = 0; byte < reads.width; ++byte, ++num_read) {
      u64& place = shared.at(word.line * tiles.pitch + word.at + byte);
      CHECK(place == kNothing, "a byte of shared memory is written twice");
      place = word.offset + byte;
    }
  }
  CHECK(num_read == nbytes, "%llu of %llu bytes are read", num_read, nbytes);
  std::vector<int> written(nbytes, 0);
  for (uint32_t i = 0; i < kvbm::num_words(writes); ++i) {
    const kvbm::Word word = kvbm::word_of(writes, i);
    CHECK((destination + word.offset) % writes.width == 0, "unaligned write");
    for (uint32_t byte = 0; byte < writes.width; ++byte) {
      const u64 inner = word.line, outer = (word.at + byte) / tiles.nbytes, within = (word.at + byte) % tiles.nbytes;
      CHECK(inner < tile.num_inner && outer < tile.num_outer, "outside the tile");
      CHECK(shared.at(outer * tiles.pitch + inner * tiles.nbytes + within) ==
                inner * static_cast<u64>(tiles.inner.source) + outer * static_cast<u64>(tiles.outer.source) + within,
            "not its source");
      CHECK(word.offset + byte == inner * static_cast<u64>(tiles.inner.destination) +
                                      outer * static_cast<u64>(tiles.outer.destination) + within, "not its place");
      ++written.at((outer * tile.num_inner + inner) * tiles.nbytes + within);
    }
  }
  check_all_once(written, "tile", tile.num_inner, tile.num_outer, tiles.nbytes);
}

void tiles() {
  for (u64 nbytes : {1, 2, 3, 4, 6, 8, 12, 15, 16, 20, 24, 31, 32, 33, 48, 63})
    for (u64 tokens : {2, 7, 16, 33, 130})
      for (u64 heads : {2, 5, 8, 129})
        for (int mode = 0; mode < 8; ++mode) {
          const int64_t unit = static_cast<int64_t>(nbytes), gap = mode & 2 ? 16 : 0, apart = mode & 4 ? unit : 0;
          const int64_t by_token = unit * static_cast<int64_t>(heads), by_head = unit * static_cast<int64_t>(tokens);
          const int64_t near = unit + apart, far_token = 2 * by_token + gap, far_head = 2 * by_head + gap;
          const bool head_first = (mode & 1) == 0;
          const Axis token = {tokens, head_first ? far_token : near, head_first ? near : far_head};
          const Axis head = {heads, head_first ? near : far_head, head_first ? far_head : near};
          const Units units = {2, 3, token, head, nbytes};
          CHECK(kvbm::needs_tiles(units), "%llu x %llu x %llu", tokens, heads, nbytes);
          const kvbm::Tiles all = kvbm::tiles_of(units);
          CHECK(all.pitch * all.num_outer <= kvbm::kTileBytes, "shared memory");
          CHECK(all.num_inner * all.nbytes <= all.pitch, "pitch %u", all.pitch);
          CHECK(all.pitch / kvbm::width_of(all.pitch) % 2 == 1 && all.pitch % 4 == 0, "pitch %u", all.pitch);
          CHECK(all.inner.source <= all.outer.source, "the source is read along its longer stride");
          std::vector<int> counts(2 * 3 * tokens * heads, 0);
          for (u64 number = 0; number < all.num_tiles; ++number) {
            const kvbm::Tile tile = kvbm::tile_at(units, all, number);
            const u64 source = kvbm::tile_source(all, tile), destination = kvbm::tile_destination(all, tile);
            for (u64 outer = tile.first_outer; outer < tile.first_outer + tile.num_outer; ++outer)
              for (u64 inner = tile.first_inner; inner < tile.first_inner + tile.num_inner; ++inner)
                ++counts.at(((tile.block * 3 + tile.region) * all.outer.size + outer) * all.inner.size + inner);
            const bool is_in_last_region = number + all.tiles_inner * all.tiles_outer >= all.num_tiles;
            if (number == 0 || is_in_last_region) tile_bytes(all, tile, source + mode % 5, destination);
          }
          check_all_once(counts, "tiles", tokens, heads, nbytes);
        }
}

void grids() {
  for (u64 num_tiles : {1ULL, 15ULL, 16ULL, 17ULL, 1ULL << 40})
    for (int most : {-1, 0, 1, 4, 1000}) {
      const u64 size = kvbm::grid_size(num_tiles, 16, most);
      CHECK(size >= 1 && size <= static_cast<u64>(most < 1 ? 1 : most), "more than asked for");
      CHECK((size - 1) * 16 < num_tiles, "a block without work");
    }
}

// XXH3 of a chunk filled from a seed, computed by 32 lanes in turn.
void digest(u64 seed) {
  const uint64_t secret[kvbm::kNumSecretWords] = KVBM_XXH3_SECRET;
  kvbm::Pair sums[4];
  for (uint32_t pair = 0; pair < 4; ++pair) sums[pair] = kvbm::initial_pair(pair);
  for (uint32_t row = 0; row < kvbm::kChunkRows; ++row) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const u64 word = (row * 32 + lane) * 2;
      const kvbm::Pair data = {kvbm::fill_word(seed, word), kvbm::fill_word(seed, word + 1)};
      kvbm::add_vector(sums[lane % 4], data, kvbm::row_key(kvbm::lane_keys(secret, lane), row));
    }
    if (row % 2 == 1 && row + 1 < kvbm::kChunkRows)
      for (uint32_t pair = 0; pair < 4; ++pair) kvbm::scramble(sums[pair], kvbm::lane_keys(secret, pair));
  }
  u64 merged = 0;
  for (uint32_t pair = 0; pair < 4; ++pair) merged += kvbm::merged(sums[pair], kvbm::lane_keys(secret, pair));
  const u64 digest = kvbm::chunk_digest(merged);
  std::printf("%llu %llu %llu\n", digest, static_cast<u64>(kvbm::chunk_term(digest, 7)),
              static_cast<u64>(kvbm::block_checksum(seed, 4096, seed + 1, seed + 2)));
}

}  // namespace

int main(int count, char** arguments) {
  const char* name = count > 1 ? arguments[1] : "";
  const std::map<std::string, void (*)()> claims = {{"cuts", cuts}, {"rows", rows}, {"huge", huge},
                                                    {"joins", joins}, {"tiles", tiles}, {"grids", grids}};
  if (count > 2 && std::strcmp(name, "digest") == 0) {
    digest(std::strtoull(arguments[2], nullptr, 10));
    return 0;
  }
  const auto claim = claims.find(name);
  if (claim == claims.end()) return 2;
  claim->second();
  std::printf("%llu checks\n", num_checks);
  return 0;
}
