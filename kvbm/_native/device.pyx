# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Devices, streams, events and copies over the C interface ``cuda/kvbm_cuda.h``.

Built twice from this source: ``device`` calls CUDA, ``simulated_device`` a simulation on the CPU that tests steer by
``simulation``. Addresses and handles are integers; who asks for memory gives it back. Every call releases the GIL, and
all are thread-safe. A call that fails raises DeviceError; a process forked from one that uses a device gets an error
from every call, and its destructors touch nothing.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset
from libcpp.vector cimport vector

cimport numpy as cnp

import operator

import numpy as np

from kvbm.errors import ConfigError, DeviceError, length_mismatch, wrong_addresses, wrong_piece_nbytes
from kvbm.types import hash_array

cnp.import_array()

cdef extern from "steering.h" nogil:
    int KVBM_IS_SIMULATED

include "device_interface.pxi"

PATHS = ("memcpy", "batch", "kernel", "staged")
_KINDS = ("pageable", "pinned", "device", "managed")


include "device_arguments.pxi"
include "device_streams.pxi"
include "device_copies.pxi"


def device_count():
    """Count the devices; 0 where there is none, `why_no_device` says why.

    Raises
    ------
    DeviceError
        The process was forked from one that uses a device.
    """
    cdef kvbm_cuda_error error = _no_error()
    cdef int count = 0
    cdef int code
    with nogil:
        code = kvbm_cuda_device_count(&count, &error)
    if code == 3:  # a forked child, or a driver that will not start: both are for somebody to read
        _check(code, &error)
    return count


def why_no_device():
    """Say in one line why there is no device; empty where there is one."""
    cdef kvbm_cuda_error error = _no_error()
    cdef int count = 0, driver = 0, runtime = 0
    cdef int code
    with nogil:
        code = kvbm_cuda_device_count(&count, &error)
        kvbm_cuda_versions(&driver, &runtime, NULL)
    if code == 0 and count > 0:
        return ""
    if code == 0:
        return "the driver counts no devices"
    needed = f"{runtime // 1000}.{runtime % 1000 // 10}"
    if driver == 0 and code == 35:
        return f"there is no NVIDIA driver (built with CUDA {needed}): {error.name.decode()} ({code})"
    if code == 35:
        has = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the driver knows CUDA {has}, needs {needed}: update it: {error.name.decode()} ({code})"
    return f"{error.text.decode()}: {error.name.decode()} ({code})"


def versions():
    """Give the CUDA versions of the driver and of the runtime in this module, as 13000 for 13.0.

    Returns
    -------
    tuple of (int, int)
        The driver's is 0 where there is none.
    """
    cdef kvbm_cuda_error error = _no_error()
    cdef int driver = 0, runtime = 0
    cdef int code
    with nogil:
        code = kvbm_cuda_versions(&driver, &runtime, &error)
    _check(code, &error)
    return driver, runtime


def pointer_kind(address):
    """Say what memory an address lies in.

    Parameters
    ----------
    address : int

    Returns
    -------
    tuple of (str, int)
        "pageable", "pinned", "device" or "managed", and the device's number, -1 for pageable memory.

    Raises
    ------
    DeviceError
        The call failed.
    """
    cdef kvbm_cuda_error error = _no_error()
    cdef uint64_t at = address
    cdef int kind = 0, device = -1
    cdef int code
    with nogil:
        code = kvbm_cuda_pointer_kind(at, &kind, &device, &error)
    _check(code, &error)
    return _KINDS[kind], device


cdef class Device(_Copies):
    """One device: its properties, and what may be asked of it.

    Parameters
    ----------
    index : int
        Number of the device, from 0.

    Raises
    ------
    DeviceError
        There is no such device, or it does not answer.
    """

    cdef readonly str name
    cdef readonly str pci_bus_id
    cdef readonly tuple compute_capability
    cdef readonly object total_nbytes
    cdef readonly object l2_nbytes
    cdef readonly int num_multiprocessors
    cdef readonly int num_copy_engines
    cdef readonly tuple priorities
    cdef readonly bint can_map_host
    cdef readonly bint has_kernels
    cdef readonly bint has_batch_copy

    def __init__(self, index=0):
        cdef kvbm_cuda_error error = _no_error()
        cdef kvbm_cuda_properties properties
        cdef int number = operator.index(index)
        cdef int has_kernels = 0, has_batch_copy = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_get_properties(number, &properties, &error)
        _check(code, &error)
        with nogil:
            code = kvbm_cuda_has_kernels(number, &has_kernels, &error)
            kvbm_cuda_has_batch_copy(&has_batch_copy)
        _check(code, &error)
        self.index = number
        self.name = properties.name.decode()
        self.pci_bus_id = properties.pci_bus_id.decode()
        self.compute_capability = (properties.major, properties.minor)
        self.total_nbytes = properties.total_nbytes
        self.l2_nbytes = properties.l2_nbytes
        self.num_multiprocessors = properties.num_multiprocessors
        self.num_copy_engines = properties.num_copy_engines
        self.priorities = (properties.priority_least, properties.priority_greatest)
        self.can_map_host = properties.can_map_host != 0
        self.has_kernels = has_kernels != 0
        self.has_batch_copy = has_batch_copy != 0

    def memory_info(self):
        """Give the free and the total bytes of the device's memory.

        Raises
        ------
        DeviceError
            The call failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t free_nbytes = 0, total_nbytes = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_memory_info(self.index, &free_nbytes, &total_nbytes, &error)
        _check(code, &error)
        return free_nbytes, total_nbytes

    def allocate(self, nbytes):
        """Take device memory and give its address, a multiple of 256; `free` returns it.

        Parameters
        ----------
        nbytes : int
            1 or more.

        Raises
        ------
        ConfigError
            `nbytes` is below 1.
        DeviceError
            There is not as much left; nothing was taken.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t address = 0, size = _positive("nbytes", nbytes)
        cdef int code
        with nogil:
            code = kvbm_cuda_allocate(self.index, size, &address, &error)
        _check(code, &error)
        return address

    def free(self, address):
        """Return device memory; waits until the device is done with what was queued.

        Raises
        ------
        DeviceError
            The address is not one that `allocate` gave, or earlier work failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t at = address
        cdef int code
        with nogil:
            code = kvbm_cuda_free(self.index, at, &error)
        _check(code, &error)

    def register_host(self, address, nbytes):
        """Pin host memory, for all devices and at its own address; `unregister_host` undoes it.

        Parameters
        ----------
        address, nbytes : int
            Memory that stays mapped until then.

        Raises
        ------
        ConfigError
            `nbytes` is below 1.
        DeviceError
            Part of it is pinned already, or the system refuses; nothing was pinned.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t at = address, size = _positive("nbytes", nbytes)
        cdef int code
        with nogil:
            code = kvbm_cuda_register_host(self.index, at, size, &error)
        _check(code, &error)

    def unregister_host(self, address):
        """Unpin host memory by the address that was given to `register_host`; no copy may use it any longer.

        Raises
        ------
        DeviceError
            Nothing was pinned under this address, or earlier work failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef uint64_t at = address
        cdef int code
        with nogil:
            code = kvbm_cuda_unregister_host(self.index, at, &error)
        _check(code, &error)

    def create_stream(self, *, priority=0):
        """Make a stream that does not wait for the default stream.

        Parameters
        ----------
        priority : int
            Between the two of `priorities`; the smaller number goes first.

        Raises
        ------
        DeviceError
            The call failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef int level = operator.index(priority)
        cdef uint64_t handle = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_stream_create(self.index, level, &handle, &error)
        _check(code, &error)
        return _stream(self.index, handle, True)

    def adopt_stream(self, handle):
        """Take somebody else's stream by its handle, 0 for the default stream; it is never given back."""
        return _stream(self.index, operator.index(handle), False)

    def create_event(self, *, with_timing=False):
        """Make an event.

        Parameters
        ----------
        with_timing : bool
            Whether `Event.elapsed_s` shall work, which costs a little.

        Raises
        ------
        DeviceError
            The call failed.
        """
        cdef kvbm_cuda_error error = _no_error()
        cdef int timing = bool(with_timing)
        cdef uint64_t handle = 0
        cdef int code
        with nogil:
            code = kvbm_cuda_event_create(self.index, timing, &handle, &error)
        _check(code, &error)
        return _event(self.index, handle, True)

    def adopt_event(self, handle):
        """Take somebody else's event by its handle; it is never given back."""
        return _event(self.index, operator.index(handle), False)

include "device_simulation.pxi"

if KVBM_IS_SIMULATED:
    simulation = _Simulation.__new__(_Simulation)
