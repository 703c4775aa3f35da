"""A manager that is forgotten closes itself: a notebook that runs a cell twice must not hold its memory twice."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest

from kvbm._backend import Backend
from kvbm.manager import BlockManager

PATIENCE_S = 60.0


def test_a_manager_that_is_dropped_warns_and_gives_its_threads_and_its_directory_back(
    backend: Backend, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    settings = {"num_layers": 1, "page_size": 4, "inner_dim": 8, "device_blocks": 4, "host_blocks": 4}
    manager = BlockManager(**settings, disk_blocks=4, disk_path=tmp_path / "disk", model="m", backend=backend)  # type: ignore[arg-type]
    memory = weakref.ref(manager.storage("host"))
    with pytest.warns(ResourceWarning, match=r"BlockManager\(device=4, host=4, disk=4 .* was dropped without close"):
        del manager  # its last reference
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), thread.name
    gc.collect()
    assert memory() is None
    with BlockManager(**settings, disk_blocks=4, disk_path=tmp_path / "disk", model="m", backend=backend) as again:  # type: ignore[arg-type]
        again.flush()
