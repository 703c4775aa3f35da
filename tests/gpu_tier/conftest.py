"""The simulated GPU, running by itself or stepped by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from kvbm.testing.simulated_gpu import SimulatedGpu

HAS_SIMULATION = importlib.util.find_spec("kvbm._native.simulated_device") is not None


@pytest.fixture
def simulated() -> Iterator[SimulatedGpu]:
    """Give a GPU whose streams run by themselves."""
    if not HAS_SIMULATION:
        pytest.skip("this build has no simulated device")
    with SimulatedGpu() as simulated:
        yield simulated


@pytest.fixture
def stepped() -> Iterator[SimulatedGpu]:
    """Give a GPU whose streams stand still."""
    if not HAS_SIMULATION:
        pytest.skip("this build has no simulated device")
    with SimulatedGpu(is_stepped=True) as stepped:
        yield stepped
