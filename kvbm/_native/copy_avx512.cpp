// The AVX-512 kernel; the one source compiled with -mavx512f.
#include <immintrin.h>

#include "copy_page.hpp"

namespace kvbm {
namespace {

struct Avx512 {
  using type = __m512i;
  static constexpr int kLanes = 8;
  static type load(const void* at) { return _mm512_loadu_si512(at); }
  static void store(void* at, type value) { _mm512_storeu_si512(at, value); }
  static void stream(void* at, type value) { _mm512_stream_si512(static_cast<__m512i*>(at), value); }
  static type add(type a, type b) { return _mm512_add_epi64(a, b); }
  static type eor(type a, type b) { return _mm512_xor_si512(a, b); }
  static type multiply(type value) { return _mm512_mul_epu32(value, _mm512_srli_epi64(value, 32)); }
  static type swap(type value) { return _mm512_shuffle_epi32(value, _MM_PERM_BADC); }
  static type shift_47(type value) { return _mm512_srli_epi64(value, 47); }
  static type times_prime32(type value) {
    const type prime = _mm512_set1_epi64(static_cast<long long>(kPrime32_1));
    const type high = _mm512_mul_epu32(_mm512_srli_epi64(value, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(value, prime), _mm512_slli_epi64(high, 32));
  }
};

void fence() { _mm_sfence(); }

}  // namespace

const CopyKernel kAvx512Kernel = {"avx512", Page<Avx512>::copy, Page<Avx512>::copy_hash, Page<Avx512>::hash, fence};

}  // namespace kvbm
