"""The asking end of a connector's explain socket."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvbm.engines.explain_socket import (
    MOST_REPLY_NBYTES,
    VERSION,
    Question,
    Reply,
    find_sockets,
    frame,
    length_of,
    peer_of,
    runtime_folders,
)
from kvbm.errors import MessageError, StorageError

_TIMEOUT_S = 5.0


def find_processes(folders: Sequence[Path] | None = None) -> list[tuple[int, Path]]:
    """Give process id and socket of each connector that listens; of one process there may be several.

    Parameters
    ----------
    folders : sequence of Path, optional
        Default: `runtime_folders`.
    """
    return [found for folder in (runtime_folders() if folders is None else folders) for found in find_sockets(folder)]


def ask(path: Path, question: Question, *, timeout_s: float = _TIMEOUT_S) -> Reply:
    """Ask one connector.

    Parameters
    ----------
    path : Path
    question : Question
    timeout_s : float
        For the whole answer.

    Raises
    ------
    StorageError
        Nobody answers there, in time, or another user does.
    MessageError
        The answer cannot be read, or says that the question cannot.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            _, uid = peer_of(connection)
            if os.geteuid() not in (uid, 0):
                raise StorageError(errno.EACCES, f"user {uid} listens here, not you", str(path))
            connection.sendall(frame(msgspec.json.encode(question)))
            nbytes = length_of(_receive(connection, 4, deadline))
            if nbytes > MOST_REPLY_NBYTES:
                raise MessageError(f"an answer of {nbytes} bytes, at most {MOST_REPLY_NBYTES} are read: {path}")
            data = _receive(connection, nbytes, deadline)
        except TimeoutError as error:
            raise StorageError(errno.ETIMEDOUT, f"does not answer within {timeout_s:g} s", str(path)) from error
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(error.errno or errno.EIO, f"does not answer: {error.strerror}", str(path)) from error
    try:
        reply = msgspec.json.decode(data, type=Reply)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError(f"{path} answers what this version ({VERSION}) cannot read: {error}") from error
    if reply.error:
        raise MessageError(f"process {reply.pid} does not answer: {reply.error}")
    return reply


def _receive(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while nbytes:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(nbytes)
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "it has gone")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
