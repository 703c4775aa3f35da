"""Pinned host memory, made the fast way: placed on the GPU's node, mapped in by several threads, then registered.

Registration goes slice by slice on a thread of its own, in order, so that the first slice serves while the rest is
being pinned. A slice that cannot be registered ends that: what lies before it is pinned, the rest works as plain
memory. The mapping lives as long as anybody holds a part of it, and to the end of the process where somebody still does
when the interpreter exits: copies may run there. A child made by fork does not have it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, StorageError
from kvbm.gpu.numa import numa_node_of, prefer_node
from kvbm.gpu.runtime import Gpu

if TYPE_CHECKING:
    from kvbm._backend import Device

_log = logging.getLogger("kvbm.gpu")
_PAGE_NBYTES = 4096
_HUGE_PAGE_NBYTES = 2 << 20
_SLICE_NBYTES = 1 << 30
_MADV_POPULATE_WRITE = 23  # of Linux; Python's mmap does not name it


class PinnedMemory:
    """Host memory that a GPU reads and writes directly.

    Parameters
    ----------
    gpu : Gpu
    nbytes : int
        1 or more.
    slice_nbytes : int
        Bytes that are mapped in and registered at once; rounded up to pages.
    num_threads : int
        Threads that share a slice's pages.
    use_huge_pages : bool
        Ask for them; what came of it is in `has_huge_pages`.
    on_progress : callable, optional
        Told `ready_nbytes` after each slice, in the thread that pins.
    in_background : bool
        False pins everything before the constructor returns.

    Attributes
    ----------
    address, nbytes : int
    memory : (nbytes,) uint8, host
        Arrays cut from it keep the mapping, and its registration, alive.
    has_huge_pages : bool
    node : int or None
        NUMA node that the memory was asked to lie on.

    Raises
    ------
    StorageError
        The memory cannot be mapped.
    """

    def __init__(
        self,
        gpu: Gpu,
        nbytes: int,
        *,
        slice_nbytes: int = _SLICE_NBYTES,
        num_threads: int = 4,
        use_huge_pages: bool = True,
        on_progress: Callable[[int], None] | None = None,
        in_background: bool = True,
    ) -> None:
        if min(nbytes, slice_nbytes, num_threads) < 1:
            raise ConfigError(
                f"pinned memory needs nbytes, slice_nbytes and num_threads of 1 or more, got {nbytes}, {slice_nbytes} "
                f"and {num_threads}"
            )
        self.gpu = gpu
        self.nbytes = nbytes
        page = _HUGE_PAGE_NBYTES if nbytes >= _HUGE_PAGE_NBYTES else _PAGE_NBYTES
        self._slice_nbytes = _up(slice_nbytes, _PAGE_NBYTES)
        self._num_threads = min(num_threads, os.cpu_count() or 1)
        self._on_progress = on_progress
        self._registered: list[int] = []
        self._owner: _Owner | None = None
        self.memory: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._map(use_huge_pages, page)
        self.node = numa_node_of(gpu.device.pci_bus_id)
        if self.node is not None:
            prefer_node(self.address, self._mapped_nbytes, self.node)
        self.failure = ""  # why the rest is not pinned, in a line
        self._ready_nbytes = 0
        self._is_over = False  # nothing more will be pinned
        self._wants_end = threading.Event()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if in_background and nbytes > self._slice_nbytes:
            self._pin_slice(0)  # the first serves at once
            self._thread = threading.Thread(target=self._pin_from, args=(1,), name="kvbm-pin", daemon=True)
            self._thread.start()
        else:
            self._pin_from(0)

    @property
    def ready_nbytes(self) -> int:
        """Bytes from the first on that are pinned by now."""
        return self._ready_nbytes

    @property
    def is_complete(self) -> bool:
        """Whether all of it is pinned."""
        return self._ready_nbytes >= self.nbytes

    def wait_for(self, nbytes: int, timeout: float | None = None) -> bool:
        """Wait until the first bytes are pinned.

        Parameters
        ----------
        nbytes : int
        timeout : float, optional
            Seconds; None waits for as long as it takes.

        Returns
        -------
        bool
            Whether they are; False where they will not be (`failure` says why), or not in time.

        Notes
        -----
        Blocks while they are being pinned; returns at once where they are.
        """
        if nbytes <= self._ready_nbytes:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or nbytes <= self._ready_nbytes, timeout)
            return nbytes <= self._ready_nbytes

    def close(self) -> None:
        """Stop pinning and let go; the memory goes with the last array that shows a part of it. May be called again."""
        self._wants_end.set()
        if self._thread is not None and self._thread is not threading.current_thread() and self.gpu.is_usable:
            self._thread.join()
        self._thread = None
        self.memory = np.empty(0, dtype=np.uint8)
        self._owner = None

    def __repr__(self) -> str:
        return f"PinnedMemory({self._ready_nbytes} of {self.nbytes} bytes pinned)"

    def _map(self, use_huge_pages: bool, page: int) -> None:
        mapped_nbytes = _up(self.nbytes, page) + (page if page > _PAGE_NBYTES else 0)  # to begin on a huge page
        try:
            mapping = mmap.mmap(-1, mapped_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise StorageError(f"cannot map {self.nbytes} bytes of host memory: {error}") from error
        self.has_huge_pages = False
        if use_huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                mapping.madvise(mmap.MADV_HUGEPAGE)
                self.has_huge_pages = True
            except OSError as error:
                _log.info("huge pages refused nbytes=%d reason=%s", self.nbytes, error)
        if hasattr(mmap, "MADV_DONTFORK"):
            # A fork would copy every pinned page, or let parent and GPU see different ones.
            mapping.madvise(mmap.MADV_DONTFORK)
        base = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        self.address = base + -base % page
        self._mapped_nbytes = _up(self.nbytes, page)
        self._owner = _Owner(self.address, self.nbytes)
        # Arrays hold the owner; the last of them to go unregisters, and only then the mapping goes.
        finalizer = weakref.finalize(self._owner, _let_go, self.gpu.device, self._registered, mapping, os.getpid())
        finalizer.atexit = False
        # Nothing but `_let_go` unmaps it: not the end of the interpreter, where a thread may still copy, nor a child
        # made by fork, where something else may lie at these addresses by now.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
        self.memory = np.asarray(self._owner)

    def _pin_from(self, first: int) -> None:
        owner = self._owner  # the mapping stays while its pages are mapped in and registered
        try:
            for index in range(first, -(-self.nbytes // self._slice_nbytes)):
                if self._wants_end.is_set() or not self._pin_slice(index):
                    break
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            del owner

    def _pin_slice(self, index: int) -> bool:
        start = index * self._slice_nbytes
        nbytes = min(self._slice_nbytes, self._mapped_nbytes - start)
        _populate(self.address + start, nbytes, self._num_threads)
        try:
            self.gpu.device.register_host(self.address + start, nbytes)
        except Exception as error:
            self.failure = (
                f"{start} of {self.nbytes} bytes are pinned, the next {nbytes} could not be: {error}; locked memory "
                f"is limited to {_memlock()}: raise it (ulimit -l), or take a smaller host tier; the rest is slow"
            )
            _log.warning("%s", self.failure)
            return False
        self._registered.append(self.address + start)
        with self._changed:
            self._ready_nbytes = min(self.nbytes, start + nbytes)
            self._changed.notify_all()
        if self._on_progress is not None:
            self._on_progress(self._ready_nbytes)
        return True


class _Owner:
    """What arrays over a mapping have as their base."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}


def _let_go(device: Device, registered: list[int], mapping: mmap.mmap, pid: int) -> None:
    if os.getpid() != pid:  # a forked child has neither the mapping nor the device
        return
    for address in registered:
        try:
            device.unregister_host(address)
        except Exception as error:  # a lost device has forgotten it
            _log.debug("host memory was not unregistered address=%#x error=%s", address, error)
    mapping.close()
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(mapping))


def _populate(address: int, nbytes: int, num_threads: int) -> None:
    """Have the kernel map every page, cut among threads, without a change to what somebody may have written by now.

    Kernels before 5.14 cannot; registering maps the pages then, one after the other.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    num_pages = -(-nbytes // _PAGE_NBYTES)

    def populate(part: int) -> None:
        first, last = num_pages * part // num_threads, num_pages * (part + 1) // num_threads
        start = ctypes.c_void_p(address + first * _PAGE_NBYTES)
        libc.madvise(start, ctypes.c_size_t((last - first) * _PAGE_NBYTES), ctypes.c_int(_MADV_POPULATE_WRITE))

    threads = [threading.Thread(target=populate, args=(part,)) for part in range(1, num_threads)]
    for thread in threads:
        thread.start()
    populate(0)
    for thread in threads:
        thread.join()


def _memlock() -> str:
    import resource  # absent on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "nothing" if limit == resource.RLIM_INFINITY else f"{limit} bytes"


def _up(nbytes: int, page: int) -> int:
    return -(-nbytes // page) * page
