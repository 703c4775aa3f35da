"""Managers for tests; after each test all are closed, and no thread, open file or block may be left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tier_site import PATIENCE_S, GatedExecutor, Site, open_files

from kvbm._backend import Backend


@pytest.fixture
def make_tiers(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("kvbm.assembly.Executor", GatedExecutor)
    before = set(threading.enumerate())
    site = Site(tmp_path, backend)
    yield site
    for gate in site.gates:
        gate.open()
    for manager in site.managers:
        manager.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} is left"
    assert open_files(tmp_path) == []
    for manager in site.managers:
        manager.check()
        for tier, status in manager.status().items():
            assert (status.mutable, status.complete, status.active) == (0, 0, 0), f"{tier} leaks: {status}"
        assert manager._planner.num_open_jobs == 0
