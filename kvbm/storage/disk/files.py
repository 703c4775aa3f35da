"""The files of a slab: its directory, lock, data file and index file, and how the data file can be read and written.

Symbolic links are not followed, and everything made here is the owner's alone. When opening fails, nothing is left
behind that was not there before, and nothing that was there has changed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvbm.errors import SlabFormatError, StorageError
from kvbm.storage.disk.calls import DIRECT_NBYTES, SAFE_FLAGS, OsCalls, aligned_empty, move_all, retry
from kvbm.storage.disk.lock import SlabLock

_log = logging.getLogger("kvbm.storage.disk")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FILL_NBYTES = 1 << 20


class SlabFiles:
    """An open directory with a slab's lock, data file and index file.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, where its parent exists.
    name : str
        Of the slab: several may share a directory.
    os_calls : OsCalls

    Attributes
    ----------
    path, index_path : Path
        Of the data file and of the index file.
    fd, index_fd : int
        Open between `opening` and `close`.
    io_mode : str
        "direct" or "buffered".
    io_mode_reason : str
        Why.
    is_sparse : bool
        The file system could not preallocate: writing a slot may still find the disk full.
    """

    def __init__(self, directory: Path, name: str, *, os_calls: OsCalls) -> None:
        self.directory = directory
        self.path = directory / f"{name}.blocks"
        self.index_path = directory / f"{name}.index"
        self.fd = self.index_fd = -1
        self.io_mode = "buffered"
        self.io_mode_reason = "use_direct_io is off"
        self.is_sparse = False
        self.os_calls = os_calls
        self._lock_name, self._probe_name = f"{name}.lock", f"{name}.probe"
        self._lock: SlabLock | None = None
        self._directory_fd = -1
        self._needed_nbytes = 0

    @contextlib.contextmanager
    def opening(self, *, lock_timeout_s: float) -> Iterator[None]:
        """Open everything; when the caller raises inside, undo that and explain.

        Raises
        ------
        StorageError
            With errno and path: the slab is held by another storage, cannot be had, or has no room.
        """
        with contextlib.ExitStack() as undo:
            try:
                self._open_directory(undo)
                had_lock = self._has(self._lock_name)
                self._lock = SlabLock(
                    self._directory_fd,
                    self._lock_name,
                    path=str(self.directory),
                    timeout_s=lock_timeout_s,
                    os_calls=self.os_calls,
                )
                if not had_lock:
                    undo.callback(self._remove, self._lock_name)
                self.fd = self._open_file(self.path.name, undo)
                self.index_fd = self._open_file(self.index_path.name, undo)
                yield
            except (StorageError, SlabFormatError):
                raise
            except OSError as error:
                raise self._explain(error) from error
            undo.pop_all()

    def close(self) -> None:
        """Close the files and give the slab free; may be called twice. The files stay."""
        fds = self.fd, self.index_fd
        self.fd = self.index_fd = -1
        for fd in fds:
            self._close_fd(fd)
        if self._lock is not None:
            self._lock.close()
        directory_fd, self._directory_fd = self._directory_fd, -1
        self._close_fd(directory_fd)

    def need_room(self, nbytes: int, index_nbytes: int) -> None:
        """Refuse sizes of the two files that the file system has no room for, before anything is made for them.

        Raises
        ------
        StorageError
            There is no room.
        """
        self._needed_nbytes = nbytes + index_nbytes
        files = [(self.fd, nbytes), (self.index_fd, index_nbytes)]
        missing = sum(max(0, size - self.os_calls.fstat(fd).st_blocks * 512) for fd, size in files)
        free = self.os_calls.free_nbytes(self.fd)
        if free is not None and missing > free:
            raise self._no_room(errno.ENOSPC, free)

    def allocate(self, nbytes: int, index_nbytes: int) -> None:
        """Give both files their size, on the medium where the file system can; `need_room` comes before.

        Raises
        ------
        StorageError
            There is no room; both files are as they were.
        """
        files = [(self.fd, nbytes), (self.index_fd, index_nbytes)]
        before = [self.os_calls.fstat(fd).st_size for fd, _ in files]
        try:
            for fd, size in files:
                self._allocate(fd, size)
        except BaseException:
            for (fd, _), size in zip(files, before, strict=True):
                if self.os_calls.fstat(fd).st_size > size:
                    _quietly(self.os_calls.ftruncate, fd, size)
            raise

    def shrink(self, nbytes: int, index_nbytes: int) -> None:
        """Cut off what is beyond these sizes, once nothing can fail any more."""
        for fd, size in ((self.fd, nbytes), (self.index_fd, index_nbytes)):
            if self.os_calls.fstat(fd).st_size > size:
                self.os_calls.ftruncate(fd, size)

    def try_direct_io(self) -> None:
        """Go around the page cache, where a page written and read back in a file of its own shows that this works."""
        if not hasattr(os, "O_DIRECT"):
            self.io_mode_reason = "this platform has no O_DIRECT"
            return
        alignment = self.os_calls.direct_alignment(self.fd)
        if alignment == 0:
            self.io_mode_reason = "the file system has no direct I/O for this file"
            return
        if alignment is not None and DIRECT_NBYTES % alignment:
            self.io_mode_reason = f"direct I/O needs multiples of {alignment} bytes here, slots have {DIRECT_NBYTES}"
            return
        fd = -1
        try:
            self._probe_direct_io()
            fd = self.os_calls.open(self.path.name, os.O_RDWR | os.O_DIRECT | SAFE_FLAGS, dir_fd=self._directory_fd)
        except OSError as error:
            self.io_mode_reason = f"direct I/O failed in a probe: {error.strerror or error}"
            return
        finally:
            self._remove(self._probe_name)
        self._close_fd(self.fd)
        self.fd = fd
        self.io_mode, self.io_mode_reason = "direct", "an aligned probe came back as written"

    @contextlib.contextmanager
    def scratch(self, nbytes: int) -> Iterator[int]:
        """Give a file without a name, of so many bytes that were written, in the data file's directory and I/O mode.

        Raises
        ------
        OSError
            It cannot be had.
        """
        self._remove(self._probe_name)
        direct = os.O_DIRECT if self.io_mode == "direct" else 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | direct | SAFE_FLAGS
        fd = self.os_calls.open(self._probe_name, flags, dir_fd=self._directory_fd)
        self._remove(self._probe_name)
        try:
            content = aligned_empty(1, nbytes)
            content[:] = 0x5A
            if retry(self.os_calls.pwritev, fd, [content], 0) != nbytes:
                raise OSError(errno.EIO, "the file to probe with could not be written whole")
            yield fd
        finally:
            self._close_fd(fd)

    # -- opening, step by step ---------------------------------------------------------------------------------

    def _open_directory(self, undo: contextlib.ExitStack) -> None:
        try:
            self.os_calls.mkdir(self.directory, 0o700)
            undo.callback(_quietly, self.os_calls.rmdir, self.directory)
        except FileExistsError:
            pass
        undo.callback(self.close)
        flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | SAFE_FLAGS
        self._directory_fd = self.os_calls.open(self.directory, flags)
        mode = self.os_calls.fstat(self._directory_fd).st_mode
        if mode & 0o022 and not mode & stat.S_ISVTX:
            _log.warning("disk directory is writable by other users path=%s mode=%o", self.directory, mode & 0o7777)

    def _open_file(self, name: str, undo: contextlib.ExitStack) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE_FLAGS
            fd = self.os_calls.open(name, flags, dir_fd=self._directory_fd)
            undo.callback(self._remove, name)
        except FileExistsError:
            # A FIFO would be waited for without O_NONBLOCK; regular files do not mind it.
            fd = self.os_calls.open(name, os.O_RDWR | os.O_NONBLOCK | SAFE_FLAGS, dir_fd=self._directory_fd)
            try:
                status = self.os_calls.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    text = "this is no regular file: remove it"
                    raise StorageError(errno.EINVAL, text, str(self.directory / name)) from None
                if status.st_mode & 0o077:
                    self.os_calls.fchmod(fd, 0o600)
            except BaseException:
                self._close_fd(fd)
                raise
        return fd

    def _allocate(self, fd: int, nbytes: int) -> None:
        try:
            retry(self.os_calls.posix_fallocate, fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._no_room(error.errno or errno.ENOSPC, self.os_calls.free_nbytes(fd)) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            reason = error
        if self.os_calls.fstat(fd).st_size >= nbytes:
            return
        try:
            self.os_calls.ftruncate(fd, nbytes)
            self.is_sparse = True
            _log.info("no preallocation, the file is sparse path=%s reason=%s", self.path, reason)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            _log.info("no preallocation, filling the file with zeros path=%s reason=%s", self.path, error)
            self._fill(fd, nbytes)

    def _fill(self, fd: int, nbytes: int) -> None:
        zeros = memoryview(bytes(_FILL_NBYTES))
        offset = self.os_calls.fstat(fd).st_size
        while offset < nbytes:
            count = move_all(self.os_calls.pwritev, fd, zeros[: nbytes - offset], offset)
            if not count:
                raise OSError(errno.EIO, "a write of zeros moved nothing")
            offset += count

    def _probe_direct_io(self) -> None:
        """Write and read back one aligned page; what a file system says of itself is not enough."""
        self._remove(self._probe_name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | SAFE_FLAGS
        fd = self.os_calls.open(self._probe_name, flags, dir_fd=self._directory_fd)
        try:
            page, back = aligned_empty(1, DIRECT_NBYTES), aligned_empty(1, DIRECT_NBYTES)
            page[:], back[:] = 0x5A, 0
            num_written = retry(self.os_calls.pwritev, fd, [page], 0)
            num_read = retry(self.os_calls.preadv, fd, [back], 0)
            if (num_written, num_read) != (DIRECT_NBYTES, DIRECT_NBYTES) or not np.array_equal(page, back):
                raise OSError(errno.EIO, "the probe did not come back as written")
        finally:
            self._close_fd(fd)

    def _has(self, name: str) -> bool:
        try:
            self.os_calls.stat(name, self._directory_fd)
        except FileNotFoundError:
            return False
        return True

    def _remove(self, name: str) -> None:
        _quietly(self.os_calls.unlink, name, self._directory_fd)

    def _close_fd(self, fd: int) -> None:
        if fd >= 0:
            _quietly(self.os_calls.close, fd)

    # -- errors ------------------------------------------------------------------------------------------------

    def _no_room(self, code: int, free: int | None) -> StorageError:
        have = "the file system is full" if free is None else f"have {free} free"
        text = f"need {self._needed_nbytes} bytes, {have}: give fewer blocks or another directory"
        return StorageError(code, text, str(self.path))

    def _explain(self, error: OSError) -> StorageError:
        code, path = error.errno or errno.EIO, str(self.directory)
        if code == errno.ENOENT:
            text = "the parent of the directory does not exist: make it first"
        elif code in _NO_ACCESS:
            text = f"this user cannot write here ({os.strerror(code).lower()}): give a directory it can write"
        elif code in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            is_link = self.directory.is_symlink() or self.path.is_symlink() or code == errno.ELOOP
            what = "a symbolic link, and links are not followed" if is_link else f"{os.strerror(code).lower()}"
            text = f"this is no directory with a plain file {self.path.name} ({what}): give a real directory"
        elif code in _NO_ROOM:
            return self._no_room(code, None)
        else:
            text = f"cannot open the storage: {error.strerror or error}"
        return StorageError(code, text, path)


def _quietly(call: Any, *arguments: Any) -> None:
    """Undo as well as one can: the error that made it necessary is the one to raise."""
    with contextlib.suppress(OSError):
        call(*arguments)
