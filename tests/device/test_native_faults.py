"""Every call that can fail does: the error says which, nothing is left behind, and the next call works."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_site import Gpu, open_gpu, words

from kvbm.errors import ConfigError, DeviceError


@pytest.fixture
def simulated() -> Iterator[Gpu]:
    yield from open_gpu("simulated")


class Scene:
    """One of everything, so that any call can be made on it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.device, self.stream = gpu, gpu.device, gpu.stream
        self.inside, self.outside = gpu.memory(4096), gpu.memory(4096, is_pinned=True)
        self.scratch, self.pinned = gpu.memory(4096), gpu.memory(4096, is_pinned=True)
        self.staging, self.checksums = gpu.memory(4096), gpu.memory(4096, is_pinned=True)
        self.spare = mmap.mmap(-1, 4096)
        self.page = np.frombuffer(self.spare, dtype=np.uint8).ctypes.data
        self.begin, self.end = (self.device.create_event(with_timing=True) for _ in range(2))
        for event in (self.begin, self.end):
            self.stream.record(event)
        self.stream.synchronize()

    def copy(self, path: str, *, num_pieces: int = 1, num_blocks: int = 1, with_checksums: bool = False) -> None:
        pieces = words([0, 300, 600, 900][:num_pieces])
        blocks = np.arange(num_blocks, dtype=np.uint64) * np.uint64(1200)
        extra = {"hashes": np.zeros((num_blocks, 2), np.uint64), "checksums": self.checksums.address}
        self.device.copy(
            self.stream,
            blocks + np.uint64(self.outside.address),
            blocks + np.uint64(self.inside.address),
            pieces,
            pieces,
            100,
            path=path,
            source_on_device=False,
            destination_on_device=True,
            scratch=(self.scratch.address, 4096),
            pinned=self.pinned.address,
            staging=(self.staging.address + 256 - self.staging.address % 256, 3000),
            **(extra if with_checksums else {}),
        )

    def permute(self) -> None:
        self.device.permute(
            self.stream,
            words([self.outside.address]),
            words([self.inside.address]),
            words([0]),
            words([0]),
            num_tokens=4,
            num_heads=2,
            head_nbytes=16,
            source_strides=(32, 16),
            destination_strides=(16, 64),
            scratch=(self.scratch.address, 4096),
            pinned=self.pinned.address,
        )

    def checksum(self) -> None:
        self.device.checksum(
            self.stream,
            words([self.inside.address]),
            words([0]),
            4096,
            np.zeros((1, 2), np.uint64),
            scratch=(self.scratch.address, 4096),
            pinned=self.pinned.address,
            checksums=self.checksums.address,
        )


CALLS: dict[str, list[Callable[[Scene], Any]]] = {
    "cudaGetDeviceProperties": [lambda scene: scene.gpu.module.Device(0)],
    "cudaDeviceGetAttribute": [lambda scene: scene.gpu.module.Device(0)],
    "cudaDeviceGetPCIBusId": [lambda scene: scene.gpu.module.Device(0)],
    "cudaDeviceGetStreamPriorityRange": [lambda scene: scene.gpu.module.Device(0)],
    "cudaFuncGetAttributes": [lambda scene: scene.gpu.module.Device(0)],
    "cudaDriverGetVersion": [lambda scene: scene.gpu.module.versions()],
    "cudaRuntimeGetVersion": [lambda scene: scene.gpu.module.versions()],
    "cudaGetDevice": [lambda scene: scene.device.memory_info(), lambda scene: scene.copy("memcpy")],
    "cudaMalloc": [lambda scene: scene.device.allocate(100)],
    "cudaFree": [lambda scene: scene.device.free(scene.inside._base)],
    "cudaMemGetInfo": [lambda scene: scene.device.memory_info()],
    "cudaHostRegister": [lambda scene: scene.device.register_host(scene.page, 4096)],
    "cudaHostUnregister": [lambda scene: scene.device.unregister_host(scene.outside._base)],
    "cudaPointerGetAttributes": [lambda scene: scene.gpu.module.pointer_kind(scene.inside.address)],
    "cudaStreamCreateWithPriority": [lambda scene: scene.device.create_stream()],
    "cudaStreamDestroy": [lambda scene: scene.device.create_stream().close()],
    "cudaStreamSynchronize": [lambda scene: scene.stream.synchronize()],
    "cudaStreamQuery": [lambda scene: scene.stream.is_idle()],
    "cudaStreamWaitEvent": [lambda scene: scene.stream.wait(scene.begin)],
    "cudaEventCreateWithFlags": [lambda scene: scene.device.create_event()],
    "cudaEventDestroy": [lambda scene: scene.device.create_event().close()],
    "cudaStreamIsCapturing": [lambda scene: scene.stream.record(scene.begin)],
    "cudaEventRecord": [lambda scene: scene.stream.record(scene.begin)],
    "cudaEventQuery": [lambda scene: scene.begin.is_done()],
    "cudaEventSynchronize": [lambda scene: scene.begin.synchronize()],
    "cudaEventElapsedTime": [lambda scene: scene.begin.elapsed_s(scene.end)],
    "cudaMemcpyAsync": [
        lambda scene: scene.device.memcpy(scene.stream, scene.inside.address, scene.outside.address, 8),
        lambda scene: scene.device.read(scene.inside.address, 8),
        lambda scene: scene.copy("memcpy"),
        lambda scene: scene.copy("kernel"),
        lambda scene: scene.copy("staged"),
        lambda scene: scene.permute(),
        lambda scene: scene.checksum(),
    ],
    "cudaMemcpy2DAsync": [lambda scene: scene.copy("memcpy", num_pieces=4)],
    "cudaMemcpy3DAsync": [lambda scene: scene.copy("memcpy", num_pieces=4, num_blocks=2)],
    "cuMemcpyBatchAsync": [lambda scene: scene.copy("batch")],
    "cudaSetDevice": [lambda scene: scene.copy("batch")],
    "cudaMemsetAsync": [lambda scene: scene.checksum(), lambda scene: scene.copy("memcpy", with_checksums=True)],
    "cudaLaunchKernel": [
        lambda scene: scene.device.fill(scene.stream, scene.inside.address, 8, 1),
        lambda scene: scene.device.delay(scene.stream, 0.0),
        lambda scene: scene.copy("kernel"),
        lambda scene: scene.copy("kernel", with_checksums=True),
        lambda scene: scene.copy("staged"),
        lambda scene: scene.permute(),
        lambda scene: scene.checksum(),
    ],
}
CASES = [pytest.param(name, call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls)]


@pytest.mark.parametrize(("name", "call"), CASES)
def test_call_that_fails_says_so_leaks_nothing_and_may_be_tried_again(
    simulated: Gpu, name: str, call: Callable[[Scene], Any]
) -> None:
    scene = Scene(simulated)
    simulation = simulated.module.simulation
    before = simulation.counts()
    simulation.fail_call(name, "cudaErrorUnknown")
    with pytest.raises(DeviceError) as raised:
        call(scene)
    assert (raised.value.name, raised.value.code, raised.value.text) == ("cudaErrorUnknown", 999, "unknown error")
    is_launch = name == "cudaLaunchKernel"
    of_part = raised.value.call.startswith((name, "launch of the checksum kernel", "launch of the copy kernel"))
    assert raised.value.call.startswith("launch of the ") if is_launch else of_part
    simulated.stream.synchronize()
    after = simulation.counts()
    if name in ("cudaStreamDestroy", "cudaEventDestroy"):  # what could not be destroyed is still there
        before["streams" if name == "cudaStreamDestroy" else "events"] += 1
    assert after == before
    call(scene)
    simulated.stream.synchronize()
    if name in ("cudaFree", "cudaHostUnregister"):
        simulated._memories.remove(scene.inside if name == "cudaFree" else scene.outside)
    if name == "cudaHostRegister":
        simulated.device.unregister_host(scene.page)


def test_every_call_that_the_simulation_knows_is_made_to_fail() -> None:
    sources = Path(__file__).resolve().parents[2] / "cuda" / "simulated"
    if not sources.is_dir():
        pytest.skip("the CUDA sources are not beside the tests")
    text = "".join(path.read_text(encoding="utf-8") for path in sources.glob("*.cpp"))
    names = set(re.findall(r'(?:injected\(|enter\(lock, )"(\w+)"\)', text))
    assert len(names) > 30
    # Counting is not to fail, no kernel asks for more shared memory than all have, and the next test has the last one.
    others = {"cudaGetDeviceCount", "cudaFuncSetAttribute", "cudaThreadExchangeStreamCaptureMode"}
    assert names - set(CALLS) == others


def test_capture_mode_that_cannot_be_exchanged_fails_no_call(simulated: Gpu) -> None:
    scene = Scene(simulated)

    def work() -> None:
        for after in (0, 1):  # as a call begins, and as it ends: a launch that follows must not take it for its own
            simulated.module.simulation.fail_call("cudaThreadExchangeStreamCaptureMode", "cudaErrorUnknown", after)
            scene.copy("kernel", with_checksums=True)
            scene.copy("kernel", with_checksums=True)
        simulated.stream.synchronize()

    with ThreadPoolExecutor(1) as pool:  # a thread of its own: its mode stays as the failure leaves it
        pool.submit(work).result(60)


def test_unknown_error_is_refused(simulated: Gpu) -> None:
    with pytest.raises(ConfigError, match="'cudaErrorNone' is not an error of the simulation"):
        simulated.module.simulation.fail_call("cudaMalloc", "cudaErrorNone")


def test_fault_strikes_after_as_many_calls_as_were_said(simulated: Gpu) -> None:
    simulated.module.simulation.fail_call("cudaMalloc", 2, after=2)
    addresses = [simulated.device.allocate(8) for _ in range(2)]
    with pytest.raises(DeviceError, match="cudaErrorMemoryAllocation"):
        simulated.device.allocate(8)
    addresses.append(simulated.device.allocate(8))
    for address in addresses:
        simulated.device.free(address)


@pytest.mark.parametrize("after", [0, 1])
def test_operation_that_fails_loses_its_device_and_everybody_hears(simulated: Gpu, after: int) -> None:
    simulation, device = simulated.module.simulation, simulated.device
    simulation.set_num_devices(2)
    second = simulated.module.Device(1)
    other, event = device.create_stream(), device.create_event()
    memory = simulated.memory(64)
    simulation.set_mode("stepped")
    simulation.fail_operation("cudaErrorIllegalAddress", after)
    for seed in range(2):
        device.fill(simulated.stream, memory.address, 64, seed)
    simulated.stream.record(event)
    other.wait(event)
    assert simulation.advance(simulated.stream, after) == after
    for call in (event.synchronize, other.synchronize, simulated.stream.is_idle, lambda: device.allocate(8)):
        with pytest.raises(DeviceError, match=r"cudaErrorIllegalAddress \(700\)"):
            call()
    assert simulation.counts()["waiting"] == 0
    second.free(second.allocate(8))
    simulation.reset()
    simulated._memories.clear()
    simulated.device.free(simulated.device.allocate(8))
    other.close()
    event.close()


def test_kernel_that_writes_one_byte_too_far_is_seen(simulated: Gpu) -> None:
    address = simulated.device.allocate(1000)
    simulated.device.fill(simulated.stream, address, 1001, 1)
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        simulated.stream.synchronize()
    simulated.module.simulation.reset()


def test_kernel_that_touches_unregistered_memory_is_seen(simulated: Gpu) -> None:
    pageable = np.zeros(4096, dtype=np.uint8)
    simulated.device.fill(simulated.stream, pageable.ctypes.data, 64, 1)
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        simulated.stream.synchronize()
    assert not pageable.any()
    simulated.module.simulation.reset()


def test_memory_unregistered_while_a_copy_waits_is_seen(simulated: Gpu) -> None:
    scene = Scene(simulated)
    simulated.module.simulation.set_mode("stepped")
    scene.copy("memcpy")
    simulated.device.unregister_host(scene.outside._base)
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        simulated.stream.synchronize()
    simulated._memories.clear()
    simulated.module.simulation.reset()


def test_failed_launch_leaves_no_error_for_the_next(simulated: Gpu) -> None:
    simulated.module.simulation.fail_call("cudaMalloc", 2)
    with pytest.raises(DeviceError):
        simulated.device.allocate(8)
    memory = simulated.memory(64)
    simulated.device.fill(simulated.stream, memory.address, 64, 1)
    simulated.stream.synchronize()
