"""A slab that is open: its files, its index, and the thread that brings both to the medium.

Engines see the data file through it. Whoever closes it, be it a finaliser, takes no lock: the thread, once there is
one, syncs for the last time and closes the files.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from kvbm.jobs.channel import remaining_s
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.files import SlabFiles
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT, Header
from kvbm.storage.disk.index import SlabIndex

_log = logging.getLogger("kvbm.storage.disk")


class Slab:
    """One slab, held until `close`.

    Parameters
    ----------
    directory : Path
    name : str
    header : Header
        What it shall be.
    use_direct_io : bool
    on_mismatch : str
        "refuse" or "replace".
    sync_interval_s : float
        A power cut loses at most what was written in this time.
    lock_timeout_s : float
    os_calls : OsCalls
    clock : callable
        Gives seconds since 1970.

    Raises
    ------
    StorageError
        It is held by another storage, cannot be had, or has no room.
    SlabFormatError
        It is of another fingerprint, shape or version.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        header: Header,
        *,
        use_direct_io: bool,
        on_mismatch: str,
        sync_interval_s: float,
        lock_timeout_s: float,
        os_calls: OsCalls,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.files = files = SlabFiles(directory, name, os_calls=os_calls)
        self._os = os_calls
        self._sync_interval_s = sync_interval_s
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: something was written; False: close
        self._is_noted = self._has_data = self._is_closing = False
        self._thread: threading.Thread | None = None  # from just before it starts
        self._starting = threading.Lock()
        self._unclosed = [files]  # taken out by whoever closes them
        self._has_closed = threading.Event()
        self.num_sync_failures = 0
        nbytes = header.num_slots * header.slot_nbytes
        index_nbytes = RECORDS_AT + header.num_slots * RECORD_NBYTES
        with files.opening(lock_timeout_s=lock_timeout_s):
            files.need_room(nbytes, index_nbytes)
            self.index = SlabIndex(
                files.index_fd,
                header,
                on_mismatch=on_mismatch,
                os_calls=os_calls,
                path=str(files.index_path),
                clock=clock,
            )
            files.allocate(nbytes, index_nbytes)
            if use_direct_io:
                files.try_direct_io()
            self.index.begin()
            files.shrink(nbytes, index_nbytes)
        _log.info(
            "disk storage opened path=%s nbytes=%d io_mode=%s reason=%r is_sparse=%s",
            files.path, nbytes, files.io_mode, files.io_mode_reason, files.is_sparse,
        )  # fmt: skip

    @property
    def fd(self) -> int:
        """Of the data file."""
        return self.files.fd

    @property
    def path(self) -> Path:
        """The data file."""
        return self.files.path

    @property
    def io_mode(self) -> str:
        """How the data file is read and written: "direct" or "buffered"."""
        return self.files.io_mode

    def scratch(self, nbytes: int) -> AbstractContextManager[int]:
        """Give a file to measure the device with; see `SlabFiles.scratch`."""
        return self.files.scratch(nbytes)

    def note(self, *, has_data: bool) -> None:
        """Say that something was written, so that it is synced within the interval."""
        if has_data:  # never written back as it was read: another thread may have set it in between
            self._has_data = True
        if self._is_noted:
            return
        self._is_noted = True
        with self._starting:
            if self._thread is None and not self._is_closing and not self._start_thread():
                self._is_noted = False
                return
        self._wake.put(True)

    def _start_thread(self) -> bool:
        """Start to sync; `close`, which takes no lock, may come at any point of it."""
        self._thread = thread = threading.Thread(target=self._work, name="kvbm-disk-sync", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the next one may go
            _log.warning("no thread to sync the disk tier path=%s error=%s", self.path, error)
            self._thread = None
            if self._is_closing:  # it may have been left to the thread
                self._close_files()
            return False
        if self._is_closing:  # perhaps before there was a thread to tell
            self._wake.put(False)
        return True

    def sync(self) -> None:
        """Bring everything that was written before to the medium."""
        if self._has_data:
            self._has_data = False
            try:
                self._os.fdatasync(self.files.fd)
            except OSError as error:
                self.num_sync_failures += 1
                _log.log(
                    logging.DEBUG if self.num_sync_failures > 1 else logging.WARNING,
                    "disk sync failed path=%s error=%s", self.path, error,
                )  # fmt: skip
        self.index.sync()

    def close(self) -> None:
        """Begin to close; with a thread, that syncs and closes the files, see `wait_until_closed`. Takes no lock."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._thread is None:  # nothing was written
            self._close_files()
        else:
            self._wake.put(False)

    def wait_until_closed(self, timeout_s: float | None = None) -> bool:
        """Wait until the files are closed and the lock is free, after `close`; return whether they are."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        thread = self._thread
        if not self._is_closing or thread is threading.current_thread():  # a callback closes: it is for its engine to
            return True
        if not self._has_closed.wait(timeout_s):
            return False
        if thread is not None and thread.ident is not None:
            thread.join(remaining_s(give_up))
            return not thread.is_alive()
        return True

    def _work(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = not self._wake.get()
            if not is_closing:
                with contextlib.suppress(queue.Empty):
                    is_closing = not self._wake.get(timeout=self._sync_interval_s)
            self._is_noted = False
            if not self._unclosed:
                return
            try:
                self.sync()
            except Exception:
                _log.exception("disk sync failed in an unexpected way path=%s", self.path)
        self._close_files()

    def _close_files(self) -> None:
        try:
            files = self._unclosed.pop()
        except IndexError:  # another thread does
            return
        self.index.close()  # a write that ends after all may still be recorded
        files.close()
        self._has_closed.set()
