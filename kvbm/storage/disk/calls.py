"""The calls to the operating system that a disk storage makes, in one place for tests that inject faults."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

DIRECT_NBYTES = 4096  # what direct I/O is aligned to: offset, size and address
_STATX_NBYTES, _STATX_DIOALIGN, _AT_EMPTY_PATH = 256, 0x2000, 0x1000  # of statx(2)
_DIO_ALIGNS_AT = 152  # in its answer: of addresses, then of offsets and sizes, 32 bits each
SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

ResultT = TypeVar("ResultT")


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

    def direct_alignment(self, fd: int) -> int | None:
        """Give the bytes that direct I/O on an open file is aligned to, 0 where there is none; None: nobody says."""
        return _statx_alignment(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        """Set who may use an open file."""
        os.fchmod(fd, mode)

    def free_nbytes(self, fd: int) -> int | None:
        """Give the bytes that this user can still fill; None where the file system does not say."""
        status = os.fstatvfs(fd)
        return status.f_bavail * status.f_frsize if status.f_blocks else None

    def lock(self, fd: int) -> None:
        """Take the record lock of a whole file; `BlockingIOError` when another process has it."""
        import fcntl  # not on every platform that imports kvbm

        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # some systems say so
            raise BlockingIOError(*error.args) from error

    def sleep(self, seconds: float) -> None:
        """Wait until a lock may be free."""
        time.sleep(seconds)

    def fdatasync(self, fd: int) -> None:
        """Bring the bytes of an open file to the medium."""
        if fd < 0:  # closed: Python would raise a ValueError
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)

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


def aligned_empty(num_rows: int, row_nbytes: int) -> npt.NDArray[np.uint8]:
    """Make (num_rows, row_nbytes) uint8 in host memory whose first byte lies where direct I/O wants it."""
    nbytes = num_rows * row_nbytes
    memory = np.empty(nbytes + DIRECT_NBYTES, dtype=np.uint8)
    start = -memory.ctypes.data % DIRECT_NBYTES
    return memory[start : start + nbytes].reshape(num_rows, row_nbytes)


def _statx_alignment(fd: int) -> int | None:
    """Ask the kernel, which tells since Linux 6.1 and not for every file system."""
    import ctypes  # for this one call: Python has no statx

    answer = ctypes.create_string_buffer(_STATX_NBYTES)
    try:
        status = ctypes.CDLL(None).statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer)
    except (AttributeError, OSError, TypeError):  # another libc, or another system
        return None
    (mask,) = struct.unpack_from("I", answer)
    if status or not mask & _STATX_DIOALIGN:
        return None
    return int(max(struct.unpack_from("2I", answer, _DIO_ALIGNS_AT)))


def retry(call: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Call again while a signal interrupts."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def move_all(call: Callable[..., int], fd: int, data: memoryview, offset: int) -> int:
    """Read or write (by `OsCalls.preadv` or `pwritev`) until all of `data` has moved; give the bytes that did.

    Raises
    ------
    OSError
        Of the system; `EIO` where a write moves nothing.
    """
    num_moved = 0
    while num_moved < len(data):
        count = retry(call, fd, [data[num_moved:]], offset + num_moved)
        if not count:
            break
        num_moved += count
    return num_moved
