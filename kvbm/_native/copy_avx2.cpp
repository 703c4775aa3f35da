// The AVX2 kernel; the one source compiled with -mavx2.
#include <immintrin.h>

#include "copy_page.hpp"

namespace kvbm {
namespace {

struct Avx2 {
  using type = __m256i;
  static constexpr int kLanes = 4;
  static type load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
  static void store(void* at, type value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }
  static void stream(void* at, type value) { _mm256_stream_si256(static_cast<__m256i*>(at), value); }
  static type add(type a, type b) { return _mm256_add_epi64(a, b); }
  static type eor(type a, type b) { return _mm256_xor_si256(a, b); }
  static type multiply(type value) { return _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32)); }
  static type swap(type value) { return _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2)); }
  static type shift_47(type value) { return _mm256_srli_epi64(value, 47); }
  static type times_prime32(type value) {
    const type prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
    const type high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64(high, 32));
  }
};

void fence() { _mm_sfence(); }

}  // namespace

const CopyKernel kAvx2Kernel = {"avx2", Page<Avx2>::copy, Page<Avx2>::copy_hash, Page<Avx2>::hash, fence};

}  // namespace kvbm
