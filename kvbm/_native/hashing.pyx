# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""BLAKE2b and chains of sequence hashes in C++ (``blake2b.hpp``), the key compressed once for a whole chain."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint8_t

cimport numpy as cnp

import operator

import numpy as np

from kvbm.errors import wrong_hash_input, wrong_token_batch

cnp.import_array()

cdef extern from "blake2b.hpp" namespace "kvbm" nogil:
    cdef cppclass Blake2b:
        void init(int digest_size, const uint8_t* key, int key_size, const uint8_t* person, int person_size)
        void flush_for_more()
        void update(const uint8_t* data, size_t nbytes)
        void finish(uint8_t* digest)
        void chain(const uint8_t* parent, const uint8_t* data, size_t nbytes, const uint8_t* extra,
                   size_t extra_nbytes, uint8_t* digest) const

cdef enum:
    HASH_NBYTES = 16
    RELEASE_GIL_BLOCKS = 1024  # below this a hand-over between threads costs more than the hashing


def blake2b(data, *, digest_size, key=b"", person=b""):
    """Hash bytes with BLAKE2b (RFC 7693); see the pure twin."""
    for name, value, limit in (("data", data, None), ("key", key, 64), ("person", person, 16)):
        if not isinstance(value, bytes):
            raise wrong_hash_input(name, "bytes", type(value).__name__)
        if limit is not None and len(value) > limit:
            raise wrong_hash_input(name, f"0 to {limit} bytes", f"{len(value)}")
    if not 1 <= operator.index(digest_size) <= 64:
        raise wrong_hash_input("digest_size", "1 to 64 bytes", f"{digest_size}")
    cdef Blake2b state
    cdef uint8_t[64] digest
    cdef int num_digest = digest_size
    state.init(num_digest, _bytes_of(key), <int>len(key), _bytes_of(person), <int>len(person))
    state.update(_bytes_of(data), <size_t>len(data))
    state.finish(&digest[0])
    return (<const char*>&digest[0])[:num_digest]


def hash_blocks(key, parent, tokens, block_size, extras=None):
    """Hash a run of full blocks, each with the hash of the one before; see the pure twin."""
    if extras is not None:
        extras = tuple(extras)  # cannot change while other threads run
    cdef Py_ssize_t num_blocks = _count_blocks(key, parent, tokens, block_size, extras)
    cdef cnp.ndarray token_array = tokens
    cdef cnp.ndarray hashes = np.empty((num_blocks, 2), dtype=np.uint64)
    cdef uint8_t* out = <uint8_t*>cnp.PyArray_DATA(hashes)
    if num_blocks == 0:
        return hashes
    cdef const uint8_t* data = <const uint8_t*>cnp.PyArray_DATA(token_array)
    cdef const uint8_t* first_parent = _bytes_of(parent)
    cdef size_t block_nbytes = 4 * <size_t>block_size
    cdef Blake2b keyed
    keyed.init(HASH_NBYTES, _bytes_of(key), <int>len(key), NULL, 0)
    keyed.flush_for_more()

    cdef bytes joined
    cdef cnp.ndarray ends
    cdef const uint8_t* extra_data = NULL
    cdef const int64_t* extra_ends = NULL
    if extras is not None:
        joined = b"".join(extras)
        ends = np.cumsum(np.fromiter(map(len, extras), dtype=np.int64, count=num_blocks), dtype=np.int64)
        extra_data = _bytes_of(joined)
        extra_ends = <const int64_t*>cnp.PyArray_DATA(ends)
    if num_blocks > RELEASE_GIL_BLOCKS:
        with nogil:
            _hash_chain(keyed, first_parent, data, block_nbytes, num_blocks, extra_data, extra_ends, out)
    else:
        _hash_chain(keyed, first_parent, data, block_nbytes, num_blocks, extra_data, extra_ends, out)
    return hashes


def _count_blocks(key, parent, tokens, block_size, extras):
    """Check the arguments and count the blocks; the pure twin has the same function."""
    if not isinstance(tokens, np.ndarray):
        raise wrong_token_batch(f"tokens in a {type(tokens).__name__}")
    if tokens.dtype != np.uint32 or tokens.ndim != 1 or not tokens.flags.c_contiguous:
        raise wrong_token_batch(f"tokens of shape {tokens.shape} and dtype {tokens.dtype}")
    if operator.index(block_size) < 1 or len(tokens) % block_size:
        raise wrong_token_batch(f"{len(tokens)} tokens in blocks of {block_size}")
    if not isinstance(key, bytes) or not isinstance(parent, bytes):
        raise wrong_token_batch(f"a key in a {type(key).__name__} and a parent in a {type(parent).__name__}")
    if len(parent) != HASH_NBYTES or not 1 <= len(key) <= 64:
        raise wrong_token_batch(f"a key of {len(key)} and a parent of {len(parent)} bytes")
    num_blocks = len(tokens) // block_size
    if extras is not None:
        if len(extras) != num_blocks:
            raise wrong_token_batch(f"{len(extras)} extras for {num_blocks} blocks")
        for extra in extras:
            if not isinstance(extra, bytes):
                raise wrong_token_batch(f"an extra in a {type(extra).__name__}")
    return num_blocks


cdef const uint8_t* _bytes_of(object value) noexcept:
    """The data of a bytes object or of a subclass, as `isinstance` has found it to be."""
    return <const uint8_t*>PyBytes_AS_STRING(value)


cdef void _hash_chain(const Blake2b& keyed, const uint8_t* parent, const uint8_t* data, size_t block_nbytes,
                      Py_ssize_t num_blocks, const uint8_t* extra_data, const int64_t* extra_ends,
                      uint8_t* out) noexcept nogil:
    """Hash each block into `out`, from where the next block reads its parent; `extra_ends` NULL means no extras."""
    cdef Py_ssize_t i
    cdef int64_t start = 0, end = 0
    for i in range(num_blocks):
        if extra_ends != NULL:
            start, end = end, extra_ends[i]
        keyed.chain(parent, data + i * block_nbytes, block_nbytes, extra_data + start, <size_t>(end - start), out)
        parent = out
        out += HASH_NBYTES
