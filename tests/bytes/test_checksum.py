"""Checksums: XXH3 against the xxhash package, golden values, seams between pieces, and flipped bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm._pure.copies import CHUNK_NBYTES, xxh3_chunks
from kvbm.errors import HashFormatError, LayoutError

Bytes = npt.NDArray[np.uint8]
MASK = (1 << 64) - 1
PRIME = 0x9E3779B185EBCA87
SIZES = [1, 63, 64, 65, 1023, 1024, 4095, 4096, 4097, 8191, 8192, 8193, 16384, 20000, 300_000, (1 << 20) + 4096 + 5]

# The checksum of `ramp(size)` under the hash (1, 2): these never change, disks keep them.
GOLDEN = {
    1: 0x9D47032FFCBCC217,
    4095: 0xC5B314C8A50893EA,
    4096: 0x785019515335D217,
    4097: 0xB78B2C60C756DA40,
    20000: 0x4A87EEF48EEC663D,
}


def ramp(size: int) -> Bytes:
    values: npt.NDArray[np.uint64] = np.arange(size, dtype=np.uint64) * np.uint64(7919) >> np.uint64(5)
    low: Bytes = values.astype(np.uint8)
    return low


def noise(size: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def avalanche(value: int) -> int:
    value ^= value >> 37
    value = value * 0x165667919E3779F9 & MASK
    return value ^ value >> 32


def expected_checksum(data: bytes, low: int, high: int) -> int:
    """Compute the checksum from its definition with Python integers and the xxhash package."""
    total = len(data)
    for i in range(-(-len(data) // CHUNK_NBYTES)):
        chunk = data[i * CHUNK_NBYTES : (i + 1) * CHUNK_NBYTES].ljust(CHUNK_NBYTES, b"\0")
        total += avalanche(xxhash.xxh3_64_intdigest(chunk) + i * PRIME & MASK)
    return avalanche(avalanche(total & MASK) ^ avalanche(low + high * PRIME & MASK))


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def checksum(backend: Backend, data: Bytes, hashes: tuple[int, int] = (1, 2), *, num_threads: int = 1) -> int:
    """Give the checksum of one contiguous block."""
    blocks, pieces = words(data.ctypes.data), words(0)
    result = backend.checksum_blocks(blocks, pieces, len(data), words(*hashes).reshape(1, 2), num_threads=num_threads)
    return int(result[0])


def test_xxh3_of_chunks_equals_the_xxhash_package() -> None:
    chunks = np.concatenate([noise(64 * CHUNK_NBYTES), np.zeros(CHUNK_NBYTES, np.uint8), ramp(CHUNK_NBYTES)])
    chunks = chunks.reshape(-1, CHUNK_NBYTES)
    assert xxh3_chunks(chunks).tolist() == [xxhash.xxh3_64_intdigest(chunk.tobytes()) for chunk in chunks]


@pytest.mark.parametrize("size", SIZES)
def test_checksum_equals_its_definition(backend: Backend, size: int) -> None:
    data = noise(size)
    assert checksum(backend, data, (5, MASK)) == expected_checksum(data.tobytes(), 5, MASK)


@pytest.mark.parametrize(("size", "value"), GOLDEN.items())
def test_checksum_keeps_its_golden_values(backend: Backend, size: int, value: int) -> None:
    assert checksum(backend, ramp(size)) == value


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1, 64])
def test_checksum_does_not_depend_on_threads_or_alignment(backend: Backend, num_threads: int, offset: int) -> None:
    data = noise(3 << 20)
    held = np.empty(len(data) + 128, dtype=np.uint8)
    view = held[offset : offset + len(data)]
    view[:] = data
    assert checksum(backend, view, num_threads=num_threads) == expected_checksum(data.tobytes(), 1, 2)


@settings(max_examples=60, deadline=None)
@given(
    num_pieces=st.integers(1, 12),
    piece_nbytes=st.sampled_from([1, 3, 64, 1000, 2048, 4095, 4096, 4097, 6144, 8192, 12289]),
    seed=st.integers(0, 1000),
)
def test_checksum_reads_pieces_as_one_stream(backend: Backend, num_pieces: int, piece_nbytes: int, seed: int) -> None:
    held = noise(num_pieces * (piece_nbytes + 7), seed)
    starts = np.random.default_rng(seed).permutation(num_pieces) * (piece_nbytes + 7)
    stream = b"".join(held[start : start + piece_nbytes].tobytes() for start in starts)
    result = backend.checksum_blocks(
        words(held.ctypes.data), starts.astype(np.uint64), piece_nbytes, words(9, 9).reshape(1, 2)
    )
    assert result.tolist() == [expected_checksum(stream, 9, 9)]


@pytest.mark.parametrize("size", [1, 64, 4096, 4097, 16384])
def test_every_kind_of_bit_flip_changes_the_checksum(backend: Backend, size: int) -> None:
    data = noise(size)
    clean = checksum(backend, data)
    for bit in sorted({0, 7, 8 * size - 1, *np.random.default_rng(2).integers(0, 8 * size, 200).tolist()}):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum(backend, data) != clean, f"bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
    assert checksum(backend, data) == clean


def test_checksum_tells_padding_from_zeros(backend: Backend) -> None:
    sums = {checksum(backend, np.zeros(size, dtype=np.uint8)) for size in (1, 2, 4095, 4096, 4097, 8192)}
    assert len(sums) == 6


def test_checksum_tells_swapped_chunks(backend: Backend) -> None:
    data = noise(2 * CHUNK_NBYTES)
    assert checksum(backend, data) != checksum(backend, np.roll(data, CHUNK_NBYTES))


def test_checksum_depends_on_both_words_of_the_hash(backend: Backend) -> None:
    data = noise(100)
    assert len({checksum(backend, data, hashes) for hashes in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_checksums_of_many_blocks_stand_in_order(backend: Backend) -> None:
    data = noise(7 * 5000).reshape(7, 5000)
    hashes = np.arange(14, dtype=np.uint64).reshape(7, 2)
    blocks = data.ctypes.data + np.arange(7, dtype=np.uint64) * np.uint64(5000)
    sums = backend.checksum_blocks(blocks, words(0), 5000, hashes, num_threads=2)
    assert sums.tolist() == [
        expected_checksum(row.tobytes(), *hash_words) for row, hash_words in zip(data, hashes.tolist(), strict=True)
    ]


def test_checksum_of_no_blocks_and_of_no_pieces(backend: Backend) -> None:
    none = words()
    assert backend.checksum_blocks(none, words(0), 8, np.empty((0, 2), np.uint64)).shape == (0,)
    empty = backend.checksum_blocks(words(0), none, 8, words(1, 2).reshape(1, 2))
    assert empty.tolist() == [expected_checksum(b"", 1, 2)]


def test_checksum_refuses_wrong_arguments(backend: Backend) -> None:
    hashes = words(1, 2).reshape(1, 2)
    with pytest.raises(LayoutError, match=r"blocks must be a one-dimensional uint64 array.*dtype int64"):
        backend.checksum_blocks(np.zeros(1, np.int64), words(0), 8, hashes)
    with pytest.raises(LayoutError, match=r"pieces must be .* got list"):
        backend.checksum_blocks(words(0), [0], 8, hashes)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="piece_nbytes is 0"):
        backend.checksum_blocks(words(0), words(0), 0, hashes)
    with pytest.raises(HashFormatError, match="hashes has 1 entries, need 2"):
        backend.checksum_blocks(words(0, 0), words(0), 8, hashes)
