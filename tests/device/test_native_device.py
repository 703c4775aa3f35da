"""Devices and memory of the native module: over the simulation, and over CUDA where there is a device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernel_site import GPUS, Gpu, open_gpu

from kvbm.errors import ConfigError, DeviceError

HAS_CUDA_MODULE = importlib.util.find_spec("kvbm._native.device") is not None


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


@pytest.fixture
def simulated() -> Iterator[Gpu]:
    yield from open_gpu("simulated")


@pytest.mark.skipif(not HAS_CUDA_MODULE, reason="the CUDA module is not built")
def test_cuda_module_imports_and_counts_with_or_without_a_driver() -> None:
    module = importlib.import_module("kvbm._native.device")
    assert not hasattr(module, "simulation")
    driver, runtime = module.versions()
    assert runtime >= 12000
    if module.device_count() == 0:
        assert module.why_no_device()
        with pytest.raises(DeviceError, match=r"^cuda\w+ on device 0 failed: cudaError"):
            module.Device(0)
    else:
        assert driver >= 12000
        assert module.why_no_device() == ""


def test_device_tells_its_properties(gpu: Gpu) -> None:
    device = gpu.device
    assert device.index == 0
    assert device.name
    assert device.compute_capability >= (8, 0)
    assert device.has_kernels
    assert device.can_map_host
    assert device.num_multiprocessors > 0
    assert device.num_copy_engines > 0
    least, greatest = device.priorities
    assert greatest <= least
    domain, bus, rest = device.pci_bus_id.split(":")
    assert len(domain) == 4
    assert len(bus) == 2
    assert rest.endswith(".0")
    assert device.pci_bus_id == device.pci_bus_id.lower()
    free_nbytes, total_nbytes = device.memory_info()
    assert 0 < free_nbytes <= total_nbytes
    assert device.total_nbytes > 0
    assert device.l2_nbytes > 0


@pytest.mark.parametrize(("driver", "reason"), [(0, "no CUDA-capable device is detected: cudaErrorNoDevice (100)")])
def test_absent_device_is_counted_as_none_and_explained(simulated: Gpu, driver: int, reason: str) -> None:
    module = simulated.module
    module.simulation.set_num_devices(0)
    assert module.device_count() == 0
    assert module.versions()[0] == driver
    assert module.why_no_device() == reason
    with pytest.raises(DeviceError, match="invalid device ordinal"):
        module.Device(0)
    module.simulation.set_num_devices(1)


def test_too_old_driver_is_told_from_an_absent_one(simulated: Gpu) -> None:
    simulated.module.simulation.fail_call("cudaGetDeviceCount", "cudaErrorInsufficientDriver")
    assert simulated.module.why_no_device().startswith("the driver knows CUDA 13.0, needs 13.0: update it")
    assert simulated.module.why_no_device() == ""


def test_unknown_device_is_refused(gpu: Gpu) -> None:
    with pytest.raises(DeviceError) as raised:
        gpu.module.Device(99)
    assert (raised.value.code, raised.value.name, raised.value.device) == (101, "cudaErrorInvalidDevice", 99)


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 4096, 100_001])
def test_memory_is_aligned_and_holds_what_is_written(gpu: Gpu, nbytes: int) -> None:
    before = gpu.device.memory_info()[0]
    address = gpu.device.allocate(nbytes)
    assert address % 256 == 0
    data = np.arange(nbytes, dtype=np.uint32).view(np.uint8)[:nbytes]
    gpu.device.write(address, data)
    np.testing.assert_array_equal(gpu.device.read(address, nbytes), data)
    np.testing.assert_array_equal(gpu.device.read(address + nbytes - 1, 1), data[-1:])
    gpu.device.free(address)
    if gpu.is_simulated:
        assert gpu.device.memory_info()[0] == before


def test_memory_is_freed_in_any_order(gpu: Gpu) -> None:
    addresses = [gpu.device.allocate(1000) for _ in range(6)]
    for i in (3, 0, 5, 1, 4, 2):
        gpu.device.free(addresses[i])


def test_memory_that_is_not_ours_is_not_freed(gpu: Gpu) -> None:
    address = gpu.device.allocate(4096)
    with pytest.raises(DeviceError, match=r"^cudaFree on device 0 failed: cudaErrorInvalidValue \(1\)"):
        gpu.device.free(address + 256)
    gpu.device.free(address)
    with pytest.raises(DeviceError, match=r"^cudaFree on device 0 failed: cudaErrorInvalidValue \(1\)"):
        gpu.device.free(address)


def test_too_much_memory_is_refused_with_its_size(gpu: Gpu) -> None:
    with pytest.raises(DeviceError) as raised:
        gpu.device.allocate(1 << 50)
    assert str(raised.value) == (
        "cudaMalloc of 1125899906842624 bytes on device 0 failed: cudaErrorMemoryAllocation (2), out of memory"
    )
    gpu.device.free(gpu.device.allocate(1))


@pytest.mark.parametrize("nbytes", [0, -1])
def test_empty_memory_is_refused(gpu: Gpu, nbytes: int) -> None:
    with pytest.raises(ConfigError, match=rf"nbytes is {nbytes}, give 1 or more"):
        gpu.device.allocate(nbytes)


def test_memory_pressure_is_met_at_the_byte_that_was_set(simulated: Gpu) -> None:
    simulated.module.simulation.total_nbytes = 4096
    address = simulated.device.allocate(4096 - 256)
    assert simulated.device.memory_info() == (256, 4096)
    with pytest.raises(DeviceError, match="out of memory"):
        simulated.device.allocate(257)
    last = simulated.device.allocate(256)
    assert simulated.device.memory_info() == (0, 4096)
    for one in (address, last):
        simulated.device.free(one)
    assert simulated.device.memory_info() == (4096, 4096)


def test_registered_memory_is_pinned_until_it_is_unregistered(gpu: Gpu) -> None:
    memory = np.zeros(3 * 4096, dtype=np.uint8)
    base = -(-memory.ctypes.data // 4096) * 4096
    assert gpu.module.pointer_kind(base) == ("pageable", -1)
    gpu.device.register_host(base, 4096)
    assert gpu.module.pointer_kind(base + 4095)[0] == "pinned"
    with pytest.raises(DeviceError, match=r"cudaHostRegister of 8192 bytes on device 0 failed: .*AlreadyRegistered"):
        gpu.device.register_host(base, 8192)
    gpu.device.unregister_host(base)
    assert gpu.module.pointer_kind(base) == ("pageable", -1)
    with pytest.raises(DeviceError, match="cudaErrorHostMemoryNotRegistered"):
        gpu.device.unregister_host(base)


def test_device_memory_is_known_by_its_address(gpu: Gpu) -> None:
    memory = gpu.memory(100)
    assert gpu.module.pointer_kind(memory.address) == ("device", 0)


def test_two_devices_have_memory_and_errors_of_their_own(simulated: Gpu) -> None:
    module = simulated.module
    module.simulation.set_num_devices(2)
    second = module.Device(1)
    assert second.pci_bus_id != simulated.device.pci_bus_id
    address = second.allocate(512)
    assert module.pointer_kind(address) == ("device", 1)
    assert simulated.device.memory_info()[0] == simulated.device.memory_info()[1]
    second.write(address, np.arange(64, dtype=np.uint64))
    own = simulated.memory(512)
    stream = second.create_stream()
    second.memcpy(stream, own.address, address, 512)
    stream.synchronize()
    np.testing.assert_array_equal(own.image()[4096 : 4096 + 512].view(np.uint64), np.arange(64))
    simulated.device.fill(simulated.stream, address, 512, 1)
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress") as raised:
        simulated.stream.synchronize()
    assert raised.value.device == 0
    stream.synchronize()
    second.free(address)
    stream.close()
    module.simulation.reset()
    simulated.stream = simulated.device.create_stream()
    simulated._memories.clear()


def test_calls_leave_the_current_device_of_their_thread_alone(simulated: Gpu) -> None:
    module = simulated.module
    module.simulation.set_num_devices(2)
    second = module.Device(1)
    address = second.allocate(64)
    second.fill(second.adopt_stream(0), address, 64, 1)
    second.free(address)
    with pytest.raises(DeviceError):
        second.free(address)
    assert module.simulation.current_device == 0
    module.simulation.set_num_devices(1)


def test_write_wants_one_contiguous_array(simulated: Gpu) -> None:
    memory = simulated.memory(64)
    with pytest.raises(ValueError, match="data must be"):
        simulated.device.write(memory.address, np.zeros((8, 8), dtype=np.uint8)[:, ::2])


def test_reading_past_the_end_is_refused(simulated: Gpu) -> None:
    address = simulated.device.allocate(1000)
    with pytest.raises(DeviceError, match=r"cudaMemcpyAsync of 1001 bytes on device 0 failed: cudaErrorInvalidValue"):
        simulated.device.read(address, 1001)
    simulated.device.free(address)
    with pytest.raises(DeviceError, match="cudaErrorInvalidValue"):
        simulated.device.read(0, 1)


def test_thread_leaves_no_context_on_a_device_that_nobody_uses(simulated: Gpu) -> None:
    module = simulated.module
    module.simulation.reset()
    module.simulation.set_num_devices(3)
    found: list[int] = []

    def work() -> None:  # as a lane of a worker for device 2 does; its thread begins on device 0
        device = module.Device(2)
        device.free(device.allocate(64))
        found.append(module.simulation.current_device)
        device.create_stream().close()
        found.append(module.simulation.current_device)

    in_thread(work)
    in_thread(lambda: module.pointer_kind(64))
    assert [module.simulation.has_context(i) for i in range(3)] == [False, False, True]
    assert found == [2, 2]
    module.Device(0)
    in_thread(work)
    assert found[2:] == [0, 0]  # which others use: it is theirs again
    assert not module.simulation.has_context(1)
    module.simulation.reset()
    simulated.stream = simulated.device.create_stream()


def test_calls_spoil_no_capture_of_another_thread(simulated: Gpu) -> None:
    device, simulation = simulated.device, simulated.module.simulation
    host = np.zeros(4096, dtype=np.uint8)
    simulation.begin_capture()
    address, stream, event = device.allocate(4096), device.create_stream(), device.create_event()
    device.register_host(host.ctypes.data, host.nbytes)
    device.copy(
        stream, *(np.array([at], np.uint64) for at in (host.ctypes.data, address, 0, 0)), 4096,
        path="memcpy", source_on_device=False, destination_on_device=True,
    )  # fmt: skip
    stream.record(event)
    event.synchronize()
    assert event.is_done()
    stream.synchronize()
    assert stream.is_idle()
    device.unregister_host(host.ctypes.data)
    device.free(address)
    assert simulation.capture_mode == "global"  # the thread's own again
    simulation.end_capture()


def test_stream_that_captures_cannot_be_waited_for(simulated: Gpu) -> None:
    device, simulation = simulated.device, simulated.module.simulation
    engines, event = device.create_stream(), device.create_event()
    simulation.begin_capture(engines)
    with pytest.raises(DeviceError, match="the stream captures a graph"):
        engines.record(event)
    simulated.stream.record(event)  # others go on
    simulation.end_capture()
    engines.record(event)
    event.synchronize()


def in_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)
