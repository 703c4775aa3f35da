// The kernel that every processor of its kind runs: SSE2 on x86-64, NEON on arm64, plain words elsewhere.
#include "copy_page.hpp"

#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvbm {
namespace {

#if defined(__x86_64__)

struct Vectors {
  using type = __m128i;
  static constexpr const char* kName = "sse2";
  static constexpr int kLanes = 2;
  static type load(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
  static void store(void* at, type value) { _mm_storeu_si128(static_cast<__m128i*>(at), value); }
  static void stream(void* at, type value) { _mm_stream_si128(static_cast<__m128i*>(at), value); }
  static type add(type a, type b) { return _mm_add_epi64(a, b); }
  static type eor(type a, type b) { return _mm_xor_si128(a, b); }
  static type multiply(type value) { return _mm_mul_epu32(value, _mm_srli_epi64(value, 32)); }
  static type swap(type value) { return _mm_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2)); }
  static type shift_47(type value) { return _mm_srli_epi64(value, 47); }
  static type times_prime32(type value) {
    const type prime = _mm_set1_epi64x(static_cast<long long>(kPrime32_1));
    const type high = _mm_mul_epu32(_mm_srli_epi64(value, 32), prime);
    return _mm_add_epi64(_mm_mul_epu32(value, prime), _mm_slli_epi64(high, 32));
  }
};

void fence() { _mm_sfence(); }

#elif defined(__aarch64__)

struct Vectors {
  using type = uint64x2_t;
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 2;
  static type load(const void* at) { return vreinterpretq_u64_u8(vld1q_u8(static_cast<const std::uint8_t*>(at))); }
  static void store(void* at, type value) { vst1q_u8(static_cast<std::uint8_t*>(at), vreinterpretq_u8_u64(value)); }
  static void stream(void* at, type value) { store(at, value); }
  static type add(type a, type b) { return vaddq_u64(a, b); }
  static type eor(type a, type b) { return veorq_u64(a, b); }
  static type multiply(type value) { return vmull_u32(vmovn_u64(value), vshrn_n_u64(value, 32)); }
  static type swap(type value) { return vextq_u64(value, value, 1); }
  static type shift_47(type value) { return vshrq_n_u64(value, 47); }
  static type times_prime32(type value) {
    const uint32x2_t prime = vdup_n_u32(static_cast<std::uint32_t>(kPrime32_1));
    const type high = vmull_u32(vshrn_n_u64(value, 32), prime);
    return vaddq_u64(vmull_u32(vmovn_u64(value), prime), vshlq_n_u64(high, 32));
  }
};

void fence() {}

#else

struct Pair {
  std::uint64_t low, high;
};

struct Vectors {
  using type = Pair;
  static constexpr const char* kName = "plain";
  static constexpr int kLanes = 2;
  static type load(const void* at) {
    type value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  static void store(void* at, type value) { std::memcpy(at, &value, sizeof value); }
  static void stream(void* at, type value) { store(at, value); }
  static type add(type a, type b) { return {a.low + b.low, a.high + b.high}; }
  static type eor(type a, type b) { return {a.low ^ b.low, a.high ^ b.high}; }
  static std::uint64_t halves(std::uint64_t value) { return (value & 0xFFFFFFFFU) * (value >> 32); }
  static type multiply(type value) { return {halves(value.low), halves(value.high)}; }
  static type swap(type value) { return {value.high, value.low}; }
  static type shift_47(type value) { return {value.low >> 47, value.high >> 47}; }
  static type times_prime32(type value) { return {value.low * kPrime32_1, value.high * kPrime32_1}; }
};

void fence() {}

#endif

}  // namespace

const CopyKernel kBaselineKernel = {Vectors::kName, Page<Vectors>::copy, Page<Vectors>::copy_hash, Page<Vectors>::hash, fence};

}  // namespace kvbm
