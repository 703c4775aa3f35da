"""The GPU of these tests: the simulated one everywhere, and the real one where there is one (marker ``gpu``)."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from kvbm._backend import load_device_module
from kvbm.errors import KvbmError
from kvbm.gpu import Gpu, find_gpu
from kvbm.gpu.runtime import forget_gpus
from kvbm.testing.simulated_gpu import SimulatedGpu

LEGS = ["simulated", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.lru_cache
def why_no_gpu() -> str:
    """Give the reason why there is no real GPU, nothing where there is one."""
    try:
        find_gpu("cuda")
    except KvbmError as error:
        return str(error)
    return ""


@pytest.fixture(name="why_no_gpu")
def _why_no_gpu() -> Callable[[], str]:
    return why_no_gpu


@pytest.fixture(params=LEGS)
def leg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the value of ``KVBM_DEVICE`` that holds during the test."""
    if request.param == "simulated" and importlib.util.find_spec("kvbm._native.simulated_device") is None:
        pytest.skip("this build has no simulated device")
    if request.param == "cuda" and why_no_gpu():
        pytest.skip("GPU tests not run")
    monkeypatch.setenv("KVBM_DEVICE", request.param)
    return request.param


@pytest.fixture
def gpu(leg: str) -> Iterator[Gpu]:
    """Give the device; what a test leaves behind is freed before the next."""
    if leg == "simulated":
        with SimulatedGpu() as simulated:
            yield simulated.gpu
        return
    found = find_gpu("cuda")
    assert found is not None
    yield found
    gc.collect()


@pytest.fixture
def two_gpus(leg: str) -> Iterator[tuple[Gpu, Gpu]]:
    """Give two devices of one machine."""
    module, reason = load_device_module(leg)
    assert module is not None, reason
    if leg == "cuda":
        if module.device_count() < 2:
            pytest.skip("there is one GPU, this needs two")
        yield _two(leg)
        gc.collect()
        return
    module.simulation.reset()
    module.simulation.set_num_devices(2)
    forget_gpus()
    held = SimpleNamespace(gpus=_two(leg))  # so that nothing here keeps the devices beyond the reset
    yield held.gpus
    del held.gpus
    gc.collect()
    module.simulation.reset()
    forget_gpus()


def _two(leg: str) -> tuple[Gpu, Gpu]:
    first, second = find_gpu(leg, index=0), find_gpu(leg, index=1)
    assert first is not None
    assert second is not None
    return first, second
