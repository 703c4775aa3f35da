"""Memory that several processes of one machine map: one makes it and hands it over, the others only read it.

It has no name in any file system, so no limit of one counts, and it is gone with the last process that maps it, however
that ends. It is handed over on an abstract socket, which has no file either; both ends see to it that the other is of
the same user. The only thread is the giver's: it ends with the last hand-over, or when the giver is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.storage.host import touch_pages

_log = logging.getLogger("kvbm.engines")

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_LENGTH = struct.Struct(">I")
_MOST_NBYTES = 1 << 20  # of a message
_RETRY_S = 0.02
_SEND_S = 5.0  # for one taker: what is sent fits into its socket
_BACKLOG = 128
_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class SharedMemory:
    """Bytes that other processes can map; made by `create` and `adopt`.

    Parameters
    ----------
    fd : int
        Of the memory; -1 where this process has only a mapping.
    data : (nbytes,) uint8
        The mapping.

    Attributes
    ----------
    data : (nbytes,) uint8, host
        Read-only where it was adopted; arrays taken from it keep the mapping.
    has_huge_pages : bool
        The kernel gives them to shared memory that asks for them.
    """

    def __init__(self, fd: int, data: npt.NDArray[np.uint8], *, has_huge_pages: bool = False) -> None:
        self.fd = fd
        self.data = data
        self.has_huge_pages = has_huge_pages

    @classmethod
    def create(cls, nbytes: int, *, use_huge_pages: bool = True, num_threads: int = 2) -> SharedMemory:
        """Make memory and touch all of it, by several threads; it is zero.

        Raises
        ------
        StorageError
            There is not so much.
        """
        available = available_nbytes()
        if nbytes > available:  # the kernel would only say so by killing somebody
            text = f"cannot make {nbytes} bytes of shared host memory, {available} are available: "
            raise StorageError(errno.ENOMEM, text + "give a smaller host tier")
        fd = -1
        try:
            fd = os.memfd_create("kvbm-host", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            number = getattr(error, "errno", None) or errno.EINVAL
            text = f"cannot make {nbytes} bytes of shared host memory: {error}; give a smaller host tier"
            raise StorageError(number, text) from error
        has_huge_pages = use_huge_pages and _ask_for_huge_pages(memory)
        data = np.frombuffer(memory, dtype=np.uint8)
        touch_pages([data], num_threads)
        return cls(fd, data, has_huge_pages=has_huge_pages)

    @classmethod
    def adopt(cls, fd: int, nbytes: int) -> SharedMemory:
        """Map memory of another process to read it; the descriptor is closed, whatever comes of it.

        Raises
        ------
        StorageError
            It has another size, or cannot be mapped.
        """
        try:
            found = os.fstat(fd).st_size
            if found != nbytes:
                raise StorageError(errno.EINVAL, f"got {found} bytes of shared host memory, need {nbytes}")
            memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            raise StorageError(number, f"cannot map {nbytes} bytes of shared host memory: {error}") from error
        finally:
            os.close(fd)
        return cls(-1, np.frombuffer(memory, dtype=np.uint8))

    def close(self) -> None:
        """Hand over to nobody any more; may be called again. Arrays taken from `data` stay valid."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Giver:
    """Hands memory to other processes of this user; listens from the start, gives once it is told to.

    Parameters
    ----------
    name : str
        As `name_of` makes them.
    num_takers : int
        After so many the name is free again.

    Raises
    ------
    StorageError
        Another process has this name.
    """

    def __init__(self, name: str, *, num_takers: int) -> None:
        self._num_takers = num_takers
        self._thread: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_address(name))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            text = (
                f"cannot listen at {name!r} for the other ranks: {error.strerror}; is another engine of this id here?"
            )
            raise StorageError(error.errno, text) from error

    def give(self, memory: SharedMemory, message: bytes) -> None:
        """Give memory, and a message with it, to each process that asks or has asked; does not wait for them.

        Parameters
        ----------
        memory : SharedMemory
            Not closed before this is.
        message : bytes
            At most 1 MiB.
        """
        assert self._thread is None, "given once"
        assert len(message) <= _MOST_NBYTES, "a short text"
        frame = _LENGTH.pack(len(message)) + message
        self._thread = threading.Thread(target=self._serve, args=(memory.fd, frame), name="kvbm-giver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give to nobody any more; may be called again. Who still waits is told so."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing does not
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def _serve(self, fd: int, frame: bytes) -> None:
        num_given = 0
        try:
            while num_given < self._num_takers:
                connection, _ = self._socket.accept()
                with connection:
                    num_given += _give_to(connection, fd, frame)
        except OSError as error:  # closed, as a rule; those that wait are told by their sockets
            _log.debug("giver ended num_given=%d num_takers=%d error=%s", num_given, self._num_takers, error)
        finally:
            self._socket.close()


def take(
    name: str, *, timeout_s: float = 60.0, patience_s: float = 600.0, pause: Callable[[float], None] = time.sleep
) -> tuple[int, bytes]:
    """Wait for memory that another process gives.

    Parameters
    ----------
    name : str
        Of its `Giver`.
    timeout_s : float
        Seconds until somebody listens there.
    patience_s : float
        Seconds from then on: it may be reading a large slab.
    pause : callable
        Waits for so many seconds between two tries.

    Returns
    -------
    fd : int
        The caller's.
    message : bytes

    Raises
    ------
    StorageError
        Nobody gives in time, the giver has ended, is of another user, or says something else.
    """
    with _connect(name, timeout_s, pause) as connection:
        try:
            _need_same_user(connection, "gives")
            connection.settimeout(patience_s)
            data, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
        except TimeoutError as error:
            text = f"waited {patience_s:g} s for the host memory of rank 0, which opens its tiers: see its log"
            raise StorageError(errno.ETIMEDOUT, text) from error
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            text = "rank 0 ended before it gave its host memory: see its log"
            raise StorageError(errno.ECONNRESET, text)
        try:
            (nbytes,) = _LENGTH.unpack(data + _read(connection, _LENGTH.size - len(data)))
            if len(fds) != 1 or nbytes > _MOST_NBYTES:
                raise StorageError(errno.EPROTO, f"{name!r} gives {len(fds)} memories and {nbytes} bytes: not kvbm's")
            return fds[0], _read(connection, nbytes)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def name_of(*parts: object) -> str:
    """Make the name under which processes of this user meet, from what all of them know and no others do."""
    return f"kvbm-{hashlib.sha256(repr((os.geteuid(), *parts)).encode()).hexdigest()[:32]}"


def available_nbytes() -> int:
    """Give the bytes of memory that this machine can still give out; where it does not say so, as many as there are."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError) as error:
        _log.debug("available memory is not known error=%s", error)
    return sys.maxsize


# -- private ---------------------------------------------------------------------------------------------------


def _address(name: str) -> bytes:
    return b"\0" + name.encode()  # abstract: no file


def _ask_for_huge_pages(memory: mmap.mmap) -> bool:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        setting = _SHMEM_ENABLED.read_text(encoding="ascii")
    except (AttributeError, OSError) as error:
        _log.info("huge pages refused nbytes=%d reason=%s", len(memory), error)
        return False
    return "[never]" not in setting and "[deny]" not in setting  # the wish is taken all the same


def _give_to(connection: socket.socket, fd: int, frame: bytes) -> bool:
    """Give to one process; return whether it was one of ours and got it."""
    try:
        _need_same_user(connection, "asks")
        connection.settimeout(_SEND_S)
        num_sent = socket.send_fds(connection, [frame], [fd])
        if num_sent < len(frame):  # who has all of it may be gone already
            connection.sendall(frame[num_sent:])
    except OSError as error:
        _log.warning("memory was not handed over error=%s", error)
        return False
    return True


def _connect(name: str, timeout_s: float, pause: Callable[[float], None]) -> socket.socket:
    until = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(_address(name))
            return connection
        except ConnectionRefusedError as error:  # not yet there
            connection.close()
            if time.monotonic() >= until:
                text = f"waited {timeout_s:g} s for the host memory of rank 0, which is not there: see its log"
                raise StorageError(errno.ETIMEDOUT, text) from error
            pause(_RETRY_S)
        except BaseException:
            connection.close()
            raise


def _need_same_user(connection: socket.socket, does: str) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise StorageError(errno.EACCES, f"process {pid} of user {uid} {does} host memory, need user {os.geteuid()}")


def _read(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = connection.recv(nbytes - len(data))
        if not part:
            raise StorageError(errno.ECONNRESET, "rank 0 ended while it gave its host memory: see its log")
        data += part
    return data
