"""The native module and its process: forks, ends, and addresses that the host must not follow."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvbm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kvbm._native.simulated_device") is None, reason="the simulated device is not built"
)
PACKAGE = str(Path(kvbm.__file__).resolve().parents[1])
HEAD = """
import os, sys
import numpy as np
from kvbm._native import simulated_device as module
from kvbm.errors import DeviceError
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    return subprocess.run(
        [sys.executable, "-c", HEAD + code], env=env, capture_output=True, text=True, timeout=60, check=False
    )


CHILD = """
device = module.Device()
address, stream, event = device.allocate(4096), device.create_stream(), device.create_event()
device.fill(stream, address, 4096, 1)
stream.record(event)
calls = [
    module.device_count, lambda: module.Device(0), device.memory_info, lambda: device.allocate(8),
    lambda: device.free(address), device.create_stream, device.create_event, stream.synchronize, stream.is_idle,
    lambda: stream.record(event), lambda: stream.wait(event), event.is_done, event.synchronize,
    lambda: device.read(address, 8), lambda: device.fill(stream, address, 8, 1), lambda: device.delay(stream, 0),
    lambda: device.memcpy(stream, address, address + 64, 8), lambda: module.pointer_kind(address),
    lambda: device.register_host(address, 8), lambda: device.unregister_host(address), stream.close, event.close,
]
child = os.fork()
if child == 0:
    for i, call in enumerate(calls):
        try:
            call()
            print("call", i, "went through", flush=True)
        except DeviceError as error:
            if "this process was forked from one that uses CUDA" not in str(error) or error.code != 3:
                print("call", i, error, flush=True)
    assert "forked" in module.why_no_device()
    del calls, stream, event
    print("child is done", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
event.synchronize()
assert module.simulation.counts()["streams"] == 1 and module.simulation.counts()["events"] == 1
device.free(address)
print("parent is done")
"""


def test_forked_child_is_refused_by_every_call_and_frees_nothing() -> None:
    done = run(CHILD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child is done", "parent is done"]


def test_child_of_a_process_that_used_no_device_may_use_one() -> None:
    done = run(
        """
module.simulation.set_num_devices(0)
assert module.device_count() == 0
module.simulation.set_num_devices(1)
child = os.fork()
if child == 0:
    device = module.Device()
    device.free(device.allocate(8))
    print("child is done", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert module.device_count() == 1
"""
    )
    assert (done.returncode, done.stdout) == (0, "child is done\n"), done.stderr


@pytest.mark.parametrize("order", ["stream, event, device", "event, device, stream", "device, stream, event"])
def test_handles_that_live_until_the_end_do_not_hurt_it(order: str) -> None:
    done = run(
        f"""
device = module.Device()
stream, event = device.create_stream(), device.create_event()
address = device.allocate(1 << 20)
device.delay(stream, 0.05)
device.fill(stream, address, 1 << 20, 1)
stream.record(event)
sys.kept = [{order}]
class Late:
    def __del__(self):
        stream.close()
        event.close()
late = Late()
late.myself = late
print("end")
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(signal, "SIGSEGV"), reason="there are no signals here")
def test_host_code_that_follows_a_device_address_faults() -> None:
    done = run(
        """
import ctypes, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
device = module.Device()
address = device.allocate(4096)
ctypes.string_at(device.read(address, 8).ctypes.data, 8)
print("reading by a copy is fine", flush=True)
ctypes.string_at(address, 1)
"""
    )
    assert done.stdout == "reading by a copy is fine\n"
    assert done.returncode == -signal.SIGSEGV
