"""Who holds a slab: a POSIX record lock on a lock file of its own, opened once.

Such a lock ends with its process at the latest, whatever a child or a ring still has open. It does not tell two owners
within one process apart, and any close of the file gives it up; so the files held here are listed, and a listed one is
never opened again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable

from kvbm.errors import StorageError
from kvbm.storage.disk.calls import SAFE_FLAGS, OsCalls

_RETRY_S = 0.05

_FileId = tuple[int, int]
_held: dict[_FileId, int] = {}  # device and inode -> process
_holding = threading.RLock()  # a finaliser may close one lock while its thread takes another


def _forget_after_fork() -> None:
    global _holding  # noqa: PLW0603  (another thread of the parent may have had it)
    _holding = threading.RLock()  # a finaliser may close one lock while its thread takes another
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class SlabLock:
    """The lock of one slab.

    Parameters
    ----------
    directory_fd : int
    name : str
        Of the lock file.
    path : str
        Of the slab, for messages.
    timeout_s : float
        How long to try: an owner that was killed may take a moment to be gone.
    os_calls : OsCalls
    clock : callable
        Gives seconds; monotonic.

    Raises
    ------
    StorageError
        EBUSY: another storage holds it; the message names its process.
    """

    def __init__(
        self,
        directory_fd: int,
        name: str,
        *,
        path: str,
        timeout_s: float,
        os_calls: OsCalls,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory_fd = directory_fd
        self._name = name
        self._os = os_calls
        self._pid = os.getpid()
        self._fd = -1
        self._file_id: _FileId = (0, 0)
        give_up = clock() + timeout_s
        while (holder := self._try()) is not None:
            if clock() >= give_up:
                text = f"this slab is in use by {holder}: give each storage a directory or a slab name of its own"
                raise StorageError(errno.EBUSY, text, path)
            if holder:
                os_calls.sleep(_RETRY_S)

    def close(self) -> None:
        """Give the slab free; in a forked child, close what it inherited."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with _holding:
            with contextlib.suppress(OSError):
                self._os.close(fd)
            if os.getpid() == self._pid:
                _held.pop(self._file_id, None)

    def _try(self) -> str | None:
        """Take the lock; give None where that went well, else who holds it, empty where the file was replaced."""
        with _holding:
            is_new = False
            try:
                if _id_of(self._os.stat(self._name, self._directory_fd)) in _held:
                    return f"another storage of process {self._pid} (this one)"
            except FileNotFoundError:
                is_new = True
            fd = self._os.open(self._name, os.O_RDWR | os.O_CREAT | SAFE_FLAGS, dir_fd=self._directory_fd)
            try:
                status = self._os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError(errno.EINVAL, "this is no regular file: remove it", self._name)
                try:
                    self._os.lock(fd)
                except BlockingIOError:
                    return self._read_holder(fd)
                # Another owner may have removed the file that was opened.
                with contextlib.suppress(FileNotFoundError):
                    if _id_of(self._os.stat(self._name, self._directory_fd)) == _id_of(status):
                        self._os.ftruncate(fd, 0)
                        self._os.pwritev(fd, [b"%d\n" % self._pid], 0)
                        self._fd, self._file_id = fd, _id_of(status)
                        _held[self._file_id] = self._pid
                        return None
                return ""
            except BaseException:
                if is_new:
                    self._remove_if_free(fd)
                raise
            finally:
                if self._fd != fd:
                    self._os.close(fd)

    def _remove_if_free(self, fd: int) -> None:
        """Remove a lock file that was made in vain, unless somebody has it by now."""
        with contextlib.suppress(OSError):
            self._os.lock(fd)
            if _id_of(self._os.stat(self._name, self._directory_fd)) != _id_of(self._os.fstat(fd)):
                return
            self._os.unlink(self._name, self._directory_fd)

    def _read_holder(self, fd: int) -> str:
        text = bytearray(32)
        num_read = 0
        with contextlib.suppress(OSError):
            num_read = self._os.preadv(fd, [text], 0)
        pid = bytes(text[:num_read]).strip()
        return f"another storage of process {int(pid)}" if pid.isdigit() else "another storage"


def _id_of(status: os.stat_result) -> _FileId:
    return status.st_dev, status.st_ino
