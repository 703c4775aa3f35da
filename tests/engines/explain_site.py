"""What the tests of ``kvbm explain`` share: a history to ask, and a client that reads what comes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvbm.engines.explain_socket import VERSION, ExplainSocket, Question
from kvbm.engines.history import History

Serve = Callable[..., ExplainSocket]
LIST = Question(VERSION, "list")


def make_history_of(*request_ids: str) -> History:
    """Make a history of requests that matched nothing, of an engine without tiers."""
    history = History([], block_tokens=16)
    for request_id in request_ids:
        names = np.ones((3, 2), dtype=np.uint64)
        history.asked(request_id, names, num_computed=0, most=3, num_there=0, num_blocks=0)
    return history


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(60.0)
    client.connect(str(path))
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):  # where we have sent more than was read
        while part := client.recv(1 << 16):
            data += part
    return data
