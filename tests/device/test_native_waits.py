"""A copy waits for streams and puts an event behind itself in the same call of the native module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kernel_site import Gpu, open_gpu, words

from kvbm.errors import ConfigError, DeviceError


@pytest.fixture
def simulated() -> Iterator[Gpu]:
    yield from open_gpu("simulated")


def _submit_small(gpu: Gpu, **arguments: Any) -> Any:
    """Copy 64 bytes to the device and give what the call gives; the memory goes with the simulation."""
    source, destination = gpu.memory(64, is_pinned=True), gpu.memory(64)
    places = [words([side.address]) for side in (source, destination)], [words([0])] * 2
    on = {"source_on_device": False, "destination_on_device": True}
    return gpu.device.copy(gpu.stream, *places[0], *places[1], 64, path="memcpy", **on, **arguments)


def ran(gpu: Gpu) -> list[str]:
    """What ran on the stream."""
    log = gpu.module.simulation.operations()
    return [kind for kind, stream, *_ in log if stream == gpu.stream.handle]


def test_copy_waits_for_streams_and_puts_an_event_behind_itself(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    others = [simulated.device.create_stream() for _ in range(2)]
    for other in others:
        simulated.device.delay(other, 0.001)
    fence = simulated.device.create_event()
    assert _submit_small(simulated, wait_for=others[:1], fence=fence) is None
    simulated.stream.synchronize()
    event = _submit_small(simulated, wait_for=others, fence=fence, with_event=True)
    for other in reversed(others):  # the second wait stands behind the first, and neither is forgotten
        before = len(ran(simulated))
        simulation.advance(simulated.stream, 100)
        assert "memcpy" not in ran(simulated)[before:]
        assert not event.is_done()
        simulation.advance(other, 100)
    simulation.advance(simulated.stream, 100)
    assert event.is_done()
    assert ran(simulated) == ["wait", "memcpy", "wait", "wait", "memcpy", "record"]


def test_copy_refuses_to_wait_without_a_fence_or_for_what_is_no_stream(simulated: Gpu) -> None:
    other, fence = simulated.device.create_stream(), simulated.device.create_event()
    with pytest.raises(ConfigError, match="waiting for 1 streams needs a fence"):
        _submit_small(simulated, wait_for=[other])
    with pytest.raises(ConfigError, match="None is no stream"):
        _submit_small(simulated, wait_for=[None], fence=fence)
    with pytest.raises(TypeError):
        _submit_small(simulated, wait_for=[fence], fence=fence)
    fence.close()
    with pytest.raises(DeviceError, match="an event is used after close"):
        _submit_small(simulated, wait_for=[other], fence=fence)
    other.close()
    with pytest.raises(DeviceError, match="a stream is used after close"):
        _submit_small(simulated, wait_for=[other], fence=simulated.device.create_event())
    assert ran(simulated) == []


@pytest.mark.parametrize("call", ["cudaEventRecord", "cudaStreamWaitEvent", "cudaEventCreateWithFlags"])
def test_copy_that_cannot_wait_or_tell_leaves_nothing_behind(simulated: Gpu, call: str) -> None:
    other, fence = simulated.device.create_stream(), simulated.device.create_event()
    simulation = simulated.module.simulation
    before = simulation.counts()["events"]
    simulation.fail_call(call, 2)
    with pytest.raises(DeviceError, match=call):
        _submit_small(simulated, wait_for=[other], fence=fence, with_event=True)
    simulated.stream.synchronize()
    assert [kind for kind in ran(simulated) if kind != "wait"] == ([] if "Create" not in call else ["memcpy"])
    simulation.fail_call("cudaEventRecord", 2)
    with pytest.raises(DeviceError, match="cudaEventRecord"):
        _submit_small(simulated, with_event=True)
    assert simulation.counts()["events"] == before
