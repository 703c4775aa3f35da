# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Positional reads and writes in batches (``disk_queue.hpp``), by threads or by an io_uring, without the GIL.

A queue keeps the memory of a batch alive until its last byte has stopped; dropping the queue waits for that. A forked
child gets a queue that refuses everything and leaves the parent's alone.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport unique_ptr
from libcpp.utility cimport move
from libcpp.vector cimport vector

cimport cython
cimport numpy as cnp

import errno
import operator
import os

import numpy as np

from kvbm.errors import ConfigError, PoolClosed, StorageError, wrong_num_threads

cnp.import_array()

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef extern from "disk_queue.hpp" namespace "kvbm" nogil:
    cdef cppclass DiskBatch
    cdef cppclass DiskOperation:
        DiskBatch* batch
        int64_t offset
        int64_t nbytes
        iovec* buffers
        int num_buffers
        int64_t moved
        int error
    cdef cppclass DiskBatch:
        uint64_t token
        cpp_bool is_read
        int64_t block_nbytes
        int64_t slot_nbytes
        vector[iovec] buffers
        vector[DiskOperation] operations
        int64_t num_calls
    cdef enum Kind "kvbm::DiskQueue::Kind":
        THREADS "kvbm::DiskQueue::THREADS"
        URING "kvbm::DiskQueue::URING"
    cdef cppclass CppDiskQueue "kvbm::DiskQueue":
        CppDiskQueue(int fd, Kind kind, int depth, int num_threads) except +
        int open() except +
        int submit(unique_ptr[DiskBatch] batch, cpp_bool is_again) except +
        cpp_bool cancel(uint64_t token) except +
        cpp_bool wait(double seconds, vector[unique_ptr[DiskBatch]]* ended) except +
        void close() except +
        void pause(cpp_bool is_paused) except +
        void inject(const vector[int64_t]& answers) except +
        uint64_t last_token() except +
        size_t num_waiting() except +

cdef enum:
    MAX_DEPTH = 1024
    MAX_BUFFERS = 1024  # the kernel's limit for one call


@cython.no_gc_clear
cdef class DiskQueue:
    """Batches of reads and writes of one file.

    Parameters
    ----------
    fd : int
        Stays open for as long as the queue lives.
    kind : {"threads", "uring"}
        Threads that call preadv and pwritev, or one thread with an io_uring.
    depth : int
        Operations under way at most, 1 to 1024.
    num_threads : int
        Of kind "threads", started as they are needed.

    Raises
    ------
    ConfigError
        An impossible setting.
    StorageError
        With errno: an io_uring cannot be had here.

    Notes
    -----
    Reads go before writes that wait; after 16 reads in a row a waiting write goes. Short counts are continued, EINTR
    and EAGAIN tried again; an operation that gets no further, or meets the end of the file, ends with EIO.
    """

    cdef CppDiskQueue* _queue
    cdef dict _held  # token -> what must outlive the batch
    cdef int _pid
    cdef readonly str kind

    def __cinit__(self, fd, *, kind, depth=32, num_threads=4):
        if kind not in ("threads", "uring"):
            raise ConfigError(f"kind {kind!r} is not known, use threads or uring")
        if not 1 <= operator.index(depth) <= MAX_DEPTH:
            raise ConfigError(f"depth is {depth}, give 1 to {MAX_DEPTH} operations")
        if operator.index(num_threads) < 1:
            raise wrong_num_threads(num_threads)
        self.kind = kind
        self._held = {}
        self._pid = getpid()
        self._queue = new CppDiskQueue(
            operator.index(fd), URING if kind == "uring" else THREADS, depth, min(num_threads, MAX_DEPTH)
        )
        cdef int code
        with nogil:
            code = self._queue.open()
        if code:
            raise StorageError(code, f"cannot set up an io_uring: {os.strerror(code).lower()}")

    def __dealloc__(self):
        # The parent's threads are not in a forked child: its copy of the queue can be neither used nor taken apart.
        if self._queue == NULL or self._pid != getpid():
            return
        with nogil:
            del self._queue

    @property
    def last_token(self):
        """The token of the batch that was taken last; 0 before the first."""
        self._refuse_child()
        return self._queue.last_token()

    @property
    def num_waiting(self):
        """Operations that have not begun."""
        self._refuse_child()
        return self._queue.num_waiting()

    def submit(
        self, token, is_read, offsets, num_buffers, addresses, lengths, memory, *, block_nbytes=0, slot_nbytes=0,
        is_again=False
    ):
        """Queue a batch; returns at once.

        Parameters
        ----------
        token : int
            Names the batch until `wait` gives it.
        is_read : bool
        offsets : (num_operations,) int64, host
            Where each operation begins in the file, bytes.
        num_buffers : (num_operations,) int64, host
            How many buffers each one takes, 1 to 1024.
        addresses, lengths : (sum of num_buffers,) uint64, host
            The buffers in order: addresses, and bytes of each.
        memory : object
            Kept alive until the batch has ended.
        block_nbytes, slot_nbytes : int
            Where given, every buffer is a block of block_nbytes that moves through an aligned buffer of the queue, a
            slot of slot_nbytes for each, what follows a block zeroed. At most four such operations are under way.
        is_again : bool
            A batch that `wait` gave last is submitted again, changed: this may be done after `close`.

        Raises
        ------
        StorageError
            Arrays that do not fit, a token in use, or no thread could be started. Nothing was queued.
        PoolClosed
            The queue is closed.
        """
        self._refuse_child()
        cdef cnp.ndarray file_offsets = _array("offsets", offsets, np.int64)
        cdef cnp.ndarray counts = _array("num_buffers", num_buffers, np.int64)
        cdef cnp.ndarray starts = _array("addresses", addresses, np.uint64)
        cdef cnp.ndarray sizes = _array("lengths", lengths, np.uint64)
        cdef size_t n = file_offsets.size
        cdef size_t num_all = starts.size
        if <size_t>counts.size != n or <size_t>sizes.size != num_all:
            raise _wrong(f"{counts.size} num_buffers for {n} offsets, {sizes.size} lengths for {num_all} addresses")
        cdef unique_ptr[DiskBatch] batch
        batch.reset(new DiskBatch())
        batch.get().token = token
        batch.get().is_read = is_read
        batch.get().block_nbytes = block_nbytes
        batch.get().slot_nbytes = slot_nbytes
        _fill(batch.get(), n, num_all, <const int64_t*>cnp.PyArray_DATA(file_offsets),
              <const int64_t*>cnp.PyArray_DATA(counts), <const uint64_t*>cnp.PyArray_DATA(starts),
              <const uint64_t*>cnp.PyArray_DATA(sizes))
        if token in self._held:
            raise _wrong(f"token {token} is in use")
        self._held[token] = memory
        cdef cpp_bool is_second = is_again
        cdef int code = 0
        try:
            with nogil:
                code = self._queue.submit(move(batch), is_second)
        except BaseException:
            del self._held[token]
            raise
        if not code:
            return
        del self._held[token]
        if code == errno.EPIPE:
            raise PoolClosed("DiskQueue is closed")
        raise StorageError(code, "no thread could be started")

    def wait(self, timeout=None):
        """Sleep until batches have ended; for one thread at a time.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for as long as it takes.

        Returns
        -------
        list of (token, errnos, moved, num_calls), or None
            errnos (num_operations,) int32: 0, why the operation ended early, or ECANCELED where it never began; moved
            (num_operations,) int64: bytes from its beginning that did move; num_calls: calls that were made. None when
            the queue is closed and everything was given.
        """
        self._refuse_child()
        cdef vector[unique_ptr[DiskBatch]] ended
        cdef double seconds = -1.0 if timeout is None else max(0.0, timeout)
        cdef cpp_bool is_open
        with nogil:
            is_open = self._queue.wait(seconds, &ended)
        if not is_open:
            return None
        cdef size_t i
        answers = []
        for i in range(ended.size()):
            answer = _answer(ended[i].get())
            self._held.pop(answer[0], None)
            answers.append(answer)
        return answers

    def cancel(self, token):
        """Drop what has not begun of a batch: it ends with ECANCELED; False when it has ended, or in a forked child."""
        return self._pid == getpid() and self._queue.cancel(token)

    def close(self):
        """Take nothing new and let what was submitted run to its end; takes no Python lock, for finalisers."""
        if self._pid == getpid():
            self._queue.close()

    def pause(self):
        """Begin nothing, for tests."""
        self._refuse_child()
        self._queue.pause(True)

    def resume(self):
        """Begin again."""
        self._refuse_child()
        self._queue.pause(False)

    def inject(self, answers):
        """Answer the next calls in the kernel's place, for tests: numbers of bytes at most, or negative errnos."""
        self._refuse_child()
        cdef vector[int64_t] values = answers
        self._queue.inject(values)

    cdef int _refuse_child(self) except -1:
        if self._pid != getpid():
            raise StorageError(errno.EPERM, f"this queue belongs to process {self._pid}: a forked process opens its own")
        return 0


cdef int _fill(
    DiskBatch* batch, size_t n, size_t num_all, const int64_t* offsets, const int64_t* counts,
    const uint64_t* addresses, const uint64_t* lengths
) except -1:
    """Check what a batch is made of, and copy it."""
    cdef size_t i, first = 0
    cdef int64_t j
    cdef DiskOperation operation
    cdef iovec buffer
    if batch.slot_nbytes and not 0 < batch.block_nbytes <= batch.slot_nbytes:
        raise _wrong(f"blocks of {batch.block_nbytes} bytes in slots of {batch.slot_nbytes}")
    for i in range(num_all):
        if not lengths[i] or (batch.slot_nbytes and <int64_t>lengths[i] != batch.block_nbytes):
            raise _wrong(f"buffer {i} of {lengths[i]} bytes")
        # An address that the caller got from numpy: its memory is held for as long as the batch lives.
        buffer.iov_base = <void*>addresses[i]
        buffer.iov_len = <size_t>lengths[i]
        batch.buffers.push_back(buffer)
    for i in range(n):
        if not 1 <= counts[i] <= MAX_BUFFERS or first + <size_t>counts[i] > num_all or offsets[i] < 0:
            raise _wrong(f"operation {i} at {offsets[i]} with {counts[i]} buffers")
        operation.batch = batch
        operation.offset = offsets[i]
        operation.buffers = batch.buffers.data() + first
        operation.num_buffers = <int>counts[i]
        operation.nbytes = counts[i] * batch.slot_nbytes
        for j in range(0 if batch.slot_nbytes else counts[i]):
            operation.nbytes += <int64_t>operation.buffers[j].iov_len
        batch.operations.push_back(operation)
        first += <size_t>counts[i]
    if first != num_all:
        raise _wrong(f"{num_all} buffers, {first} of them in operations")
    return 0


cdef tuple _answer(DiskBatch* batch):
    cdef size_t n = batch.operations.size(), i
    cdef cnp.ndarray errnos = np.empty(n, dtype=np.int32)
    cdef cnp.ndarray moved = np.empty(n, dtype=np.int64)
    cdef int32_t* codes = <int32_t*>cnp.PyArray_DATA(errnos)
    cdef int64_t* counts = <int64_t*>cnp.PyArray_DATA(moved)
    for i in range(n):
        codes[i] = batch.operations[i].error
        counts[i] = batch.operations[i].moved
    return batch.token, errnos, moved, batch.num_calls


def _array(name, array, dtype):
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise _wrong(f"{name} is no one-dimensional {np.dtype(dtype).name} array")
    return np.ascontiguousarray(array)


def _wrong(what):
    return StorageError(errno.EINVAL, f"this batch is impossible: {what}")
