"""Streams and events of other packages are taken by what they show of themselves."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from gpu_site import ids, on_gpu

from kvbm.errors import ConfigError
from kvbm.gpu import as_stream, stream_handle
from kvbm.gpu.streams import is_event, make_wait
from kvbm.testing.simulated_gpu import SimulatedGpu


class Spoken:
    """A stream by the protocol."""

    def __init__(self, version: int = 0, handle: Any = 4711) -> None:
        self._answer = version, handle

    def __cuda_stream__(self) -> tuple[int, Any]:
        return self._answer


class TorchStream:
    cuda_stream = 4712


class CupyStream:
    ptr = 4713


class NumbaStream:
    handle = ctypes.c_void_p(4714)


class NumbaDefault:
    handle = ctypes.c_void_p(None)


CudaPython = type("CUstream", (), {"__module__": "cuda.bindings.driver", "__int__": lambda self: 4715})
CudaPythonEvent = type("CUevent", (), {"__module__": "cuda.bindings.driver", "__int__": lambda self: 4716})


class TorchEvent:
    cuda_event = 4717


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, 0),
        (0, 0),
        (2, 2),
        (2**63, 2**63),
        (Spoken(), 4711),
        (TorchStream(), 4712),
        (CupyStream(), 4713),
        (NumbaStream(), 4714),
        (NumbaDefault(), 0),
        (CudaPython(), 4715),
    ],
)
def test_every_kind_of_stream_gives_its_handle(stream: Any, handle: int) -> None:
    assert stream_handle(stream) == handle


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (Spoken(version=1), "speaks version 1 of __cuda_stream__, only 0 is known"),
        (Spoken(handle="x"), "gives 'x' as its handle, which is no integer"),
        (-1, "stream handle -1 is outside"),
        (2**64, "is outside 0"),
        (True, "True is no stream"),
        (1.5, "a builtins.float is no stream, give a stream"),
        ("default", "a builtins.str is no stream"),
        (object(), "a builtins.object is no stream"),
        (CudaPythonEvent(), "CUevent is an event, give a stream"),
        (TorchEvent(), "TorchEvent is an event, give a stream"),
    ],
)
def test_what_is_no_stream_is_refused(stream: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        stream_handle(stream)


@pytest.mark.parametrize("work", [TorchEvent(), CudaPythonEvent()])
def test_events_are_told_from_streams(work: Any) -> None:
    assert is_event(work)
    assert not is_event(TorchStream())
    assert not is_event(Spoken())
    assert not is_event(None)


def test_event_that_was_never_recorded_orders_nothing_and_is_refused(simulated: SimulatedGpu) -> None:
    waiting = simulated.gpu.device.create_stream()
    unrecorded = type("Event", (), {"cuda_event": 0})()
    with pytest.raises(ConfigError, match="was never recorded: record it behind the work"):
        make_wait(simulated.gpu, waiting, unrecorded)
    waiting.close()


def test_our_own_stream_is_taken_as_it_is(simulated: SimulatedGpu) -> None:
    stream = simulated.gpu.device.create_stream()
    assert as_stream(simulated.gpu, stream) is stream
    assert stream_handle(stream) == stream.handle
    assert as_stream(simulated.gpu, Spoken(handle=stream.handle)).handle == stream.handle
    assert as_stream(simulated.gpu, None).handle == 0


class Foreign:
    """An event of another package."""

    def __init__(self, handle: int) -> None:
        self.cuda_event = handle


@pytest.mark.parametrize("kind", ["stream", "protocol", "event", "foreign event"])
def test_stream_waits_for_what_was_queued_before(stepped: SimulatedGpu, kind: str) -> None:
    device = stepped.gpu.device
    with on_gpu(stepped.gpu) as storage:
        producer, waiting = device.create_stream(), device.create_stream()
        address = storage.address(0, 0, 0)
        device.fill(producer, address, 64, 5)
        event = device.create_event()
        producer.record(event)
        work = {
            "stream": producer,
            "protocol": Spoken(handle=producer.handle),
            "event": event,
            "foreign event": Foreign(event.handle),
        }[kind]
        make_wait(stepped.gpu, waiting, work)
        device.fill(waiting, address, 64, 6)
        assert stepped.step(waiting, 10) == 0  # the event's record has not run
        stepped.run()
        last = storage.read(ids(0))[0, :64].copy()
        device.fill(waiting, address, 64, 6)
        stepped.run()
        assert (storage.read(ids(0))[0, :64] == last).all()
