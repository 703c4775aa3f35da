"""An operating system whose power can be cut: what was not synced may be lost, page by page and sector by sector.

Files are as a process sees them; beside them it keeps what each 4096-byte page may be on the medium: what it was at the
last sync, and whatever was written since. A cut makes a copy of a directory out of these. Syncs cost nothing here.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbm.storage.disk.calls import OsCalls

PAGE_NBYTES = 4096
SECTOR_NBYTES = 512  # what a medium writes whole or not at all

Choose = Callable[[int], int]


class PowerCutOs(OsCalls):
    """Calls of a disk storage, with a power cut at any time.

    Notes
    -----
    Safe from any thread. Only what goes through `pwritev`, `ftruncate`, `posix_fallocate` and `fdatasync` is known: a
    storage must do its I/O by these calls. Names of files are on the medium at once. A cut leaves locked files out, for
    who opens and closes one gives up its lock.

    Examples
    --------
    >>> import tempfile
    >>> calls = PowerCutOs()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     before, after = Path(folder, "before"), Path(folder, "after")
    ...     before.mkdir()
    ...     fd = calls.open(before / "file", os.O_RDWR | os.O_CREAT)
    ...     _ = calls.pwritev(fd, [b"kept"], 0)
    ...     calls.fdatasync(fd)
    ...     _ = calls.pwritev(fd, [b"lost"], 0)
    ...     calls.cut(before, after, lambda num_choices: 0)
    ...     calls.close(fd)
    ...     (before / "file").read_bytes(), (after / "file").read_bytes()
    (b'lost', b'kept')
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[int, dict[int, list[bytes]]] = {}  # inode -> page -> what it may be, the oldest first
        self._locked: set[int] = set()  # inodes
        self._sizes: dict[int, int] = {}  # inode -> bytes at the last sync, where that has changed

    @property
    def num_unsynced(self) -> int:
        """Pages that a cut could lose."""
        with self._lock:
            return sum(len(pages) for pages in self._pages.values())

    def cut(self, directory: Path, into: Path, choose: Choose) -> None:
        """Make a directory of what the medium may hold of another if the power goes now.

        Parameters
        ----------
        directory : Path
            Stays as it is.
        into : Path
            Is made; sub-directories are left out.
        choose : callable
            Takes n, gives 0..n-1. Asked for each file whose size is not on the medium whether it is (0: no), for each
            page that was written since the last sync what becomes of it (0: the oldest, 1: a choice among all it was,
            2: each sector by itself), and then for those choices.
        """
        into.mkdir(0o700)
        with self._lock:
            for path in sorted(path for path in directory.iterdir() if path.is_file()):
                inode = path.stat().st_ino
                if inode in self._locked:
                    continue
                data = bytearray(path.read_bytes())
                for page, versions in sorted(self._pages.get(inode, {}).items()):
                    kept = _choose_page(versions, choose)
                    begin = page * PAGE_NBYTES
                    data[begin : begin + PAGE_NBYTES] = kept
                nbytes = path.stat().st_size
                if inode in self._sizes and not choose(2):
                    nbytes = self._sizes[inode]
                (into / path.name).write_bytes(data[:nbytes].ljust(nbytes, b"\0"))

    # -- the calls ---------------------------------------------------------------------------------------------

    def lock(self, fd: int) -> None:
        """Take the lock of a file."""
        super().lock(fd)
        with self._lock:
            self._locked.add(os.fstat(fd).st_ino)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Write, and keep what was there."""
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        pages = range(offset // PAGE_NBYTES, -(-(offset + nbytes) // PAGE_NBYTES))
        with self._lock:
            self._note_size(fd)
            known = self._pages.setdefault(os.fstat(fd).st_ino, {})
            for page in pages:
                if page not in known:
                    known[page] = [_read_page(fd, page)]
            num_written = super().pwritev(fd, buffers, offset)
            for page in pages:
                known[page].append(_read_page(fd, page))
        return num_written

    def ftruncate(self, fd: int, nbytes: int) -> None:
        """Set the size; it is on the medium after a sync."""
        with self._lock:
            self._note_size(fd)
            super().ftruncate(fd, nbytes)
            known = self._pages.get(os.fstat(fd).st_ino, {})
            for page in [page for page in known if page * PAGE_NBYTES >= nbytes]:
                del known[page]

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Allocate; the size is on the medium after a sync."""
        with self._lock:
            self._note_size(fd)
            super().posix_fallocate(fd, offset, nbytes)

    def fdatasync(self, fd: int) -> None:
        """Bring a file to the medium, as far as this one goes."""
        inode = os.fstat(fd).st_ino
        with self._lock:
            self._pages.pop(inode, None)
            self._sizes.pop(inode, None)

    def _note_size(self, fd: int) -> None:
        status = os.fstat(fd)
        self._sizes.setdefault(status.st_ino, status.st_size)


def _read_page(fd: int, page: int) -> bytes:
    buffer = mmap.mmap(-1, PAGE_NBYTES)  # lies where direct I/O wants it
    with buffer:
        os.preadv(fd, [buffer], page * PAGE_NBYTES)
        return bytes(buffer)


def _choose_page(versions: Sequence[bytes], choose: Choose) -> bytes:
    kind = choose(3)
    if kind == 0:
        return versions[0]
    if kind == 1:
        return versions[choose(len(versions))]
    sectors = range(0, PAGE_NBYTES, SECTOR_NBYTES)
    return b"".join(versions[choose(len(versions))][at : at + SECTOR_NBYTES] for at in sectors)
