// The body of every kernel, written once over a vector type.
//
// XXH3-64 of exactly 4096 bytes (xxHash specification, doc/xxhash_spec.md, "XXH3 for inputs over 240 bytes"): four
// blocks of 16 stripes, the accumulators scrambled after the first three; the last stripe of the input is taken with
// its own part of the secret. A line of the page is a stripe, so that copy and digest share one load.
//
// A vector type V has: kLanes (uint64 lanes), type, load, stream, store, add, eor, multiply (low half of each lane
// times its high half), swap (the two lanes of each pair), shift_47, times_prime32.
#pragma once

#include <cstring>

#include "copy_kernel.hpp"

namespace kvbm {
namespace {

constexpr std::uint64_t kPrime32_1 = 0x9E3779B1U;
constexpr std::uint64_t kPrime32_2 = 0x85EBCA77U;
constexpr std::uint64_t kPrime32_3 = 0xC2B2AE3DU;
constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87U;
constexpr std::uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4FU;
constexpr std::uint64_t kPrime64_3 = 0x165667B19E3779F9U;
constexpr std::uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63U;
constexpr std::uint64_t kPrime64_5 = 0x27D4EB2F165667C5U;

alignas(64) constexpr std::uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e};

constexpr int kStripeBlockBytes = 1024;    // 16 stripes, (192 - 64) / 8, of 64 bytes
constexpr int kScrambleSecret = 128;       // 192 - 64
constexpr int kLastStripeSecret = 121;     // 192 - 64 - 7
constexpr int kMergeSecret = 11;
alignas(64) constexpr std::uint64_t kInitial[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                                   kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

inline std::uint64_t read_u64(const std::uint8_t* at) {
  std::uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline std::uint64_t fold_product(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t merge(const std::uint64_t* lanes) {
  std::uint64_t hash = kChunkBytes * kPrime64_1;
  for (int i = 0; i < 4; ++i) {
    const std::uint8_t* secret = kSecret + kMergeSecret + 16 * i;
    hash += fold_product(lanes[2 * i] ^ read_u64(secret), lanes[2 * i + 1] ^ read_u64(secret + 8));
  }
  hash ^= hash >> 37;
  hash *= 0x165667919E3779F9U;
  return hash ^ (hash >> 32);
}

template <class V>
struct Page {
  using Vector = typename V::type;
  static constexpr int kVectors = 8 / V::kLanes;  // vectors in a line
  static constexpr int kStep = 8 * V::kLanes;     // bytes in a vector

  // Visit `num_lines` lines from `offset` on: copy them and/or mix them into the accumulators.
  template <bool Copy, bool Hash>
  static inline void lines(const std::uint8_t* source, std::uint8_t* destination, int num_lines,
                           const std::uint8_t* secret, Vector (&sums)[kVectors]) {
    for (int i = 0; i < num_lines; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const std::size_t at = i * kLineBytes + v * kStep;
        const Vector data = V::load(source + at);
        if (Copy) V::stream(destination + at, data);
        if (Hash) {
          const Vector keyed = V::eor(data, V::load(secret + 8 * i + v * kStep));
          sums[v] = V::add(sums[v], V::add(V::swap(data), V::multiply(keyed)));
        }
      }
    }
  }

  static inline void scramble(Vector (&sums)[kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector mixed = V::eor(sums[v], V::shift_47(sums[v]));
      sums[v] = V::times_prime32(V::eor(mixed, V::load(kSecret + kScrambleSecret + v * kStep)));
    }
  }

  template <bool Copy>
  static inline std::uint64_t digest(const std::uint8_t* source, std::uint8_t* destination) {
    Vector sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = V::load(kInitial + v * V::kLanes);
    for (int block = 0; block < 3; ++block) {
      lines<Copy, true>(source, destination, 16, kSecret, sums);
      scramble(sums);
      source += kStripeBlockBytes;
      if (Copy) destination += kStripeBlockBytes;
    }
    lines<Copy, true>(source, destination, 15, kSecret, sums);
    lines<Copy, true>(source + 15 * kLineBytes, Copy ? destination + 15 * kLineBytes : nullptr, 1,
                      kSecret + kLastStripeSecret, sums);
    std::uint64_t lanes[8];
    for (int v = 0; v < kVectors; ++v) V::store(lanes + v * V::kLanes, sums[v]);
    return merge(lanes);
  }

  static void copy(const std::uint8_t* source, std::uint8_t* destination) {
    Vector none[kVectors];
    lines<true, false>(source, destination, kChunkBytes / kLineBytes, nullptr, none);
  }

  static std::uint64_t copy_hash(const std::uint8_t* source, std::uint8_t* destination) {
    return digest<true>(source, destination);
  }

  static std::uint64_t hash(const std::uint8_t* source) { return digest<false>(source, nullptr); }
};

}  // namespace
}  // namespace kvbm
