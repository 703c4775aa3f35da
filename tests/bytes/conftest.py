"""Fixtures of the native disk queues: a file of pages, each kind that works here, and queues on that file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_native import KINDS, NUM_PAGES, PAGE, disk_io


@pytest.fixture(params=["direct", "buffered"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Give a file of zeros, in both ways to go to it."""
    (tmp_path / "data").write_bytes(bytes(NUM_PAGES * PAGE))
    fd = os.open(tmp_path / "data", os.O_RDWR | (os.O_DIRECT if request.param == "direct" else 0))
    yield fd
    os.close(fd)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Give each kind of queue that works here."""
    return request.param


@pytest.fixture
def make_queue(fd: int, kind: str) -> Callable[..., Any]:
    """Give what makes a queue of that kind on that file."""
    return lambda **options: disk_io.DiskQueue(fd, kind=kind, **options)
