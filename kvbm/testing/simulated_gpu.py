"""A GPU that the CPU plays, steered by hand: streams run when a test says so, and calls fail as they are told.

The same sources as the real module, kernels included. In stepped mode nothing runs until `step` or `run`, or until
somebody waits for it; every order that a real GPU could take can be taken. One per process at a time.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvbm._backend import load_device_module
from kvbm.errors import BackendError
from kvbm.gpu import Gpu, find_gpu
from kvbm.gpu.runtime import forget_gpus

if TYPE_CHECKING:
    from kvbm._backend import Stream


class SimulatedGpu:
    """Use it in a with statement; at its end the simulation is as at first, and everything that was left is freed.

    Parameters
    ----------
    is_stepped : bool
        Nothing runs by itself.

    Attributes
    ----------
    gpu : Gpu
        For storages and engines.

    Raises
    ------
    BackendError
        This build has no simulated device.
    """

    def __init__(self, *, is_stepped: bool = False) -> None:
        module, reason = load_device_module("simulated")
        if module is None:
            raise BackendError(f"there is no simulated device: {reason}")
        self._simulation: Any = module.simulation
        self._simulation.reset()
        forget_gpus()
        self._simulation.set_mode("stepped" if is_stepped else "running")
        gpu = find_gpu("simulated")
        assert gpu is not None, "one device unless a test says otherwise"
        self.gpu: Gpu = gpu

    def step(self, stream: Stream | None = None, n: int = 1) -> int:
        """Run the next operations of a stream, or of whichever may go on; return how many could be."""
        done: int = self._simulation.advance(stream, n)
        return done

    def run(self) -> None:
        """Run everything that is queued, in an order that events allow."""
        self._simulation.run_all()

    def fail_call(self, name: str, code: int, *, after: int = 0) -> None:
        """Let a call of the runtime fail with a CUDA error, e.g. ``cudaMalloc`` with 2, after so many that go well."""
        self._simulation.fail_call(name, code, after)

    def fail_operation(self, code: int, *, after: int = 0) -> None:
        """Let an operation fail when it runs, after so many that go well; the device is lost from then on."""
        self._simulation.fail_operation(code, after)

    def operations(self) -> list[tuple[Any, ...]]:
        """Give what has run since the start, in order: (kind, stream, nbytes, source, destination)."""
        log: list[tuple[Any, ...]] = self._simulation.operations()
        return log

    def close(self) -> None:
        """Put the simulation back to its beginning."""
        del self.gpu
        gc.collect()  # streams and memory that nobody holds go back before their device does
        self._simulation.reset()
        forget_gpus()

    def __enter__(self) -> SimulatedGpu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
