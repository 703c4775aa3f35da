"""Streams and events of the native module: what may run when, and what becomes of handles."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_site import GPUS, POISON, Gpu, fill_bytes, open_gpu

from kvbm.errors import ConfigError, DeviceError


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


@pytest.fixture
def simulated() -> Iterator[Gpu]:
    yield from open_gpu("simulated")


def kinds(gpu: Gpu) -> list[str]:
    """What ran, without the tests' own reading and writing."""
    return [entry[0] for entry in gpu.module.simulation.operations() if not entry[0].endswith(":pageable")]


def test_event_is_done_when_the_stream_has_passed_it(gpu: Gpu) -> None:
    event = gpu.device.create_event()
    assert event.is_done()
    memory = gpu.memory(4096)
    gpu.device.fill(gpu.stream, memory.address, 4096, 3)
    gpu.stream.record(event)
    event.synchronize()
    assert event.is_done()
    np.testing.assert_array_equal(memory.image()[4096:8192], fill_bytes(3, 4096))


def test_time_between_events_is_at_least_the_delay(gpu: Gpu) -> None:
    begin, end = (gpu.device.create_event(with_timing=True) for _ in range(2))
    gpu.stream.record(begin)
    gpu.device.delay(gpu.stream, 0.02)
    gpu.stream.record(end)
    end.synchronize()
    assert 0.02 <= begin.elapsed_s(end) < 5


def test_events_without_timing_have_no_time(gpu: Gpu) -> None:
    events = [gpu.device.create_event() for _ in range(2)]
    for event in events:
        gpu.stream.record(event)
    gpu.stream.synchronize()
    with pytest.raises(DeviceError, match="cudaErrorInvalidResourceHandle"):
        events[0].elapsed_s(events[1])


def test_consumer_that_waits_sees_what_a_delayed_producer_wrote(gpu: Gpu) -> None:
    source, target = gpu.memory(4096), gpu.memory(4096)
    other, event = gpu.device.create_stream(), gpu.device.create_event()
    gpu.device.delay(gpu.stream, 0.05)
    gpu.device.fill(gpu.stream, source.address, 4096, 9)
    gpu.stream.record(event)
    other.wait(event)
    gpu.device.memcpy(other, target.address, source.address, 4096)
    other.synchronize()
    np.testing.assert_array_equal(target.image()[4096:8192], fill_bytes(9, 4096))


def test_consumer_that_does_not_wait_sees_what_was_there_before(simulated: Gpu) -> None:
    source, target = simulated.memory(4096), simulated.memory(4096)
    other = simulated.device.create_stream()
    simulated.module.simulation.set_mode("stepped")
    simulated.device.fill(simulated.stream, source.address, 4096, 9)
    simulated.device.memcpy(other, target.address, source.address, 4096)
    other.synchronize()
    assert (target.image()[4096:8192] == POISON).all()
    assert not simulated.stream.is_idle()
    simulated.stream.synchronize()


def test_nothing_runs_in_stepped_mode_until_it_is_stepped(simulated: Gpu) -> None:
    memory = simulated.memory(64)
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    for seed in range(3):
        simulated.device.fill(simulated.stream, memory.address, 64, seed)
    assert not simulated.stream.is_idle()
    assert simulation.counts()["waiting"] == 3
    assert simulation.advance(simulated.stream) == 1
    assert simulation.counts()["waiting"] == 2
    np.testing.assert_array_equal(memory.image()[4096:4160], fill_bytes(0, 64))
    assert simulation.advance(simulated.stream, 5) == 2
    assert simulation.advance(simulated.stream, 5) == 0
    assert simulated.stream.is_idle()
    np.testing.assert_array_equal(memory.image()[4096:4160], fill_bytes(2, 64))


def test_wait_holds_a_stream_until_that_record_has_run(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    other, event = simulated.device.create_stream(), simulated.device.create_event()
    memory = simulated.memory(64)
    simulated.device.fill(simulated.stream, memory.address, 64, 1)
    simulated.stream.record(event)
    other.wait(event)
    simulated.device.fill(other, memory.address, 64, 2)
    assert simulation.advance(other, 9) == 0
    assert simulation.advance(simulated.stream) == 1
    assert simulation.advance(other, 9) == 0
    assert not event.is_done()
    assert simulation.advance(simulated.stream) == 1
    assert event.is_done()
    assert simulation.advance(other, 9) == 2
    assert simulation.run_all() == 0


def test_wait_for_an_event_that_was_never_recorded_holds_nobody(simulated: Gpu) -> None:
    simulated.module.simulation.set_mode("stepped")
    simulated.stream.wait(simulated.device.create_event())
    assert simulated.stream.is_idle()


def test_wait_names_the_record_there_was_not_a_later_one(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    other, event = simulated.device.create_stream(), simulated.device.create_event()
    memory = simulated.memory(64)
    simulated.stream.record(event)
    other.wait(event)
    simulated.device.fill(simulated.stream, memory.address, 64, 1)
    simulated.stream.record(event)
    simulation.advance(simulated.stream)
    assert not event.is_done()
    assert simulation.advance(other, 9) == 1


def test_waiting_runs_what_is_needed_and_nothing_else(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    second, third = simulated.device.create_stream(), simulated.device.create_stream()
    event = simulated.device.create_event()
    memory = simulated.memory(64)
    simulated.device.fill(simulated.stream, memory.address, 64, 1)
    simulated.stream.record(event)
    simulated.device.fill(simulated.stream, memory.address, 64, 2)
    second.wait(event)
    simulated.device.fill(third, memory.address, 64, 3)
    second.synchronize()
    assert kinds(simulated) == ["kernel:fill_kernel", "record", "wait"]
    assert not simulated.stream.is_idle()
    assert not third.is_idle()


def test_held_mode_lets_waiters_sleep_until_somebody_steps(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("held")
    event, memory = simulated.device.create_event(), simulated.memory(64)
    simulated.device.fill(simulated.stream, memory.address, 64, 1)
    simulated.stream.record(event)
    order: list[str] = []
    waiter = threading.Thread(target=lambda: (event.synchronize(), order.append("waiter")))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    order.append("step")
    assert simulation.run_all() == 2
    waiter.join(10)
    assert order == ["step", "waiter"]


def test_memory_is_not_freed_under_what_still_runs(simulated: Gpu) -> None:
    simulated.module.simulation.set_mode("stepped")
    address = simulated.device.allocate(4096)
    simulated.device.fill(simulated.stream, address, 4096, 1)
    simulated.device.free(address)
    assert kinds(simulated) == ["kernel:fill_kernel"]
    simulated.stream.synchronize()


def test_stream_that_is_closed_runs_what_it_holds(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    memory, stream = simulated.memory(64), simulated.device.create_stream()
    simulated.device.fill(stream, memory.address, 64, 5)
    stream.close()
    stream.close()
    assert simulation.counts()["streams"] == 2
    simulation.run_all()
    assert simulation.counts()["streams"] == 1
    np.testing.assert_array_equal(memory.image()[4096:4160], fill_bytes(5, 64))


def test_event_that_is_dropped_still_holds_its_waiter(simulated: Gpu) -> None:
    simulation = simulated.module.simulation
    simulation.set_mode("stepped")
    other, event = simulated.device.create_stream(), simulated.device.create_event()
    memory = simulated.memory(64)
    simulated.device.fill(simulated.stream, memory.address, 64, 5)
    simulated.stream.record(event)
    other.wait(event)
    del event
    gc.collect()
    assert simulation.counts()["events"] == 0
    assert simulation.advance(other) == 0
    other.synchronize()
    assert kinds(simulated) == ["kernel:fill_kernel", "record", "wait"]


@pytest.mark.parametrize("verb", ["is_idle", "synchronize", "__cuda_stream__"])
def test_closed_stream_is_refused(gpu: Gpu, verb: str) -> None:
    stream = gpu.device.create_stream()
    stream.close()
    assert stream.handle == 0
    with pytest.raises(DeviceError, match=r"a stream is used after close\(\)"):
        getattr(stream, verb)()


def test_closed_stream_is_not_taken_for_the_default_stream(gpu: Gpu) -> None:
    memory, stream, event = gpu.memory(64), gpu.device.create_stream(), gpu.device.create_event()
    stream.close()
    calls = [
        lambda: gpu.device.memcpy(stream, memory.address, memory.address + 32, 8),
        lambda: gpu.device.fill(stream, memory.address, 8, 0),
        lambda: gpu.device.delay(stream, 0),
        lambda: stream.record(event),
        lambda: stream.wait(event),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match=r"a stream is used after close\(\)"):
            call()


@pytest.mark.parametrize("verb", ["is_done", "synchronize"])
def test_closed_event_is_refused(gpu: Gpu, verb: str) -> None:
    event = gpu.device.create_event()
    event.close()
    event.close()
    assert event.handle == 0
    with pytest.raises(DeviceError, match=r"an event is used after close\(\)"):
        getattr(event, verb)()


def test_handles_go_back_in_any_order(simulated: Gpu) -> None:
    counts = simulated.module.simulation.counts
    streams = [simulated.device.create_stream(priority=-1) for _ in range(3)]
    events = [simulated.device.create_event() for _ in range(3)]
    assert (counts()["streams"], counts()["events"]) == (4, 3)
    handles: list[Any] = [events[2], streams[0], events[0], streams[2], streams[1], events[1]]
    del streams, events
    while handles:
        handles.pop(len(handles) // 2)
        gc.collect()
    assert (counts()["streams"], counts()["events"]) == (1, 0)


def test_adopted_handles_are_left_alone(simulated: Gpu) -> None:
    counts = simulated.module.simulation.counts
    event = simulated.device.create_event()
    adopted, point = simulated.device.adopt_stream(simulated.stream.handle), simulated.device.adopt_event(event.handle)
    assert adopted.__cuda_stream__() == (0, simulated.stream.handle)
    adopted.record(point)
    assert simulated.device.adopt_stream(0).is_idle()
    adopted.close()
    point.close()
    adopted, point = simulated.device.adopt_stream(simulated.stream.handle), simulated.device.adopt_event(event.handle)
    del adopted, point
    gc.collect()
    assert (counts()["streams"], counts()["events"]) == (1, 1)
    event.synchronize()
    simulated.stream.synchronize()


def test_streams_and_events_are_made_by_a_device_only(simulated: Gpu) -> None:
    with pytest.raises(ConfigError, match=r"Device\.create_stream"):
        simulated.module.Stream()
    with pytest.raises(ConfigError, match=r"Device\.create_event"):
        simulated.module.Event()
    with pytest.raises(TypeError):
        simulated.stream.wait(None)


@pytest.mark.parametrize("seconds", [-1, 86401])
def test_delay_has_bounds(simulated: Gpu, seconds: float) -> None:
    with pytest.raises(ConfigError, match="a delay is 0 to 86400 seconds"):
        simulated.device.delay(simulated.stream, seconds)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_order_of_steps_keeps_streams_in_order_and_waits_behind_records(data: st.DataObject) -> None:
    """Random work on three streams, stepped in a random order: the log is one that CUDA allows, and all of it ran."""
    site = next(open_gpu("simulated"))
    simulation = site.module.simulation
    simulation.set_mode("stepped")
    streams = [site.device.create_stream() for _ in range(3)]
    events = [site.device.create_event() for _ in range(2)]
    memory = site.memory(64)
    expected: dict[int, list[str]] = {stream.handle: [] for stream in streams}
    recorded = [0, 0]
    for _ in range(data.draw(st.integers(1, 12))):
        stream = data.draw(st.sampled_from(streams))
        verb = data.draw(st.sampled_from(["fill", "record", "wait"]))
        which = data.draw(st.integers(0, 1))
        if verb == "fill":
            site.device.fill(stream, memory.address, 64, 1)
            expected[stream.handle].append("kernel:fill_kernel")
        elif verb == "record":
            stream.record(events[which])
            recorded[which] += 1
            expected[stream.handle].append("record")
        else:
            stream.wait(events[which])
            if recorded[which]:
                expected[stream.handle].append("wait")
    num_operations = sum(map(len, expected.values()))
    num_run = 0
    while num_run < num_operations:
        step = simulation.advance(data.draw(st.sampled_from(streams)), data.draw(st.integers(1, 3)))
        num_run += step or simulation.advance()
    ran: dict[int, list[str]] = {stream.handle: [] for stream in streams}
    for kind, handle, *_ in simulation.operations():
        if not kind.endswith(":pageable"):
            ran[handle].append(kind)
    assert ran == expected
    assert simulation.counts()["waiting"] == 0
    simulation.reset()


def test_threads_work_on_streams_of_their_own_at_once(gpu: Gpu) -> None:
    memories = [(gpu.memory(4096), gpu.memory(4096, is_pinned=True)) for _ in range(4)]
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            inside, outside = memories[number]
            stream, event = gpu.device.create_stream(), gpu.device.create_event()
            start.wait(10)
            for turn in range(20):
                gpu.device.fill(stream, inside.address, 4096, 100 * number + turn)
                gpu.device.memcpy(stream, outside.address, inside.address, 4096)
                stream.record(event)
                event.synchronize()
                np.testing.assert_array_equal(outside.image()[4096:8192], fill_bytes(100 * number + turn, 4096))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
