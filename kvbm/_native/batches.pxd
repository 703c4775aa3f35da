# Batches of ids, hashes and flags as NumPy arrays, made and taken apart without a Python call.

from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool as cbool

cimport numpy as cnp

from kvbm._native.store_core cimport Hash


cdef inline int64_t _len(cnp.ndarray batch) noexcept:
    return cnp.PyArray_DIM(batch, 0)


cdef inline int32_t* _ids(cnp.ndarray batch) noexcept:
    return <int32_t*>cnp.PyArray_DATA(batch)


cdef inline Hash* _hashes(cnp.ndarray batch) noexcept:
    return <Hash*>cnp.PyArray_DATA(batch)


cdef inline cbool* _mask(cnp.ndarray batch) noexcept:
    return <cbool*>cnp.PyArray_DATA(batch)


cdef inline cnp.ndarray _new_ids(int64_t n):
    cdef cnp.npy_intp[1] shape = [n]
    return cnp.PyArray_SimpleNew(1, shape, cnp.NPY_INT32)


cdef inline cnp.ndarray _new_mask(int64_t n):
    cdef cnp.npy_intp[1] shape = [n]
    return cnp.PyArray_SimpleNew(1, shape, cnp.NPY_BOOL)


cdef inline cnp.ndarray _new_hashes(int64_t n):
    cdef cnp.npy_intp[2] shape = [n, 2]
    return cnp.PyArray_SimpleNew(2, shape, cnp.NPY_UINT64)


cdef inline cbool _is_hash_batch(object hashes):
    """Whether hashes are a contiguous (n, 2) uint64 array already."""
    return (cnp.PyArray_CheckExact(hashes) and cnp.PyArray_TYPE(hashes) == cnp.NPY_UINT64
            and cnp.PyArray_NDIM(hashes) == 2 and cnp.PyArray_DIM(hashes, 1) == 2
            and cnp.PyArray_ISCARRAY_RO(hashes))


cdef inline cbool _is_id_batch(object ids):
    """Whether ids are a contiguous (n,) int32 array already."""
    return (cnp.PyArray_CheckExact(ids) and cnp.PyArray_TYPE(ids) == cnp.NPY_INT32 and cnp.PyArray_NDIM(ids) == 1
            and cnp.PyArray_ISCARRAY_RO(ids))
