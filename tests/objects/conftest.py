"""Stores to test against: memory, a directory, and a real S3 server that runs for the session."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_site import LAYOUT, PATIENCE_S, MakeStorage

from kvbm.errors import PluginError
from kvbm.layout import BlockLayout
from kvbm.storage.object_store import ObjectStorage, RetryLimits
from kvbm.testing.object_server import ObjectServer, find_weed
from kvbm.testing.proxy import FaultyProxy

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    """Give an S3 server."""
    if importlib.util.find_spec("obstore") is None:
        pytest.skip("obstore is not installed: pip install obstore")
    try:
        find_weed()
    except PluginError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="kvbm") as folder, ObjectServer(folder) as server:
        yield server


@pytest.fixture
def proxy(server: ObjectServer) -> Iterator[FaultyProxy]:
    """Give a proxy in front of the server, that lets everything pass until it is told otherwise."""
    with FaultyProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def make_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStorage]:
    """Make storages, each under a prefix of its own unless it is given, and close them."""
    made: list[ObjectStorage] = []

    def make(url: str = "memory://", *, layout: BlockLayout = LAYOUT, **settings: Any) -> ObjectStorage:
        if url.startswith(("memory", "file")):
            pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
        settings = {"fingerprint": "model", "prefix": f"test-{next(_numbers)}", **settings}
        made.append(ObjectStorage(layout, url, **settings))
        return made[-1]

    yield make
    for storage in made:
        storage.close(PATIENCE_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-objects"]


@pytest.fixture
def make_s3(server: ObjectServer, make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch) -> MakeStorage:
    """Make storages on the S3 server, `port` is that of a proxy; without waits between attempts."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    def make(*, port: int | None = None, **settings: Any) -> ObjectStorage:
        settings = {"options": server.options(port), "retries": RetryLimits(backoff_s=0.001), **settings}
        return make_storage(f"s3://{server.bucket}", **settings)

    return make


@pytest.fixture(params=["memory", "file", "s3"])
def make_any(request: pytest.FixtureRequest, make_storage: MakeStorage, tmp_path: Path) -> MakeStorage:
    """Make storages of each kind."""
    if request.param == "s3":
        make: MakeStorage = request.getfixturevalue("make_s3")
        return make
    url = "memory://" if request.param == "memory" else (tmp_path / "objects").as_uri()
    return lambda **settings: make_storage(url, **settings)
