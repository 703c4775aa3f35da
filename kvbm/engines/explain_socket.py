"""The socket on which a connector's scheduler half explains itself: for its own user, one thread, small questions.

A frame is four bytes of length, big-endian, and JSON. One client is served at a time and for a few seconds at most; the
scheduler never waits for it, for what it reads needs no lock. The file appears under its name only once somebody
listens there, so whoever finds one where nobody does may remove it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import select
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from kvbm.engines.explanation import Explanation, Summary, explain, summarise
from kvbm.engines.history import History
from kvbm.errors import StorageError

_log = logging.getLogger("kvbm.engines")

VERSION = 1
MOST_QUESTION_NBYTES = 4096
MOST_REPLY_NBYTES = 4 << 20
_DEADLINE_S = 2.0  # of one client, in all
_PAUSE_S = 1.0  # where no connection can be taken, e.g. for want of descriptors
_SOCKETS = 9  # of one process: one for each engine in it
_CANDIDATES = 20
_STALE_S = 60.0  # age of a file that never got its name
_NAME = re.compile(r"kvbm-(\d+)(?:-\d)?\.sock")
_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Question(msgspec.Struct, frozen=True):
    """What a client asks.

    Attributes
    ----------
    verb : str
        "list": the recent requests; "explain": one of them.
    request_id : str
        Or the beginning of one.
    limit : int
        Requests in a list, the youngest.
    """

    version: int
    verb: Literal["list", "explain"]
    request_id: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    limit: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 50


class Reply(msgspec.Struct, frozen=True):
    """What a client is told.

    Attributes
    ----------
    error : str
        "" where the question was answered.
    num_known : int
        Requests that are remembered.
    summaries : list of Summary
        Youngest first; of several requests whose ids begin as asked, too.
    explanation : Explanation, optional
        Of the one request that was meant.
    """

    version: int
    pid: int
    error: str = ""
    num_known: int = 0
    summaries: list[Summary] = []
    explanation: Explanation | None = None


# -- where sockets lie -----------------------------------------------------------------------------------------


def runtime_folders(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Give the folders where sockets of this user lie, the one that is used first; they need not exist.

    Parameters
    ----------
    environ : mapping, optional
        Default: this process's environment.
    """
    environ = os.environ if environ is None else environ
    folders = [Path(tempfile.gettempdir()) / f"kvbm-{os.geteuid()}"]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if Path(runtime).is_absolute():
        folders.insert(0, Path(runtime) / "kvbm")
    return folders


def make_folder(folder: Path) -> None:
    """Make a folder that only this user can look into, or see that it is one.

    Raises
    ------
    StorageError
        It belongs to others, others can look into it, or it cannot be made.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(error.errno, f"cannot be made: {error.strerror}", str(folder)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        text = f"is not a folder of this user alone (owner {found.st_uid}, mode {stat.filemode(found.st_mode)})"
        raise StorageError(errno.EACCES, f"{text}: remove it", str(folder))


def find_sockets(folder: Path) -> list[tuple[int, Path]]:
    """Give process id and path of every socket in a folder on which somebody listens; remove the others."""
    found = []
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is None:
            _remove_leftover(path)
        elif _is_listening(path):
            found.append((int(match[1]), path))
    return found


def _is_listening(path: Path) -> bool:
    """Tell whether somebody listens there; where surely nobody does, remove the file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
    return True


def _remove_leftover(path: Path) -> None:
    with contextlib.suppress(OSError):
        is_old = time.time() - path.lstat().st_mtime > _STALE_S
        if is_old and path.name.startswith(".kvbm-") and stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


# -- frames ----------------------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """Put its length before a message."""
    return _LENGTH.pack(len(data)) + data


def length_of(head: bytes) -> int:
    """Read the four bytes before a message."""
    (nbytes,) = _LENGTH.unpack(head)
    return int(nbytes)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Give process id and user id of the other end, as the kernel knows them."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def answer(data: bytes, history: History) -> Reply:
    """Answer a question; what cannot be read is answered with an error.

    Parameters
    ----------
    data : bytes
        JSON of a `Question`.
    history : History
    """
    pid = os.getpid()
    try:
        question = msgspec.json.decode(data, type=Question)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        return Reply(VERSION, pid, error=f"this is no question: {error}")
    if question.version != VERSION:
        return Reply(VERSION, pid, error=f"this process speaks version {VERSION}, was asked in {question.version}")
    records = history.records()
    if question.verb == "list":
        youngest = records[len(records) - min(question.limit, len(records)) :]
        return Reply(
            VERSION, pid, num_known=len(records), summaries=[summarise(one, history) for one in reversed(youngest)]
        )
    meant = {one.request_id: one for one in records if one.request_id.startswith(question.request_id)}
    if question.request_id in meant:
        meant = {question.request_id: meant[question.request_id]}
    if len(meant) != 1:
        several = [summarise(one, history) for one in list(meant.values())[: -_CANDIDATES - 1 : -1]]
        return Reply(VERSION, pid, num_known=len(records), summaries=several)
    (record,) = meant.values()
    return Reply(VERSION, pid, num_known=len(records), explanation=explain(record, history, records))


# -- the listening end -----------------------------------------------------------------------------------------


class ExplainSocket:
    """Answers questions about recent requests, until it is closed.

    Parameters
    ----------
    history : History
    folder : Path
        Of this user alone; see `make_folder`.
    deadline_s : float
        Of one client, from connecting to its last byte.

    Raises
    ------
    StorageError
        No socket can be had there.

    Attributes
    ----------
    path : Path
    """

    def __init__(self, history: History, folder: Path, *, deadline_s: float = _DEADLINE_S) -> None:
        self._history = history
        self._deadline_s = deadline_s
        self._pid = os.getpid()
        make_folder(folder)
        find_sockets(folder)  # removes what others have left
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path = self._listen(folder)
        except OSError as error:
            self._listener.close()
            text = f"cannot listen here: {error.strerror or error}"
            raise StorageError(error.errno or errno.ENAMETOOLONG, text, str(folder)) from error
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="kvbm-explain", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and remove the file; may be called twice."""
        if self._listener.fileno() < 0 or os.getpid() != self._pid:  # a child's copy is not to end its parent's
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._waker.close()  # which the thread sees
        self._thread.join()
        self._listener.close()
        self._woken.close()

    # -- private -----------------------------------------------------------------------------------------------

    def _listen(self, folder: Path) -> Path:
        """Listen under a name of no meaning, then give it its own."""
        hidden = folder / f".kvbm-{self._pid}-{secrets.token_hex(4)}"
        self._listener.setblocking(False)
        self._listener.bind(str(hidden))
        try:
            hidden.chmod(0o600)
            self._listener.listen(16)
            for number in range(1, _SOCKETS + 1):
                path = folder / (f"kvbm-{self._pid}-{number}.sock" if number > 1 else f"kvbm-{self._pid}.sock")
                if _is_listening(path):  # another engine of this process, or of another namespace
                    continue
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(hidden)
                    return path
        finally:
            hidden.unlink()
        raise OSError(errno.EADDRINUSE, f"{_SOCKETS} sockets of process {self._pid} are in use")

    def _run(self) -> None:
        while self._wait(self._listener, select.POLLIN, None):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError as error:
                _log.warning("explain socket: no connection can be taken error=%r", error)
                self._wait(None, 0, time.monotonic() + _PAUSE_S)
                continue
            with connection:
                try:
                    self._serve(connection)
                except OSError as error:
                    _log.debug("explain socket: client lost error=%r", error)
                except Exception:  # the next question may do better
                    _log.exception("explain socket: a question could not be answered")

    def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        deadline = time.monotonic() + self._deadline_s
        pid, uid = peer_of(connection)
        if uid not in (os.geteuid(), 0):
            _log.warning("explain socket: refused pid=%d uid=%d", pid, uid)
            return
        nbytes = length_of(self._receive(connection, _LENGTH.size, deadline))
        if nbytes > MOST_QUESTION_NBYTES:
            text = f"a question has {nbytes} bytes, at most {MOST_QUESTION_NBYTES} are read"
            reply = Reply(VERSION, self._pid, error=text)
        else:
            reply = answer(self._receive(connection, nbytes, deadline), self._history)
        data = memoryview(frame(msgspec.json.encode(reply)))
        while data:
            if not self._wait(connection, select.POLLOUT, deadline):
                raise TimeoutError("the client does not read")
            data = data[connection.send(data) :]

    def _receive(self, connection: socket.socket, nbytes: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while nbytes:
            if not self._wait(connection, select.POLLIN, deadline):
                raise TimeoutError("the client does not ask")
            part = connection.recv(nbytes)
            if not part:
                raise ConnectionResetError("the client has gone")
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)

    def _wait(self, ready: socket.socket | None, events: int, deadline: float | None) -> bool:
        """Wait until a socket is ready; return False where the time is over, or it is closed."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if ready is not None:
            poll.register(ready, events)
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        found = poll.poll(None if seconds is None else 1000 * seconds)
        return bool(found) and all(number != self._woken.fileno() for number, _ in found)


def open_explain(history: History, folders: Sequence[Path] | None = None) -> ExplainSocket | None:
    """Open a socket in the first folder where that can be done; say so where it cannot, for nothing else needs it.

    Parameters
    ----------
    history : History
    folders : sequence of Path, optional
        Default: `runtime_folders`.
    """
    problems = []
    for folder in runtime_folders() if folders is None else folders:
        try:
            return ExplainSocket(history, folder)
        except StorageError as error:
            problems.append(str(error))
    _log.warning("kvbm explain cannot look into this process: %s", "; ".join(problems))
    return None
