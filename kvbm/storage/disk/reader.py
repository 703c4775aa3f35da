"""Looking into a slab without opening it as a storage: nothing is made, resized or written.

Symbolic links are not followed. Without its lock a slab may change while it is read: a record that is caught half
written is read again. With it, nobody else changes anything before `close`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import SlabFormatError, StorageError
from kvbm.storage.disk.calls import DIRECT_NBYTES, SAFE_FLAGS, OsCalls, move_all
from kvbm.storage.disk.format import (
    HEADER_NBYTES,
    LIVE,
    NUM_HEADERS,
    RECORD_DTYPE,
    RECORD_NBYTES,
    RECORDS_AT,
    Header,
    RecordArray,
    SlabVersionError,
    choose_header,
    crc_of,
    decode_header,
    is_live,
)
from kvbm.storage.disk.lock import SlabLock

_NUM_TRIES = 3  # to read what its owner is writing
_FLOCK = struct.Struct("hhqqi4x")  # Linux: type, whence, start, length, process


@dataclass(frozen=True)
class SlabName:
    """Where a slab lies.

    Attributes
    ----------
    directory : Path
    name : str
        Its files are ``name.blocks``, ``name.index`` and ``name.lock``.
    """

    directory: Path
    name: str

    def __str__(self) -> str:
        return str(self.directory / f"{self.name}.index")


def find_slabs(path: str | os.PathLike[str], name: str | None = None) -> list[SlabName]:
    """Give the slabs of a directory, by name, or the one of an index file.

    Parameters
    ----------
    path : path
        A directory, or the index file of one slab.
    name : str, optional
        Of the one that is wanted.

    Raises
    ------
    StorageError
        With errno and path: nothing is there, it cannot be read, or it is something else.
    """
    path = Path(path).absolute()
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        if not is_folder and not path.is_symlink() and path.suffix == ".index" and name in (None, path.stem):
            return [SlabName(path.parent, path.stem)]
        with _folder(path) as fd, os.scandir(fd) as entries:
            names = sorted(entry.name[: -len(".index")] for entry in entries if entry.name.endswith(".index"))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _explain(error, path) from error
    found = [SlabName(path, known) for known in names if known and name in (None, known)]
    if not found:
        have = f"it has {', '.join(names)}" if names else "it has no file NAME.index"
        what = "no slab is here" if name is None else f"no slab {name} is here"
        raise StorageError(errno.ENOENT, f"{what}, {have}: give the directory of disk.path", str(path))
    return found


class SlabReader:
    """A slab's files, open for reading; a context manager.

    Parameters
    ----------
    slab : SlabName
    lock_timeout_s : float, optional
        Take the lock, and wait so long for it; None only looks.
    os_calls : OsCalls, optional

    Attributes
    ----------
    slab : SlabName
    directory_fd, index_fd : int
        The index is open for writing too where the lock was taken.
    header : Header, optional
        None: none is whole, see `problem`.
    problem : str
        Why there is no header; empty where there is one.
    num_whole_headers : int
        Copies of the header that hold, of `NUM_HEADERS`.
    is_foreign : bool
        Another version of this package wrote it.

    Raises
    ------
    StorageError
        With errno and path: a file is absent, no regular file or cannot be read, or the slab is held (EBUSY).
    """

    def __init__(self, slab: SlabName, *, lock_timeout_s: float | None = None, os_calls: OsCalls | None = None) -> None:
        self.slab = slab
        self.directory_fd = self.index_fd = -1
        self.header: Header | None = None
        self.problem = ""
        self.num_whole_headers = 0
        self.is_foreign = False
        self._os = os_calls or OsCalls()
        self._lock: SlabLock | None = None
        try:
            self.directory_fd = _open_folder(slab.directory)
            if lock_timeout_s is not None:
                if self.describe_file("index") is None:  # no lock file for what is not there
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                self._take_lock(lock_timeout_s)
            self.index_fd = self._open_file(f"{slab.name}.index", os.O_RDONLY if lock_timeout_s is None else os.O_RDWR)
            self._read_header()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise _explain(error, Path(str(slab))) from error
            raise

    def read_records(self) -> tuple[RecordArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Read the records of all slots.

        Returns
        -------
        records : (num_slots,) of RECORD_DTYPE
        is_live : (num_slots,) bool
            Which ones name a block that counts.
        is_damaged : (num_slots,) bool
            Which ones are neither that nor free, nor were forgotten by a reset of the whole slab.

        Raises
        ------
        SlabFormatError
            There is no header.
        StorageError
            The index cannot be read.
        """
        header = self.header
        if header is None:
            raise SlabFormatError(f"{self.slab}: {self.problem}")
        records: RecordArray = np.zeros(header.num_slots, dtype=RECORD_DTYPE)
        self._read_into(records, 0)
        good, damaged = _judge(records, header)
        page = DIRECT_NBYTES // RECORD_NBYTES
        for _ in range(0 if self._lock is not None else _NUM_TRIES):  # its owner may have been writing them
            for first in np.unique(np.flatnonzero(damaged) // page) * page:
                part = records[first : first + page]
                self._read_into(part, int(first))
                good[first : first + page], damaged[first : first + page] = _judge(part, header)
        return records, good, damaged

    def open_data(self, *, use_direct_io: bool) -> tuple[int, str]:
        """Open the data file for reading.

        Returns
        -------
        fd : int
            The caller's to close.
        io_mode : str
            "direct" or "buffered".
        """
        name = f"{self.slab.name}.blocks"
        direct = getattr(os, "O_DIRECT", 0) if use_direct_io else 0
        if direct and self.header is not None and not self.header.slot_nbytes % DIRECT_NBYTES:
            with contextlib.suppress(OSError):  # the file system cannot; what else is wrong shows below
                return self._open_file(name, os.O_RDONLY | direct), "direct"
        try:
            fd = self._open_file(name, os.O_RDONLY)
        except OSError as error:
            raise _explain(error, self.slab.directory / name) from error
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # the medium is to be read, not what is remembered of it
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return fd, "buffered"

    def describe_file(self, suffix: str) -> os.stat_result | None:
        """Describe one of the slab's files, a symbolic link itself; None where it is absent."""
        try:
            return self._os.stat(f"{self.slab.name}.{suffix}", self.directory_fd)
        except FileNotFoundError:
            return None

    def find_holder(self) -> int | None:
        """Give the process that holds the slab; None where nobody does, 0 where it cannot be told who.

        Notes
        -----
        Takes nothing and writes nothing: the kernel is asked who has the lock. Where that is not Linux, only this
        process itself is known.
        """
        look = _LookingOs()
        name = f"{self.slab.name}.lock"
        try:
            # A file that this process has locked is not opened: closing it would give the lock up.
            SlabLock(self.directory_fd, name, path=str(self.slab), timeout_s=0.0, os_calls=look).close()
        except StorageError as error:
            if error.errno == errno.EBUSY:
                return os.getpid() if look.holder is None else look.holder
            raise
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _explain(error, self.slab.directory / name) from error
        return None

    def close(self) -> None:
        """Close the files and give the lock back; may be called twice."""
        fds = self.index_fd, self.directory_fd
        self.index_fd = self.directory_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> SlabReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self, timeout_s: float) -> None:
        name = f"{self.slab.name}.lock"
        try:
            self._lock = SlabLock(self.directory_fd, name, path=str(self.slab), timeout_s=timeout_s, os_calls=self._os)
        except StorageError as error:
            if error.errno != errno.EBUSY:
                raise
            holder = self.find_holder()
            who = f"process {holder}" if holder else "another process"
            text = f"this slab is held by {who}: stop it first (kvbm disk inspect works beside it)"
            raise StorageError(errno.EBUSY, text, str(self.slab)) from error

    def _open_file(self, name: str, flags: int) -> int:
        """Open a regular file; a FIFO would be waited for without O_NONBLOCK."""
        fd = self._os.open(name, flags | os.O_NONBLOCK | SAFE_FLAGS, dir_fd=self.directory_fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StorageError(errno.EINVAL, "this is no regular file", str(self.slab.directory / name))
        return fd

    def _read_header(self) -> None:
        for _ in range(_NUM_TRIES):
            data = bytearray(NUM_HEADERS * HEADER_NBYTES)
            move_all(self._os.preadv, self.index_fd, memoryview(data), 0)
            copies = [bytes(data[i * HEADER_NBYTES :][:HEADER_NBYTES]) for i in range(NUM_HEADERS)]
            self.num_whole_headers = sum(map(_is_whole, copies))
            try:
                self.header = choose_header(copies)
                return
            except SlabVersionError as error:
                self.is_foreign, self.problem = True, str(error)
            except SlabFormatError as error:
                self.problem = str(error) if any(data) else "this slab has no header yet: it is empty"

    def _read_into(self, records: RecordArray, first: int) -> None:
        data = memoryview(records.view(np.uint8).data)
        try:
            num_read = move_all(self._os.preadv, self.index_fd, data, RECORDS_AT + first * RECORD_NBYTES)
        except OSError as error:
            raise _explain(error, Path(str(self.slab))) from error
        data[num_read:] = bytes(len(data) - num_read)  # as a storage takes what is missing: free


class _LookingOs(OsCalls):
    """Calls by which a `SlabLock` only asks whether it could be had."""

    def __init__(self) -> None:
        self.holder: int | None = None

    def open(self, path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        return super().open(path, os.O_RDONLY | os.O_NONBLOCK | SAFE_FLAGS, mode, dir_fd=dir_fd)

    def lock(self, fd: int) -> None:
        import fcntl  # not on every platform that imports kvbm

        if sys.platform == "linux":  # elsewhere the question looks different
            answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            kind, _, _, _, process = _FLOCK.unpack(answer)
            if kind != fcntl.F_UNLCK:
                self.holder = max(0, process)  # 0 or less: it lives where this process cannot see it
                raise BlockingIOError(errno.EAGAIN, "it is locked")

    def ftruncate(self, fd: int, nbytes: int) -> None:
        """Leave the file as it is."""

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        """Leave the file as it is."""
        return sum(len(buffer) for buffer in buffers)


def _judge(records: RecordArray, header: Header) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell which records count, and which are damaged."""
    good = is_live(records, header)
    is_blank = ~np.ascontiguousarray(records).view(np.uint8).reshape(-1, RECORD_NBYTES).any(axis=1)
    is_forgotten = (records["state"] == LIVE) & (records["generation"] != header.generation)
    doubtful = ~good & ~is_blank
    doubtful[doubtful] = ~(is_forgotten[doubtful] & (crc_of(records[doubtful]) == records["crc"][doubtful]))
    return good, doubtful


def _is_whole(copy: bytes) -> bool:
    try:
        decode_header(copy)
    except SlabVersionError:
        return True
    except SlabFormatError:
        return False
    return True


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | SAFE_FLAGS)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    fd = _open_folder(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _explain(error: OSError, path: Path) -> StorageError:
    code = error.errno or errno.EIO
    reason = (error.strerror or str(error)).lower()
    if code in (errno.ELOOP, errno.ENOTDIR) and (path.is_symlink() or path.parent.is_symlink()):
        reason = "this is a symbolic link, and links are not followed: give the real path"
    elif code == errno.ENOTDIR:
        reason = "this is neither a directory nor the .index file of a slab: give the directory of disk.path"
    elif code in (errno.EACCES, errno.EPERM):
        reason = f"{reason}: a slab is its owner's alone, become that user"
    return StorageError(code, reason, str(path))
