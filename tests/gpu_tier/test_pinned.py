"""Pinned memory serves while it is being pinned, works where it cannot be, and goes in any order."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from gpu_site import PATIENCE_S, ids, layout_of

import kvbm
from kvbm.errors import ConfigError
from kvbm.gpu import PinnedMemory
from kvbm.gpu.numa import numa_node_of, prefer_node
from kvbm.storage import HostStorage
from kvbm.testing.simulated_gpu import SimulatedGpu

PAGE = 4096


class Gated:
    """A device that registers when it is told to."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.gate = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.num_unregistered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def register_host(self, address: int, nbytes: int) -> None:
        assert self.gate.acquire(timeout=PATIENCE_S)
        self._device.register_host(address, nbytes)
        self.sizes.append(nbytes)

    def unregister_host(self, address: int) -> None:
        self._device.unregister_host(address)
        self.num_unregistered += 1


class GatedGpu:
    """A GPU with a gated device."""

    def __init__(self, simulated: SimulatedGpu) -> None:
        self.module = simulated.gpu.module
        self.device = Gated(simulated.gpu.device)
        self.is_usable = True


def test_first_slice_serves_while_the_rest_is_being_pinned(simulated: SimulatedGpu) -> None:
    gpu: Any = GatedGpu(simulated)
    gpu.device.gate.release()
    told: list[int] = []
    memory = PinnedMemory(gpu, 5 * PAGE + 100, slice_nbytes=2 * PAGE, on_progress=told.append)
    assert (memory.ready_nbytes, memory.is_complete) == (2 * PAGE, False)
    memory.memory[: 2 * PAGE] = 7
    assert memory.wait_for(2 * PAGE, timeout=0)
    assert not memory.wait_for(2 * PAGE + 1, timeout=0)
    memory.memory[2 * PAGE :] = 8  # plain memory by now
    gpu.device.gate.release()
    assert memory.wait_for(2 * PAGE + 1, PATIENCE_S)
    gpu.device.gate.release()
    assert memory.wait_for(memory.nbytes, PATIENCE_S)
    assert memory.is_complete
    assert (memory.memory[: 2 * PAGE] == 7).all()
    assert (memory.memory[2 * PAGE :] == 8).all()
    assert gpu.device.sizes == [2 * PAGE, 2 * PAGE, 2 * PAGE]
    memory.close()
    assert told == [2 * PAGE, 4 * PAGE, 5 * PAGE + 100]
    assert gpu.device.num_unregistered == 3


def test_closing_stops_pinning(simulated: SimulatedGpu) -> None:
    gpu: Any = GatedGpu(simulated)
    gpu.device.gate.release()
    memory = PinnedMemory(gpu, 8 * PAGE, slice_nbytes=PAGE)
    closing = threading.Thread(target=memory.close)
    closing.start()
    gpu.device.gate.release(2)  # the one that was begun, and none after it but one that raced
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(gpu.device.sizes) <= 3
    assert gpu.device.num_unregistered == len(gpu.device.sizes)


def test_refused_slice_leaves_the_rest_usable_and_says_so_once(
    simulated: SimulatedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    simulated.fail_call("cudaHostRegister", 2, after=2)
    memory = PinnedMemory(simulated.gpu, 6 * PAGE, slice_nbytes=PAGE)
    assert not memory.wait_for(6 * PAGE, PATIENCE_S)
    assert memory.wait_for(2 * PAGE, 0)
    assert memory.ready_nbytes == 2 * PAGE
    memory.memory[:] = 9
    assert (memory.memory == 9).all()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "8192 of 24576 bytes are pinned, the next 4096 could not be" in warnings[0]
    assert "locked memory is limited to" in warnings[0]
    assert "ulimit -l" in warnings[0]
    memory.close()


def test_memory_is_registered_until_the_last_array_goes(simulated: SimulatedGpu) -> None:
    simulation = simulated.gpu.module.simulation
    before = simulation.counts()["registrations"]
    memory = PinnedMemory(simulated.gpu, 4 * PAGE, slice_nbytes=PAGE)
    assert memory.wait_for(4 * PAGE, PATIENCE_S)
    part: Any = memory.memory[PAGE:][:10]
    memory.close()
    memory.close()
    gc.collect()
    assert simulation.counts()["registrations"] == before + 4
    part[:] = 1
    del part
    gc.collect()
    assert simulation.counts()["registrations"] == before


def test_memory_that_nobody_closes_goes_with_its_owner(simulated: SimulatedGpu) -> None:
    memory: Any = PinnedMemory(simulated.gpu, PAGE)
    is_alive = weakref.ref(memory)
    del memory
    gc.collect()
    assert is_alive() is None
    assert simulated.gpu.module.simulation.counts()["registrations"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_leaves_the_memory_alone(simulated: SimulatedGpu) -> None:
    memory: Any = PinnedMemory(simulated.gpu, 4 * PAGE)
    pid = os.fork()
    if pid == 0:
        try:
            memory.close()
            del memory
            gc.collect()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    memory.memory[:] = 3
    assert simulated.gpu.module.simulation.counts()["registrations"] == 1


def run(code: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("kvbm._native.simulated_device", reason="this build has no simulated device")
    env = {**os.environ, "PYTHONPATH": str(Path(kvbm.__file__).resolve().parents[1]), "KVBM_DEVICE": "simulated"}
    return subprocess.run(
        [sys.executable, "-c", HEAD + code], env=env, capture_output=True, text=True, timeout=60, check=False
    )


HEAD = """
import atexit, gc, mmap, os, sys
import numpy as np
from kvbm.gpu import DeviceMemory, PinnedMemory, find_gpu
gpu = find_gpu()
counts = gpu.module.simulation.counts
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_unmaps_nothing_that_it_mapped_where_its_parent_had_pinned_memory() -> None:
    done = run(
        """
import ctypes
memory = PinnedMemory(gpu, 1 << 20)
place = memory.address
child = os.fork()
if child == 0:
    map_at, number = ctypes.CDLL(None).mmap, ctypes.c_int
    map_at.restype = ctypes.c_void_p
    map_at.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
    fixed = 0x10
    assert map_at(place, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0) == place
    ctypes.memset(place, 7, 4096)
    memory.close()
    del memory
    gc.collect()
    assert ctypes.string_at(place, 4096) == bytes([7]) * 4096
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_memory_that_is_held_at_the_end_stays_for_threads_that_still_copy() -> None:
    done = run(
        """
memory, device = PinnedMemory(gpu, 4096), DeviceMemory(gpu, 4096)
array = memory.memory[:8]
def late():
    array[:] = 5
    found = counts()
    print(array.sum(), found["registrations"], found["allocations"])
atexit._run_exitfuncs()
late()
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "40 1 1\n", "")


@pytest.mark.parametrize("name", ["nbytes", "slice_nbytes", "num_threads"])
def test_impossible_sizes_are_refused(simulated: SimulatedGpu, name: str) -> None:
    with pytest.raises(ConfigError, match="of 1 or more, got"):
        PinnedMemory(simulated.gpu, **{"nbytes": PAGE, name: 0})


def test_host_storage_is_pinned_and_knows_what_is_ready(simulated: SimulatedGpu) -> None:
    layout = layout_of("contiguous")
    with HostStorage(layout, gpu=simulated.gpu) as storage:
        assert storage.wait_pinned(ids(0, 7))
        assert simulated.gpu.module.pointer_kind(storage.address(7, 2, 1)) == ("pinned", 0)
    with HostStorage(layout) as storage:
        assert not storage.wait_pinned(ids(0))


def test_host_storage_waits_only_for_the_slices_of_its_blocks(
    simulated: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu: Any = GatedGpu(simulated)
    gpu.device.gate.release()
    monkeypatch.setattr(
        PinnedMemory.__init__, "__kwdefaults__", {**PinnedMemory.__init__.__kwdefaults__, "slice_nbytes": 10 * PAGE}
    )
    aligned = layout_of("contiguous", 8, block_size=64, inner_dim=96)
    assert aligned.strides.block == 9 * PAGE
    storage = HostStorage(aligned, gpu=gpu)
    assert storage.wait_pinned(ids(0))
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(storage.wait_pinned(ids(3, 1))))
    waiting.start()
    gpu.device.gate.release(2)
    assert not answers
    gpu.device.gate.release(1)
    waiting.join(PATIENCE_S)
    assert answers == [True]
    gpu.device.gate.release(10)
    storage.close()


def test_node_of_a_device_is_read_where_the_system_tells_one(tmp_path: Path) -> None:
    for name, text in (("0000:3b:00.0", "1\n"), ("0000:3c:00.0", "-1\n"), ("0000:3d:00.0", "what")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    assert numa_node_of("0000:3B:00.0", root=tmp_path) == 1
    assert [numa_node_of(f"0000:{bus}:00.0", root=tmp_path) for bus in ("3c", "3d", "3e")] == [None] * 3


def test_memory_stays_usable_whether_or_not_the_kernel_places_it(simulated: SimulatedGpu) -> None:
    memory = PinnedMemory(simulated.gpu, 4 * PAGE)
    assert prefer_node(memory.address, 4 * PAGE, 0) in (True, False)
    assert not prefer_node(memory.address, 4 * PAGE, 1 << 20)
    memory.memory[:] = 5
    assert (memory.memory == 5).all()
