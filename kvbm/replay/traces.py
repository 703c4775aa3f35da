"""Reads request traces: Mooncake's (a request a line) and agent sessions (a session a line), plain or gzipped.

Ids in a trace are digests already. They become 16-byte sequence hashes by BLAKE2b over a namespace and the id; the ids
of agent sessions are local, so the session's id is part of the namespace. A trace tells when requests came: Mooncake
in milliseconds, agent sessions in seconds, each session from its own start.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvbm.errors import TraceError
from kvbm.types import HASH_NBYTES, HashArray

_FORMATS = "Mooncake's (objects with hash_ids) or agent sessions (objects with id and requests), one JSON object a line"
_MAX_TIME = 1e15  # beyond it milliseconds are no longer told apart


@dataclass(frozen=True)
class TraceRequest:
    """One request: its block hashes, or the tokens from which a manager makes them.

    Attributes
    ----------
    hashes : (num_blocks, 2) uint64 or None
    tokens : (num_tokens,) uint32 or None
    salt : bytes
        Keeps the tokens of one tenant apart from another's.
    time_s : float
        When it came, in seconds from the start of the trace, or of its session.
    session : str
        Requests of one session follow one another; those without a session wait for nobody.
    """

    hashes: HashArray | None = None
    tokens: Any = None
    salt: bytes = b""
    time_s: float = 0.0
    session: str = ""


@dataclass(frozen=True)
class _Entry:
    """What a line tells of one request."""

    namespace: str  # of its ids
    ids: list[int]
    time_s: float
    session: str


class _Session(msgspec.Struct):
    id: str
    requests: list[dict[str, Any]]


def read_trace(path: str | Path, *, limit: int | None = None) -> list[TraceRequest]:
    """Read a trace in the order in which its requests came.

    Parameters
    ----------
    path : str or Path
        Gzip is known by its first bytes, whatever the file's name.
    limit : int, optional
        Stop after so many requests.

    Raises
    ------
    TraceError
        The file is absent, cut off, or no trace; the message names the line.
    """
    requests: list[TraceRequest] = []
    names: dict[tuple[str, int], bytes] = {}
    for number, line in _lines(Path(path)):
        place = f"{path}, line {number}"
        try:
            fields = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            before = f", or give --requests {len(requests)} to use what is before" if requests else ""
            raise TraceError(
                f"{place}: not a whole JSON object ({error}); the file may be cut off: fetch it again{before}"
            ) from error
        for entry in _requests_of(fields, place):
            hashes = _hashes_of(entry.namespace, entry.ids, names)
            requests.append(TraceRequest(hashes=hashes, time_s=entry.time_s, session=entry.session))
            if limit is not None and len(requests) >= limit:
                return requests
    if not requests:
        raise TraceError(f"{path}: no request in it; expected {_FORMATS}")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as packed:
            is_gzip = path.suffix == ".gz" or packed.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(packed) if is_gzip else packed as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path}: the compressed file is damaged or cut off ({error}): fetch it again") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _requests_of(fields: Any, place: str) -> Iterator[_Entry]:
    if isinstance(fields, dict) and "hash_ids" in fields:
        yield _Entry("mooncake", _ids_of(fields, place), _time_of(fields, "timestamp", place) / 1000, "")
    elif isinstance(fields, dict) and "requests" in fields:
        try:
            session = msgspec.convert(fields, _Session)
        except msgspec.ValidationError as error:
            raise TraceError(f"{place}: not an agent session: {error}") from error
        yield from _agent_requests(session.requests, session.id, place)
    else:
        raise TraceError(f"{place}: not a request; expected {_FORMATS}")


def _agent_requests(requests: list[dict[str, Any]], session_id: str, place: str) -> Iterator[_Entry]:
    """Give a session's requests in order; those of a subagent stand where the subagent was called."""
    waiting = list(reversed(requests))
    time_s = 0.0
    while waiting:
        request = waiting.pop()
        time_s = max(time_s, _time_of(request, "t", place))  # those of a subagent may have none
        if request.get("hash_ids") is not None:
            yield _Entry(f"agent/{session_id}", _ids_of(request, place), time_s, session_id)
        nested = request.get("requests") or []
        if not isinstance(nested, list) or not all(isinstance(entry, dict) for entry in nested):
            raise TraceError(f"{place}: the requests of a subagent are no list of objects")
        waiting.extend(reversed(nested))


def _time_of(request: dict[str, Any], key: str, place: str) -> float:
    """Give when a request came; 0 where its trace does not say."""
    value = request.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MAX_TIME:
        raise TraceError(f"{place}: {key} must be a time, 0 or more")
    return float(value)


def _ids_of(request: dict[str, Any], place: str) -> list[int]:
    ids = request["hash_ids"]
    if not isinstance(ids, list) or not all(isinstance(value, int) and not isinstance(value, bool) for value in ids):
        raise TraceError(f"{place}: hash_ids must be a list of integers")
    return ids


def _hashes_of(namespace: str, ids: Sequence[int], names: dict[tuple[str, int], bytes]) -> HashArray:
    digests = []
    for value in ids:
        name = names.get((namespace, value))
        if name is None:
            name = hashlib.blake2b(f"{namespace}/{value}".encode(), digest_size=HASH_NBYTES).digest()
            names[namespace, value] = name
        digests.append(name)
    hashes: HashArray = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    return hashes
