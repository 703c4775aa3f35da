"""Which GPU is used, or why none is; and that importing kvbm asks nobody."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvbm._backend import load_device_module
from kvbm.errors import BackendError, ConfigError
from kvbm.gpu import describe_gpu, find_gpu
from kvbm.gpu.runtime import forget_gpus
from kvbm.testing.simulated_gpu import SimulatedGpu

LOADED = "import sys, kvbm; print([name for name in sys.modules if 'cuda' in name or name.endswith('_device') or "
LOADED += "name == 'kvbm._native.device'])"


def test_importing_kvbm_loads_nothing_that_knows_cuda() -> None:
    answer = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert eval(answer.stdout) in ([], ["kvbm.storage.cuda", "kvbm.storage.cuda_views"])  # ours, which load nothing


def test_cpu_means_no_gpu_and_says_so() -> None:
    assert find_gpu("cpu") is None
    assert describe_gpu("cpu") == "host memory stands in for the GPU: the CPU was asked for"


def test_unknown_device_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is not known, use auto, cuda, cpu, simulated"):
        find_gpu("tpu")
    assert describe_gpu("tpu").startswith("no GPU: device 'tpu' is not known")


def test_environment_names_the_device(simulated: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    assert find_gpu() is simulated.gpu
    assert find_gpu("cpu") is None
    assert "simulated on the CPU" in describe_gpu()
    assert "\n" not in describe_gpu()


def test_gpu_that_is_asked_for_and_not_there_is_an_error(simulated: SimulatedGpu) -> None:
    module, _ = load_device_module("simulated")
    assert module is not None
    module.simulation.set_num_devices(0)
    forget_gpus()
    with pytest.raises(BackendError, match=r"there is no GPU: .* set KVBM_DEVICE=auto or cpu"):
        find_gpu("simulated")
    assert describe_gpu("simulated").startswith("no GPU: ")


def test_device_that_is_not_there_is_named(simulated: SimulatedGpu) -> None:
    with pytest.raises(BackendError, match=r"device 7 is not there, this machine has 1 \(0\.\.0\)"):
        find_gpu("simulated", index=7)


def test_absent_module_is_no_error_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm._backend._optional", lambda name: None)
    forget_gpus()
    assert find_gpu("auto") is None
    assert "built without CUDA" in describe_gpu("auto")
    with pytest.raises(BackendError, match="build it with KVBM_CUDA=ON and nvcc"):
        find_gpu("cuda")
    forget_gpus()


def test_broken_module_raises_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(name: str) -> None:
        raise ImportError("libsomething.so is missing")

    monkeypatch.setattr("kvbm._backend._optional", break_it)
    forget_gpus()
    with pytest.raises(BackendError, match=r"libsomething\.so is missing.*KVBM_DEVICE=cpu"):
        find_gpu("auto")
    forget_gpus()


def test_device_without_machine_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="Old GPU", has_kernels=False, compute_capability=(7, 0))
    module = SimpleNamespace(device_count=lambda: 1, Device=lambda index: old)
    monkeypatch.setattr("kvbm._backend._optional", lambda name: module)
    forget_gpus()
    assert find_gpu("auto") is None
    assert "Old GPU is sm_70, and this build has no code for it" in describe_gpu("auto")
    forget_gpus()
