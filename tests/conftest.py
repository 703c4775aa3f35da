"""Fixtures that every test may use: the twins."""

from __future__ import annotations

import importlib.util

import pytest

from kvbm._backend import Backend, load_backend

BACKENDS = ["pure"]
if importlib.util.find_spec("kvbm._native.store") is not None:
    BACKENDS.append("native")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Give each twin that is installed."""
    return load_backend(request.param)
