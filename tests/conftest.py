"""Fixtures that every test may use: the twins, and a device tier that NumPy can read."""

from __future__ import annotations

import gc
import importlib.util
import os

import pytest

from kvbm._backend import Backend, load_backend

# Streams that share a hardware queue of a GPU wait for each other; tests of their order want one for each. CUDA reads
# this when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

BACKENDS = ["pure"]
if importlib.util.find_spec("kvbm._native.store") is not None:
    BACKENDS.append("native")


@pytest.fixture
def cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the device tier in host memory, also where there is a GPU: for tests that look into blocks by NumPy."""
    monkeypatch.setenv("KVBM_DEVICE", "cpu")


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are given the pure twin: they do the same on both wheels."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == "pure":
            item.add_marker("pure_twin")


def pytest_collection_finish() -> None:
    """Keep pytest's items and the modules out of the many collections that tests ask for: each would cost 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Give each twin that is installed."""
    return load_backend(request.param)
