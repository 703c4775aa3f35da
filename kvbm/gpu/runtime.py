"""Finds the GPU, once, or says in one line why there is none.

``KVBM_DEVICE=auto|cuda|cpu|simulated``: auto takes a GPU where driver, device and machine code are there. What was
found holds for this process only: a child made by fork asks again, because CUDA does not survive a fork.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from kvbm._backend import load_device_module
from kvbm.errors import BackendError

if TYPE_CHECKING:
    from kvbm._backend import Device

_log = logging.getLogger("kvbm.gpu")


@dataclass(frozen=True, eq=False)
class Gpu:
    """One device and the module that drives it.

    Attributes
    ----------
    module : ModuleType
        ``kvbm._native.device``, or the simulated one.
    device : Device
    pid : int
        The process that may use it.
    """

    module: ModuleType
    device: Device
    pid: int

    @property
    def is_simulated(self) -> bool:
        """Whether the CPU plays the GPU's part."""
        return hasattr(self.module, "simulation")

    @property
    def is_usable(self) -> bool:
        """Whether this process is the one that found it; after a fork the child must not touch it."""
        return os.getpid() == self.pid

    def describe(self) -> str:
        """Say in one line what the device is."""
        device = self.device
        major, minor = device.compute_capability
        driver, runtime = (f"{v // 1000}.{v % 1000 // 10}" for v in self.module.versions())
        kind = "simulated on the CPU, " if self.is_simulated else ""
        return (
            f"{device.name} ({kind}{device.total_nbytes >> 20} MiB, sm_{major}{minor}, PCI {device.pci_bus_id}, driver "
            f"for CUDA {driver}, runtime {runtime}, batched copies: {'yes' if device.has_batch_copy else 'no'})"
        )


def find_gpu(choice: str | None = None, *, index: int = 0) -> Gpu | None:
    """Give the GPU to use, None where there is none.

    Parameters
    ----------
    choice : {"auto", "cuda", "cpu", "simulated"}, optional
        None takes what ``KVBM_DEVICE`` says, "auto" where it says nothing.
    index : int
        Which of several devices, as CUDA numbers them.

    Raises
    ------
    ConfigError
        Another choice.
    BackendError
        "cuda" or "simulated" was asked for and there is no such device; or the module is broken.
    CudaError
        The driver is there and will not start, or this process was forked from one that uses a device.

    Notes
    -----
    Asks the driver at the first call of a process and remembers the answer.
    """
    gpu, reason = _find(_choice_of(choice), index, os.getpid())
    if gpu is None and _is_needed(choice):
        raise BackendError(f"there is no GPU: {reason}; set KVBM_DEVICE=auto or cpu to do without one")
    return gpu


def describe_gpu(choice: str | None = None, *, index: int = 0) -> str:
    """Say in one line which GPU is used, or why none is; parameters as for `find_gpu`, but it raises nothing."""
    try:
        gpu, reason = _find(_choice_of(choice), index, os.getpid())
    except Exception as error:
        return f"no GPU: {error}"
    if gpu is not None:
        return gpu.describe()
    return f"{'no GPU' if _is_needed(choice) else 'host memory stands in for the GPU'}: {reason}"


def forget_gpus() -> None:
    """Ask the driver again at the next call: for tests that change what it answers."""
    _find.cache_clear()


def _choice_of(choice: str | None) -> str:
    return choice or os.environ.get("KVBM_DEVICE") or "auto"


def _is_needed(choice: str | None) -> bool:
    return _choice_of(choice) in ("cuda", "simulated")


@functools.lru_cache(maxsize=16)
def _find(choice: str, index: int, pid: int) -> tuple[Gpu | None, str]:
    module, reason = load_device_module(choice)
    gpu = None
    if module is not None:
        gpu, reason = _open(module, index, pid)
    _log.info("device choice=%s found=%s reason=%s", choice, "none" if gpu is None else gpu.device.name, reason)
    return gpu, reason


def _open(module: ModuleType, index: int, pid: int) -> tuple[Gpu | None, str]:
    num_devices = module.device_count()
    if not num_devices:
        return None, module.why_no_device() or "there is no device"
    if not 0 <= index < num_devices:
        return None, f"device {index} is not there, this machine has {num_devices} (0..{num_devices - 1})"
    device = module.Device(index)
    if not device.has_kernels:  # checksums need them, and nothing goes unverified
        major, minor = device.compute_capability
        return None, f"{device.name} is sm_{major}{minor}, and this build has no code for it"
    return Gpu(module, device, pid), "found"
