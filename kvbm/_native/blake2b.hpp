// BLAKE2b, written from RFC 7693, and the keyed chain of block hashes on top of it.
//
// Sequential mode only (fanout 1, depth 1), little-endian machines. The key block is compressed once for a chain, so a
// block of 16 tokens (16 + 64 bytes) costs one compression. Scalar on purpose: each hash waits for the one before, so
// the chain is bound by latency, and four AVX-512 lanes gained 5 % only. No allocation, no state outside the objects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read and written as they lie in memory");

namespace kvbm::blake2b {

constexpr std::size_t kBlockNbytes = 128;
constexpr std::size_t kHashNbytes = 16;

constexpr std::uint64_t kIv[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

// Section 2.7; rounds 10 and 11 repeat rounds 0 and 1.
constexpr unsigned char kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

inline std::uint64_t rotate_right(std::uint64_t word, int n) { return (word >> n) | (word << (64 - n)); }

// Section 3.1.
inline void mix(std::uint64_t& a, std::uint64_t& b, std::uint64_t& c, std::uint64_t& d, std::uint64_t x,
                std::uint64_t y) {
    a = a + b + x;
    d = rotate_right(d ^ a, 32);
    c += d;
    b = rotate_right(b ^ c, 24);
    a = a + b + y;
    d = rotate_right(d ^ a, 16);
    c += d;
    b = rotate_right(b ^ c, 63);
}

template <std::size_t kRound>
inline void mix_round(std::uint64_t (&v)[16], const std::uint64_t (&m)[16]) {
    constexpr const unsigned char(&s)[16] = kSigma[kRound % 10];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
}

template <std::size_t... kRounds>
inline void mix_rounds(std::uint64_t (&v)[16], const std::uint64_t (&m)[16], std::index_sequence<kRounds...>) {
    (mix_round<kRounds>(v, m), ...);
}

// Section 3.2. The message stays in memory, where the additions read it: the state needs all registers.
// `num_bytes` counts everything up to the end of this block (below 2^64), the key block included.
inline void compress(std::uint64_t* h, const unsigned char* block, std::uint64_t num_bytes, bool is_last) {
    std::uint64_t m[16];
    std::uint64_t v[16];
    std::memcpy(m, block, sizeof m);
    for (int i = 0; i < 8; ++i) v[i] = h[i];
    for (int i = 0; i < 8; ++i) v[8 + i] = kIv[i];
    v[12] ^= num_bytes;
    if (is_last) v[14] = ~v[14];
    mix_rounds(v, m, std::make_index_sequence<12>{});
    for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[8 + i];
}

}  // namespace kvbm::blake2b

namespace kvbm {

// One hash in the making. A keyed one whose key block was compressed (`flush_for_more`) is the midstate of a chain.
class Blake2b {
  public:
    // Section 2.5; sizes are checked by the caller: digest 1..64, key 0..64, person 0..16 bytes.
    void init(int digest_size, const std::uint8_t* key, int key_size, const std::uint8_t* person, int person_size) {
        std::uint64_t padded[2] = {};
        if (person_size > 0) std::memcpy(padded, person, static_cast<std::size_t>(person_size));
        for (int i = 0; i < 8; ++i) h_[i] = blake2b::kIv[i];
        h_[0] ^= 0x01010000 ^ (static_cast<std::uint64_t>(key_size) << 8) ^ static_cast<std::uint64_t>(digest_size);
        h_[6] ^= padded[0];
        h_[7] ^= padded[1];
        digest_size_ = digest_size;
        num_compressed_ = 0;
        num_buffered_ = 0;
        if (key_size > 0) {
            std::memset(buffer_, 0, sizeof buffer_);
            std::memcpy(buffer_, key, static_cast<std::size_t>(key_size));
            num_buffered_ = sizeof buffer_;
        }
    }

    // Compress a full buffer; allowed only when more bytes follow, as the last block is compressed by `finish`.
    void flush_for_more() {
        if (num_buffered_ < sizeof buffer_) return;
        num_compressed_ += sizeof buffer_;
        blake2b::compress(h_, buffer_, num_compressed_, false);
        num_buffered_ = 0;
    }

    void update(const std::uint8_t* data, std::size_t nbytes) {
        while (nbytes > 0) {
            flush_for_more();
            const std::size_t room = sizeof buffer_ - num_buffered_;
            const std::size_t taken = nbytes < room ? nbytes : room;
            std::memcpy(buffer_ + num_buffered_, data, taken);
            num_buffered_ += taken;
            data += taken;
            nbytes -= taken;
        }
    }

    // Writes `digest_size` bytes; the state is used up.
    void finish(std::uint8_t* digest) {
        std::memset(buffer_ + num_buffered_, 0, sizeof buffer_ - num_buffered_);
        blake2b::compress(h_, buffer_, num_compressed_ + num_buffered_, true);
        std::memcpy(digest, h_, static_cast<std::size_t>(digest_size_));
    }

    // Hash parent (16 bytes) || data || extra from this midstate, which stays as it is, into 16 bytes.
    void chain(const std::uint8_t* parent, const std::uint8_t* data, std::size_t nbytes, const std::uint8_t* extra,
               std::size_t extra_nbytes, std::uint8_t* digest) const {
        const std::size_t total = blake2b::kHashNbytes + nbytes + extra_nbytes;
        if (total > blake2b::kBlockNbytes) {
            Blake2b state = *this;
            state.update(parent, blake2b::kHashNbytes);
            state.update(data, nbytes);
            state.update(extra, extra_nbytes);
            state.finish(digest);
            return;
        }
        std::uint8_t block[blake2b::kBlockNbytes];
        std::memcpy(block, parent, blake2b::kHashNbytes);
        std::memcpy(block + blake2b::kHashNbytes, data, nbytes);
        if (extra_nbytes > 0) std::memcpy(block + blake2b::kHashNbytes + nbytes, extra, extra_nbytes);
        std::memset(block + total, 0, sizeof block - total);
        std::uint64_t h[8];
        std::memcpy(h, h_, sizeof h);
        blake2b::compress(h, block, num_compressed_ + total, true);
        std::memcpy(digest, h, blake2b::kHashNbytes);
    }

  private:
    std::uint64_t h_[8];
    std::uint64_t num_compressed_;
    std::size_t num_buffered_;
    int digest_size_;
    std::uint8_t buffer_[blake2b::kBlockNbytes];
};

}  // namespace kvbm
