"""Copies and checksums of block batches in NumPy: the reference that the native twin is held to.

Addresses are integers; the caller vouches that every piece lies in memory that lives and is writable where it is
written, and that sources and destinations do not overlap. No lock and no state.
"""

from __future__ import annotations

import ctypes
import operator

import numpy as np
import numpy.typing as npt

from kvbm.errors import length_mismatch, wrong_addresses, wrong_num_threads, wrong_piece_nbytes
from kvbm.types import HashArray, hash_array

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

CHUNK_NBYTES = 4096

# XXH3's constants (xxHash specification, doc/xxhash_spec.md).
_PRIME32_1 = np.uint64(0x9E3779B1)
_PRIME64_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_MX = np.uint64(0x165667919E3779F9)
_INITIAL = np.array(
    [
        0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
        0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
    ],
    dtype=np.uint64,
)  # fmt: skip
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_LOW_HALF = np.uint64(0xFFFFFFFF)


def _secret_words(offset: int, count: int = 8) -> Words:
    return np.frombuffer(_SECRET, dtype="<u8", count=count, offset=offset)


_STRIPE_KEYS = [_secret_words(8 * stripe) for stripe in range(16)]
_LAST_KEY = _secret_words(121)  # 192 - 64 - 7
_SCRAMBLE_KEY = _secret_words(128)  # 192 - 64
_MERGE_KEY = _secret_words(11)
_PAIR_SWAP = [1, 0, 3, 2, 5, 4, 7, 6]


def copy_blocks(
    source_blocks: Words,
    destination_blocks: Words,
    source_pieces: Words,
    destination_pieces: Words,
    piece_nbytes: int,
    *,
    hashes: HashArray | None = None,
    num_threads: int = 1,
) -> Words | None:
    """Copy blocks between addresses, with their checksums when hashes are given.

    Piece j of block i is copied from ``source_blocks[i] + source_pieces[j]`` to
    ``destination_blocks[i] + destination_pieces[j]``.

    Parameters
    ----------
    source_blocks, destination_blocks : (num_blocks,) uint64, host
        Addresses of the blocks.
    source_pieces, destination_pieces : (num_pieces,) uint64, host
        Byte offsets of a block's pieces, in the block's logical order.
    piece_nbytes : int
        Bytes in a piece.
    hashes : (num_blocks, 2) uint64, optional
        Sequence hashes; with them the checksums of the copied bytes are given.
    num_threads : int
        At most so many threads share the work; the pure twin uses one.

    Returns
    -------
    (num_blocks,) uint64 or None
        `checksum_blocks` of the sources, None without hashes.

    Raises
    ------
    LayoutError
        Arrays of another type, shape or length than described, or `piece_nbytes` below 1.
    HashFormatError
        Hashes that are none, or not one for each block.
    ConfigError
        `num_threads` below 1.

    Notes
    -----
    Blocks until all bytes have arrived. The native twin releases the GIL.
    """
    sources, from_pieces = _addresses("source_blocks", source_blocks), _addresses("source_pieces", source_pieces)
    destinations = _addresses("destination_blocks", destination_blocks)
    to_pieces = _addresses("destination_pieces", destination_pieces)
    if len(destinations) != len(sources):
        raise wrong_addresses("destination_blocks", f"{len(destinations)} entries for {len(sources)} source_blocks")
    if len(to_pieces) != len(from_pieces):
        raise wrong_addresses("destination_pieces", f"{len(to_pieces)} entries for {len(from_pieces)} source_pieces")
    _check_counts(piece_nbytes, num_threads)
    keys = None if hashes is None else _hashes(hashes, len(sources))
    checksums = None if keys is None else np.zeros(len(sources), dtype=np.uint64)
    for i in range(len(sources)):
        data = _gather(sources[i], from_pieces, piece_nbytes)
        for start, piece in zip((destinations[i] + to_pieces).tolist(), data, strict=True):
            _bytes_at(start, piece_nbytes)[:] = piece
        if keys is not None and checksums is not None:
            checksums[i] = _checksum(data.reshape(-1), keys[i])
    return checksums


def checksum_blocks(
    blocks: Words, pieces: Words, piece_nbytes: int, hashes: HashArray, *, num_threads: int = 1
) -> Words:
    """Give the checksums of blocks where they lie.

    Parameters
    ----------
    blocks : (num_blocks,) uint64, host
        Addresses of the blocks.
    pieces : (num_pieces,) uint64, host
        Byte offsets of a block's pieces, in the block's logical order.
    piece_nbytes : int
        Bytes in a piece.
    hashes : (num_blocks, 2) uint64
        Sequence hashes, mixed into the checksums.
    num_threads : int
        At most so many threads share the work; the pure twin uses one.

    Returns
    -------
    (num_blocks,) uint64

    Raises
    ------
    LayoutError, HashFormatError, ConfigError
        As `copy_blocks`.

    Notes
    -----
    A block's bytes in logical order are cut into chunks of 4 KiB, the last one padded with zeros. With
    ``total = sum(avalanche(xxh3_64(chunk[i]) + i * P1)) + nbytes``, the padding not counted, the checksum is
    ``avalanche(avalanche(total) ^ avalanche(hash[0] + hash[1] * P1))``, all modulo 2**64.
    """
    sources, from_pieces = _addresses("blocks", blocks), _addresses("pieces", pieces)
    _check_counts(piece_nbytes, num_threads)
    keys = _hashes(hashes, len(sources))
    checksums = np.zeros(len(sources), dtype=np.uint64)
    for i in range(len(sources)):
        checksums[i] = _checksum(_gather(sources[i], from_pieces, piece_nbytes).reshape(-1), keys[i])
    return checksums


def cpu_features() -> tuple[str, ...]:
    """Name the instruction sets in use; NumPy chooses its own."""
    return ("numpy",)


def kernel() -> str:
    """Name the kernel in use."""
    return "numpy"


def xxh3_chunks(chunks: Bytes) -> Words:
    """Give XXH3-64 (seed 0, default secret) of each 4 KiB chunk.

    Parameters
    ----------
    chunks : (num_chunks, 4096) uint8, C-contiguous

    Returns
    -------
    (num_chunks,) uint64
    """
    # (num_chunks, 4 blocks, 16 stripes, 8 lanes)
    lanes = chunks.view("<u8").reshape(-1, 4, 16, 8)
    sums = np.tile(_INITIAL, (len(lanes), 1))
    for block in range(4):
        for stripe in range(16):
            is_last = block == 3 and stripe == 15
            data = lanes[:, block, stripe]
            keyed = data ^ (_LAST_KEY if is_last else _STRIPE_KEYS[stripe])
            sums += data[:, _PAIR_SWAP] + (keyed & _LOW_HALF) * (keyed >> np.uint64(32))
        if block < 3:
            sums = (sums ^ (sums >> np.uint64(47)) ^ _SCRAMBLE_KEY) * _PRIME32_1
    keyed = sums ^ _MERGE_KEY
    folded = _fold_product(keyed[:, 0::2], keyed[:, 1::2])
    return _avalanche(folded.sum(axis=1, dtype=np.uint64) + np.uint64(CHUNK_NBYTES * int(_PRIME64_1) % 2**64))


def _fold_product(a: Words, b: Words) -> Words:
    """Multiply to 128 bits and xor the halves."""
    half = np.uint64(32)
    a_low, a_high, b_low, b_high = a & _LOW_HALF, a >> half, b & _LOW_HALF, b >> half
    low = a_low * b_low
    middle = a_high * b_low + (low >> half)
    cross = a_low * b_high + (middle & _LOW_HALF)
    high = a_high * b_high + (middle >> half) + (cross >> half)
    folded: Words = high ^ (a * b)
    return folded


def _avalanche(value: Words) -> Words:
    mixed: Words = (value ^ (value >> np.uint64(37))) * _PRIME_MX
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _checksum(data: Bytes, key: Words) -> np.uint64:
    """Give the checksum of one block's bytes."""
    num_chunks = -(-len(data) // CHUNK_NBYTES)
    chunks = np.zeros((num_chunks, CHUNK_NBYTES), dtype=np.uint8)
    chunks.reshape(-1)[: len(data)] = data
    mixed = _avalanche(xxh3_chunks(chunks) + np.arange(num_chunks, dtype=np.uint64) * _PRIME64_1)
    total = mixed.sum(dtype=np.uint64, keepdims=True) + np.uint64(len(data))
    name = _avalanche(key[:1] + key[1:] * _PRIME64_1)
    result: np.uint64 = _avalanche(_avalanche(total) ^ name)[0]
    return result


def _gather(block: np.uint64, pieces: Words, piece_nbytes: int) -> Bytes:
    """Read a block's pieces: (num_pieces, piece_nbytes)."""
    data = np.empty((len(pieces), piece_nbytes), dtype=np.uint8)
    for row, start in zip(data, (block + pieces).tolist(), strict=True):
        row[:] = _bytes_at(start, piece_nbytes)
    return data


def _bytes_at(address: int, nbytes: int) -> Bytes:
    # `from_address` keeps nothing alive: the caller's promise.
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memoryview(memory).cast("B"), dtype=np.uint8)


def _addresses(name: str, array: Words) -> Words:
    if not isinstance(array, np.ndarray):
        raise wrong_addresses(name, type(array).__name__)
    if array.ndim != 1 or array.dtype != np.uint64:
        raise wrong_addresses(name, f"shape {array.shape} and dtype {array.dtype}")
    return array


def _hashes(hashes: HashArray, num_blocks: int) -> HashArray:
    keys = hash_array(hashes)
    if len(keys) != num_blocks:
        raise length_mismatch("hashes", len(keys), num_blocks)
    return keys


def _check_counts(piece_nbytes: int, num_threads: int) -> None:
    if operator.index(piece_nbytes) < 1:
        raise wrong_piece_nbytes(piece_nbytes)
    if operator.index(num_threads) < 1:
        raise wrong_num_threads(num_threads)
