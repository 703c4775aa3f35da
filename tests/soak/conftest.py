"""A soak runs for minutes to hours, so only where it is asked for: ``nox -s soak`` sets ``KVBM_SOAK_MINUTES``."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def minutes() -> float:
    """Give how long to run."""
    return float(os.environ["KVBM_SOAK_MINUTES"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soak out of any other run."""
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks and "KVBM_SOAK_MINUTES" not in os.environ:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]
