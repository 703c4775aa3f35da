// XXH3-64 (seed 0, default secret) of a chunk of 4096 bytes, cut so that a warp computes it together.
//
// The xxHash specification (doc/xxhash_spec.md, "XXH3 for inputs over 240 bytes") has eight accumulators and 64 stripes
// of eight words: a word is added to its neighbour's accumulator, and its keyed product to its own. Only the scramble
// after each 16 stripes depends on order; in between everything is a sum. So 16 bytes, two neighbouring words, give a
// pair of addends that need nothing else, a lane of a warp takes any vector of the chunk, and the pairs of a block of
// stripes are added up by shuffles:
//
//     row (512 bytes)    |lane 0|lane 1|lane 2|lane 3| 4..7 | ... |28..31|    lane % 4: which pair of accumulators
//     stripes (64 bytes) |          stripe 0         |  1   | ... |  7   |    a block of stripes is two rows
#ifndef KVBM_XXH3_CUH
#define KVBM_XXH3_CUH

#include "index.cuh"

#ifdef __CUDACC__
#define KVBM_CONSTANT __constant__
#else
#define KVBM_CONSTANT
#endif

namespace kvbm {

constexpr uint64_t kPrime32_1 = 0x9E3779B1U;
constexpr uint64_t kPrime32_2 = 0x85EBCA77U;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3DU;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87U;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4FU;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9U;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63U;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5U;
constexpr uint64_t kPrimeMx = 0x165667919E3779F9U;

constexpr uint32_t kNumSecretWords = 24;
constexpr uint32_t kScrambleSecret = 128;   // 192 - 64, bytes
constexpr uint32_t kLastStripeSecret = 121;  // 192 - 64 - 7
constexpr uint32_t kMergeSecret = 11;
constexpr uint32_t kStripesPerRow = 8;
constexpr uint32_t kNumStripeBlocks = 4;  // of two rows each

// The default secret as little-endian words.
#define KVBM_XXH3_SECRET                                                                                       \
  {0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,         \
   0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,         \
   0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,         \
   0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,         \
   0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af}

struct Pair {
  uint64_t low, high;
};

// The word at any byte of the secret.
KVBM_BOTH uint64_t secret_word(const uint64_t* secret, uint32_t offset) {
  const uint32_t bits = 8 * (offset % 8);
  const uint64_t low = secret[offset / 8] >> bits;
  return bits == 0 ? low : low | secret[offset / 8 + 1] << (64 - bits);
}

KVBM_BOTH Pair secret_pair(const uint64_t* secret, uint32_t offset) {
  return {secret_word(secret, offset), secret_word(secret, offset + 8)};
}

// What one lane needs of the secret, the same for every chunk.
struct LaneKeys {
  Pair even, odd;  // for the first and the second row of a block of stripes
  Pair last;       // for the last row of the chunk, whose last stripe has a key of its own
  Pair scramble;
  Pair merge;
};

KVBM_BOTH LaneKeys lane_keys(const uint64_t* secret, uint32_t lane) {
  const uint32_t stripe = lane / 4, pair = 16 * (lane % 4);
  LaneKeys keys;
  keys.even = secret_pair(secret, 8 * stripe + pair);
  keys.odd = secret_pair(secret, 8 * (kStripesPerRow + stripe) + pair);
  keys.last = stripe == kStripesPerRow - 1 ? secret_pair(secret, kLastStripeSecret + pair) : keys.odd;
  keys.scramble = secret_pair(secret, kScrambleSecret + pair);
  keys.merge = secret_pair(secret, kMergeSecret + pair);
  return keys;
}

KVBM_BOTH const Pair& row_key(const LaneKeys& keys, uint32_t row) {
  return row + 1 == kChunkRows ? keys.last : row % 2 ? keys.odd : keys.even;
}

// The accumulators a lane starts from; chosen without a table, which would be an array indexed at run time.
KVBM_BOTH Pair initial_pair(uint32_t lane) {
  const uint32_t pair = lane % 4;
  if (pair == 0) return {kPrime32_3, kPrime64_1};
  if (pair == 1) return {kPrime64_2, kPrime64_3};
  if (pair == 2) return {kPrime64_4, kPrime32_2};
  return {kPrime64_5, kPrime32_1};
}

KVBM_BOTH uint64_t halves_product(uint64_t value) { return (value & 0xFFFFFFFFU) * (value >> 32); }

KVBM_BOTH void add_vector(Pair& sums, const Pair& data, const Pair& key) {
  sums.low += data.high + halves_product(data.low ^ key.low);
  sums.high += data.low + halves_product(data.high ^ key.high);
}

KVBM_BOTH uint64_t scrambled(uint64_t sum, uint64_t key) { return (sum ^ (sum >> 47) ^ key) * kPrime32_1; }

KVBM_BOTH void scramble(Pair& sums, const LaneKeys& keys) {
  sums.low = scrambled(sums.low, keys.scramble.low);
  sums.high = scrambled(sums.high, keys.scramble.high);
}

KVBM_BOTH uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// What a pair of accumulators adds to the digest.
KVBM_BOTH uint64_t merged(const Pair& sums, const LaneKeys& keys) {
  const uint64_t a = sums.low ^ keys.merge.low, b = sums.high ^ keys.merge.high;
  return (a * b) ^ high_product(a, b);
}

KVBM_BOTH uint64_t avalanche(uint64_t value) {
  value = (value ^ (value >> 37)) * kPrimeMx;
  return value ^ (value >> 32);
}

// XXH3-64 from the sum of the four pairs' `merged`.
KVBM_BOTH uint64_t chunk_digest(uint64_t merged_sum) { return avalanche(merged_sum + kChunkBytes * kPrime64_1); }

// -- the checksum of a block, as in kvbm/_pure/copies.py ----------------------------------------------------------

KVBM_BOTH uint64_t chunk_term(uint64_t digest, uint64_t chunk) { return avalanche(digest + chunk * kPrime64_1); }

KVBM_BOTH uint64_t block_checksum(uint64_t sum, uint64_t nbytes, uint64_t hash_low, uint64_t hash_high) {
  return avalanche(avalanche(sum + nbytes) ^ avalanche(hash_low + hash_high * kPrime64_1));
}

}  // namespace kvbm

#endif
