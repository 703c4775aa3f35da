// Loads and stores of 1 to 16 bytes at addresses given as integers. The caller vouches that the address is a multiple
// of the width, and for the memory behind it.
#ifndef KVBM_VECTORS_CUH
#define KVBM_VECTORS_CUH

#include "device_code.cuh"
#include "index.cuh"

#ifdef __CUDACC__
#define KVBM_UNROLL _Pragma("unroll")
#define KVBM_ROLLED _Pragma("unroll 1")
#else
#define KVBM_UNROLL
#define KVBM_ROLLED
#endif

namespace kvbm {

using Vector = ulonglong2;  // 16 bytes, aligned to 16

// Addresses reach kernels as integers, in arrays that the host wrote; here they become pointers.
template <class Word>
KVBM_DEVICE Word load_at(uint64_t address) {
  return load_once(reinterpret_cast<const Word*>(static_cast<uintptr_t>(address)));
}

template <class Word>
KVBM_DEVICE void store_at(uint64_t address, const Word& value) {
  store_once(reinterpret_cast<Word*>(static_cast<uintptr_t>(address)), value);
}

// Narrow words stand in the low bytes.
KVBM_DEVICE Vector load_width(uint64_t address, uint32_t width) {
  switch (width) {
    case 16: return load_at<Vector>(address);
    case 8: return {load_at<unsigned long long>(address), 0};
    case 4: return {load_at<uint32_t>(address), 0};
    case 2: return {load_at<uint16_t>(address), 0};
    default: return {load_at<uint8_t>(address), 0};
  }
}

KVBM_DEVICE void store_width(uint64_t address, uint32_t width, const Vector& value) {
  switch (width) {
    case 16: store_at<Vector>(address, value); break;
    case 8: store_at<unsigned long long>(address, value.x); break;
    case 4: store_at<uint32_t>(address, static_cast<uint32_t>(value.x)); break;
    case 2: store_at<uint16_t>(address, static_cast<uint16_t>(value.x)); break;
    default: store_at<uint8_t>(address, static_cast<uint8_t>(value.x));
  }
}

// Put a narrow word at byte `at`, a multiple of its width, of a vector whose bytes there are zero.
KVBM_DEVICE void put_word(Vector& vector, const Vector& word, uint32_t width, uint32_t at) {
  if (width == 16)
    vector = word;
  else if (at < 8)
    vector.x |= word.x << (8 * at);
  else
    vector.y |= word.x << (8 * (at - 8));
}

// Copy a run with the lanes of a group, in the widest words that both addresses allow.
KVBM_DEVICE void copy_run(uint64_t source, uint64_t destination, uint64_t nbytes, uint32_t lane, uint32_t num_lanes) {
  const Cut cut = cut_run(source, destination, nbytes);
  for (uint64_t i = lane; i < cut.num_words; i += num_lanes) {
    const uint64_t at = word_at(cut, i);
    store_width(destination + at, cut.width, load_width(source + at, cut.width));
  }
  for (uint64_t i = lane; i < cut.head + cut.tail; i += num_lanes) {
    const uint64_t at = single_byte(cut, i);
    store_at<uint8_t>(destination + at, load_at<uint8_t>(source + at));
  }
}

}  // namespace kvbm

#endif
