"""The directory of a disk storage: who holds it, its data file, and how that file can be read and written.

A directory has one holder, kept by a lock on a file in it. Symbolic links are not followed, and everything made here is
the owner's alone. When opening fails, nothing is left behind that was not there before.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError

_log = logging.getLogger("kvbm.storage.disk")

DIRECT_NBYTES = 4096  # what direct I/O is aligned to: offset, size and address
LOCK_NAME = "kvbm.lock"

_SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class OsCalls:
    """The calls to the operating system that a disk storage makes; a test replaces some to inject faults."""

    def mkdir(self, path: Path, mode: int) -> None:
        """Make a directory."""
        path.mkdir(mode)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def open(self, path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        """Open a file and give its descriptor."""
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def unlink(self, name: str, dir_fd: int) -> None:
        """Remove a file of a directory."""
        os.unlink(name, dir_fd=dir_fd)

    def fstat(self, fd: int) -> os.stat_result:
        """Describe an open file."""
        return os.fstat(fd)

    def stat(self, name: str, dir_fd: int) -> os.stat_result:
        """Describe a file of a directory, a symbolic link itself."""
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def fchmod(self, fd: int, mode: int) -> None:
        """Set who may use an open file."""
        os.fchmod(fd, mode)

    def free_nbytes(self, fd: int) -> int | None:
        """Give the bytes that this user can still fill; None where the file system does not say."""
        status = os.fstatvfs(fd)
        return status.f_bavail * status.f_frsize if status.f_blocks else None

    def flock(self, fd: int) -> None:
        """Take the exclusive lock of an open file; `BlockingIOError` when another open file has it."""
        import fcntl  # not on every platform that imports kvbm

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """Give the lock back, also for descriptors that a forked process has."""
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_UN)

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Give a file its bytes on the medium."""
        if not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOSYS, "this platform has no posix_fallocate")
        os.posix_fallocate(fd, offset, nbytes)

    def ftruncate(self, fd: int, nbytes: int) -> None:
        """Set the size of an open file."""
        os.ftruncate(fd, nbytes)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Read at an offset into buffers; give the number of bytes."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Write buffers at an offset; give the number of bytes."""
        return os.pwritev(fd, buffers, offset)


class DiskFiles:
    """An open directory with its lock and its data file.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, where its parent exists.
    file_name : str
    nbytes : int
        Size of the data file. An existing file gets this size; what it held is not looked at.
    use_direct_io : bool
    os_calls : OsCalls

    Attributes
    ----------
    path : Path
        Of the data file.
    fd : int
    io_mode : str
        "direct" or "buffered".
    io_mode_reason : str
        Why.
    is_sparse : bool
        The file system could not preallocate: writing a slot may still find the disk full.

    Raises
    ------
    StorageError
        With errno and path: the directory is held by another storage, cannot be had, or has no room.

    Notes
    -----
    The lock belongs to the open file: a second storage of the same process is refused too. A forked child that outlives
    a crashed parent keeps it.
    """

    def __init__(self, directory: Path, file_name: str, nbytes: int, *, use_direct_io: bool, os_calls: OsCalls) -> None:
        self.directory = directory
        self.path = directory / file_name
        self.nbytes = nbytes
        self.fd = -1
        self.io_mode = "buffered"
        self.io_mode_reason = "use_direct_io is off"
        self.is_sparse = False
        self._os = os_calls
        self._pid = os.getpid()
        self._directory_fd = -1
        self._lock_fd = -1
        self._has_made_directory = False
        with contextlib.ExitStack() as undo:
            try:
                self._open_directory(undo)
                self._take_lock(undo)
                self._open_data_file(undo)
                self._allocate()
                if use_direct_io:
                    self._try_direct_io()
            except StorageError:
                raise
            except OSError as error:
                raise self._explain(error) from error
            undo.pop_all()
        _log.info(
            "disk storage opened path=%s nbytes=%d io_mode=%s reason=%r is_sparse=%s",
            self.path,
            nbytes,
            self.io_mode,
            self.io_mode_reason,
            self.is_sparse,
        )

    def close(self) -> None:
        """Close the files and give the directory free; may be called twice. The data file stays."""
        if self._lock_fd >= 0 and os.getpid() == self._pid:  # a forked child must not unlock what its parent holds
            with contextlib.suppress(OSError):
                self._os.unlock(self._lock_fd)
        fds = self.fd, self._lock_fd, self._directory_fd
        self.fd = self._lock_fd = self._directory_fd = -1
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    self._os.close(fd)

    # -- opening, step by step ---------------------------------------------------------------------------------

    def _open_directory(self, undo: contextlib.ExitStack) -> None:
        try:
            self._os.mkdir(self.directory, 0o700)
            self._has_made_directory = True
            undo.callback(_quietly, self._os.rmdir, self.directory)
        except FileExistsError:
            pass
        undo.callback(self.close)
        flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _SAFE_FLAGS
        self._directory_fd = self._os.open(self.directory, flags)
        mode = self._os.fstat(self._directory_fd).st_mode
        if mode & 0o022 and not mode & stat.S_ISVTX:
            _log.warning("disk directory is writable by other users path=%s mode=%o", self.directory, mode & 0o7777)

    def _take_lock(self, undo: contextlib.ExitStack) -> None:
        """Lock the file that bears the name now: another holder may have removed the one that was opened."""
        if self._has_made_directory:  # elsewhere a lock file is removed by who has locked it only
            undo.callback(self._remove, LOCK_NAME)
        while True:
            flags = os.O_RDWR | os.O_CREAT | _SAFE_FLAGS
            self._lock_fd = fd = self._os.open(LOCK_NAME, flags, dir_fd=self._directory_fd)
            try:
                self._os.flock(fd)
            except BlockingIOError as error:
                holder = self._read_holder(fd)
                self._lock_fd = -1
                self._os.close(fd)
                text = f"the directory is in use by {holder}: give each storage a directory of its own"
                raise StorageError(errno.EBUSY, text, str(self.directory)) from error
            with contextlib.suppress(FileNotFoundError):
                if self._os.stat(LOCK_NAME, self._directory_fd).st_ino == self._os.fstat(fd).st_ino:
                    break
            self._os.close(fd)
        undo.callback(self._remove, LOCK_NAME)
        self._os.ftruncate(fd, 0)
        self._os.pwritev(fd, [b"%d\n" % self._pid], 0)

    def _read_holder(self, fd: int) -> str:
        text = bytearray(32)
        num_read = 0
        with contextlib.suppress(OSError):
            num_read = self._os.preadv(fd, [text], 0)
        pid = bytes(text[:num_read]).strip()
        if not pid.isdigit():
            return "another storage"
        return f"another storage of process {int(pid)}" + (" (this one)" if int(pid) == self._pid else "")

    def _open_data_file(self, undo: contextlib.ExitStack) -> None:
        name = self.path.name
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE_FLAGS
            self.fd = self._os.open(name, flags, dir_fd=self._directory_fd)
            undo.callback(self._remove, name)
        except FileExistsError:
            self.fd = self._os.open(name, os.O_RDWR | _SAFE_FLAGS, dir_fd=self._directory_fd)
            status = self._os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(errno.EINVAL, "this is no regular file: remove it", str(self.path)) from None
            if status.st_mode & 0o077:
                self._os.fchmod(self.fd, 0o600)
            undo.callback(lambda: _quietly(self._os.ftruncate, self.fd, status.st_size))

    def _allocate(self) -> None:
        status = self._os.fstat(self.fd)
        if status.st_size > self.nbytes:
            self._os.ftruncate(self.fd, self.nbytes)
            status = self._os.fstat(self.fd)
        missing = self.nbytes - min(self.nbytes, status.st_blocks * 512)
        free = self._os.free_nbytes(self.fd)
        if free is not None and missing > free:
            raise self._no_room(errno.ENOSPC, free)
        try:
            _retry(self._os.posix_fallocate, self.fd, 0, self.nbytes)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._no_room(error.errno, free) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            self._os.ftruncate(self.fd, self.nbytes)
            self.is_sparse = True
            _log.info("no preallocation, the file is sparse path=%s reason=%s", self.path, error)

    def _try_direct_io(self) -> None:
        """Write and read back one aligned page; what a file system says of itself is not enough."""
        if not hasattr(os, "O_DIRECT"):
            self.io_mode_reason = "this platform has no O_DIRECT"
            return
        fd = -1
        try:
            fd = self._os.open(self.path.name, os.O_RDWR | os.O_DIRECT | _SAFE_FLAGS, dir_fd=self._directory_fd)
            page, back = aligned_empty(1, DIRECT_NBYTES), aligned_empty(1, DIRECT_NBYTES)
            page[:], back[:] = 0x5A, 0
            num_written = _retry(self._os.pwritev, fd, [page], 0)
            num_read = _retry(self._os.preadv, fd, [back], 0)
            if (num_written, num_read) != (DIRECT_NBYTES, DIRECT_NBYTES) or not np.array_equal(page, back):
                raise OSError(errno.EIO, "the probe did not come back as written")
        except OSError as error:
            self.io_mode_reason = f"direct I/O failed in a probe: {error.strerror or error}"
            if fd >= 0:
                self._os.close(fd)
            return
        self._os.close(self.fd)
        self.fd = fd
        self.io_mode, self.io_mode_reason = "direct", "an aligned probe came back as written"

    def _remove(self, name: str) -> None:
        _quietly(self._os.unlink, name, self._directory_fd)

    # -- errors ------------------------------------------------------------------------------------------------

    def _no_room(self, code: int, free: int | None) -> StorageError:
        have = "the file system is full" if free is None else f"have {free} free"
        text = f"need {self.nbytes} bytes, {have}: give fewer blocks or another directory"
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


def aligned_empty(num_rows: int, row_nbytes: int) -> npt.NDArray[np.uint8]:
    """Make (num_rows, row_nbytes) uint8 in host memory whose first byte lies where direct I/O wants it."""
    nbytes = num_rows * row_nbytes
    memory = np.empty(nbytes + DIRECT_NBYTES, dtype=np.uint8)
    start = -memory.ctypes.data % DIRECT_NBYTES
    return memory[start : start + nbytes].reshape(num_rows, row_nbytes)


def _retry(call: Any, *arguments: Any) -> Any:
    """Call again while a signal interrupts."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def _quietly(call: Any, *arguments: Any) -> None:
    """Undo as well as one can: the error that made it necessary is the one to raise."""
    with contextlib.suppress(OSError):
        call(*arguments)
