"""What tests of native disk queues share: the module where there is one, its kinds, operations, and a file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import load_backend
from kvbm.errors import BackendError, StorageError

PAGE = 4096
NUM_PAGES = 64  # of a queue's file
PATIENCE_S = 60
UNTOUCHED = 1 << 40  # an injected answer that leaves the call alone


def _find() -> Any:
    try:
        return load_backend("native").disk_io
    except BackendError:
        return None


disk_io = _find()


def _kinds() -> list[str]:
    """List the kinds of queue that work here: a ring may be forbidden, or unknown to the kernel."""
    if disk_io is None:
        return []
    fd = os.open(os.devnull, os.O_RDWR)
    try:
        disk_io.DiskQueue(fd, kind="uring")
    except StorageError:
        return ["threads"]
    finally:
        os.close(fd)
    return ["threads", "uring"]


KINDS = _kinds()


def aligned(num_rows: int, row_nbytes: int) -> npt.NDArray[np.uint8]:
    """Make rows of zeros whose first byte lies where direct I/O wants it."""
    raw = np.zeros(num_rows * row_nbytes + PAGE, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + num_rows * row_nbytes].reshape(num_rows, row_nbytes)


def pages(memory: npt.NDArray[np.uint8], places: Any, rows: Any) -> tuple[Any, ...]:
    """Give the operations that move rows of a page to or from places in the file."""
    offsets = np.asarray(places, dtype=np.int64) * PAGE
    addresses = (memory.ctypes.data + np.asarray(rows, dtype=np.int64) * PAGE).astype(np.uint64)
    return offsets, np.ones(len(offsets), np.int64), addresses, np.full(len(offsets), PAGE, np.uint64), memory


def wait_for(queue: Any, num_batches: int) -> list[Any]:
    """Give so many batches that have ended."""
    answers: list[Any] = []
    while len(answers) < num_batches:
        some = queue.wait(PATIENCE_S)
        assert some, "nothing ended in time"
        answers += some
    return answers


def content(fd: int) -> npt.NDArray[np.uint8]:
    """Read the whole file."""
    data = aligned(NUM_PAGES, PAGE)
    assert os.preadv(fd, [data], 0) == data.nbytes
    return data


class File:
    """As much of a slab as an engine uses."""

    def __init__(self, path: Path, nbytes: int, *, is_direct: bool) -> None:
        self.path = path
        self.io_mode = "direct" if is_direct else "buffered"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if is_direct else 0), 0o600)
        self.num_closed = 0
        os.ftruncate(self.fd, nbytes)

    @contextlib.contextmanager
    def scratch(self, nbytes: int) -> Iterator[int]:
        """Give a file to measure the device with."""
        with tempfile.TemporaryFile(dir=self.path.parent) as other:
            other.write(bytes(nbytes))
            other.flush()
            yield other.fileno()

    def close(self) -> None:
        self.num_closed += 1
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def ids(*values: int) -> npt.NDArray[np.int32]:
    """Give block ids."""
    return np.array(values, dtype=np.int32)


def rows(*values: int) -> npt.NDArray[np.int64]:
    """Give places in memory."""
    return np.array(values, dtype=np.int64)
