# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Copies and checksums of block batches in C++ (``copy_engine.hpp``): streaming stores, XXH3 fused with the copy.

The kernel is chosen once by what the processor supports; ``KVBM_CPU=baseline|avx2|avx512`` lowers the choice. Every
call releases the GIL while bytes move. See the pure twin for the contract.
"""

from libc.stdint cimport uint8_t, uint64_t

cimport numpy as cnp

import operator
import os

import numpy as np

from kvbm.errors import ConfigError, length_mismatch, wrong_addresses, wrong_num_threads, wrong_piece_nbytes
from kvbm.types import hash_array

cnp.import_array()

cdef extern from "copy_kernel.hpp" namespace "kvbm" nogil:
    cdef cppclass CopyKernel:
        const char* name
    const CopyKernel& copy_kernel() except +
    const char* cpu_feature_names() except +

cdef extern from "copy_engine.hpp" namespace "kvbm" nogil:
    cdef cppclass CopyJob:
        const uint64_t* sources
        const uint64_t* destinations
        const uint64_t* source_pieces
        const uint64_t* destination_pieces
        const uint64_t* hashes
        uint64_t* checksums
        size_t num_blocks
        size_t num_pieces
        size_t piece_nbytes
    void run_copy_job(const CopyJob& job, int num_threads) except +
    void run_memcpy_job(const CopyJob& job)

if os.environ.get("KVBM_CPU", "avx512") not in ("baseline", "avx2", "avx512"):
    raise ConfigError(f"KVBM_CPU={os.environ['KVBM_CPU']!r} is not known, use baseline, avx2 or avx512, or unset it")

cdef enum:
    MAX_THREADS = 64


def copy_blocks(source_blocks, destination_blocks, source_pieces, destination_pieces, piece_nbytes, *,
                hashes=None, num_threads=1):
    """Copy blocks between addresses, with their checksums when hashes are given; see the pure twin."""
    sources, destinations, from_pieces, to_pieces = _copy_arguments(
        source_blocks, destination_blocks, source_pieces, destination_pieces
    )
    cdef CopyJob job = _job(sources, from_pieces, piece_nbytes)
    cdef int threads = _num_threads(num_threads)
    job.destinations = _words(destinations)
    job.destination_pieces = _words(to_pieces)
    keys, checksums = None, None
    if hashes is not None:
        keys = _hashes(hashes, job.num_blocks)
        checksums = np.zeros(job.num_blocks, dtype=np.uint64)
        job.hashes = _words(keys)
        job.checksums = <uint64_t*>cnp.PyArray_DATA(checksums)
    with nogil:
        run_copy_job(job, threads)
    return checksums


def checksum_blocks(blocks, pieces, piece_nbytes, hashes, *, num_threads=1):
    """Give the checksums of blocks where they lie; see the pure twin."""
    sources = _addresses("blocks", blocks)
    from_pieces = _addresses("pieces", pieces)
    cdef CopyJob job = _job(sources, from_pieces, piece_nbytes)
    cdef int threads = _num_threads(num_threads)
    keys = _hashes(hashes, job.num_blocks)
    checksums = np.zeros(job.num_blocks, dtype=np.uint64)
    job.hashes = _words(keys)
    job.checksums = <uint64_t*>cnp.PyArray_DATA(checksums)
    with nogil:
        run_copy_job(job, threads)
    return checksums


def memcpy_blocks(source_blocks, destination_blocks, source_pieces, destination_pieces, piece_nbytes):
    """Copy blocks with a plain loop of libc memcpy: the figure that benchmarks compare with."""
    sources, destinations, from_pieces, to_pieces = _copy_arguments(
        source_blocks, destination_blocks, source_pieces, destination_pieces
    )
    cdef CopyJob job = _job(sources, from_pieces, piece_nbytes)
    job.destinations = _words(destinations)
    job.destination_pieces = _words(to_pieces)
    with nogil:
        run_memcpy_job(job)


def cpu_features():
    """Name the instruction sets that were found; the last one is what the kernel uses."""
    return tuple(cpu_feature_names().decode().split())


def kernel():
    """Name the kernel in use."""
    return copy_kernel().name.decode()


def _copy_arguments(source_blocks, destination_blocks, source_pieces, destination_pieces):
    sources = _addresses("source_blocks", source_blocks)
    destinations = _addresses("destination_blocks", destination_blocks)
    from_pieces = _addresses("source_pieces", source_pieces)
    to_pieces = _addresses("destination_pieces", destination_pieces)
    if destinations.size != sources.size:
        raise wrong_addresses("destination_blocks", f"{destinations.size} entries for {sources.size} source_blocks")
    if to_pieces.size != from_pieces.size:
        raise wrong_addresses("destination_pieces", f"{to_pieces.size} entries for {from_pieces.size} source_pieces")
    return sources, destinations, from_pieces, to_pieces


def _addresses(name, array):
    if not isinstance(array, np.ndarray):
        raise wrong_addresses(name, type(array).__name__)
    if array.ndim != 1 or array.dtype != np.uint64:
        raise wrong_addresses(name, f"shape {array.shape} and dtype {array.dtype}")
    return np.ascontiguousarray(array)


def _hashes(hashes, num_blocks):
    keys = hash_array(hashes)
    if len(keys) != num_blocks:
        raise length_mismatch("hashes", len(keys), num_blocks)
    return keys


cdef const uint64_t* _words(cnp.ndarray array) noexcept:
    return <const uint64_t*>cnp.PyArray_DATA(array)


cdef int _num_threads(num_threads) except -1:
    if operator.index(num_threads) < 1:
        raise wrong_num_threads(num_threads)
    return min(num_threads, MAX_THREADS)


cdef CopyJob _job(cnp.ndarray sources, cnp.ndarray pieces, piece_nbytes) except *:
    cdef CopyJob job
    if operator.index(piece_nbytes) < 1:
        raise wrong_piece_nbytes(piece_nbytes)
    job.sources = _words(sources)
    job.destinations = NULL
    job.source_pieces = _words(pieces)
    job.destination_pieces = NULL
    job.hashes = NULL
    job.checksums = NULL
    job.num_blocks = sources.size
    job.num_pieces = pieces.size
    job.piece_nbytes = piece_nbytes
    return job
