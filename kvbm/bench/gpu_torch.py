"""What torch does with the same blocks, where torch with CUDA is installed: index copies, and a matrix product.

Its copies are given less work than ours: blocks stand dense on the host, already or still, while ours come from and go
to places in a pool. torch is imported here alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from kvbm.bench.gpu_site import NUM_PIECES
from kvbm.types import IdArray

_NUM_PRODUCTS = 20


def find_torch() -> tuple[Any, str]:
    """Give torch, or None and the reason why it cannot be compared with."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return None, f"torch {torch.__version__} finds no GPU"
    return torch, f"torch {torch.__version__}"


class IndexCopies:
    """Blocks in tensors of torch, moved by ``index_select`` and ``index_copy_`` through pinned memory.

    Parameters
    ----------
    torch : module
    kind : {"contiguous", "block_first", "outer_first"}
    piece_nbytes : int
    device_order : (num_blocks,) int32
        Blocks on the device in the order of copies; as many as the pool has.
    device : str
    """

    def __init__(
        self, torch: Any, kind: str, piece_nbytes: int, device_order: IdArray, *, device: str = "cuda"
    ) -> None:
        self._torch, self._device = torch, device
        num_blocks = len(device_order)
        num_tensors = {"contiguous": 1, "block_first": NUM_PIECES, "outer_first": NUM_PIECES // 2}[kind]
        self._axis = 1 if kind == "outer_first" else 0
        self._shape = (2, num_blocks, piece_nbytes) if kind == "outer_first" else (num_blocks, piece_nbytes)
        self.pools = [torch.zeros(self._shape, dtype=torch.uint8, device=device) for _ in range(num_tensors)]
        self._ids = torch.from_numpy(np.array(device_order, dtype=np.int64)).to(device)

    def turn(self, direction: str, num_blocks: int) -> tuple[Callable[[], None], list[Any]]:
        """Give a copy of the first blocks of the order that waits for its end, and the host's tensors."""
        ids = self._ids[:num_blocks]
        shape = list(self._shape)
        shape[self._axis] = num_blocks
        is_cuda = self._device != "cpu"
        hosts = [self._torch.zeros(shape, dtype=self._torch.uint8, pin_memory=is_cuda) for _ in self.pools]

        def down() -> None:
            for pool, host in zip(self.pools, hosts, strict=True):
                host.copy_(pool.index_select(self._axis, ids), non_blocking=True)
            self._wait()

        def up() -> None:
            for pool, host in zip(self.pools, hosts, strict=True):
                pool.index_copy_(self._axis, ids, host.to(self._device, non_blocking=True))
            self._wait()

        return (up if direction == "h2d" else down), hosts

    def _wait(self) -> None:
        if self._device != "cpu":
            self._torch.cuda.synchronize()


class Product:
    """A matrix product that runs on torch's stream, in half precision.

    Parameters
    ----------
    torch : module
    size : int
        Rows and columns.
    """

    def __init__(self, torch: Any, size: int) -> None:
        self._torch = torch
        self._factors = [torch.randn((size, size), device="cuda").to(torch.bfloat16) for _ in range(2)]
        self._result = torch.empty_like(self._factors[0])

    def time(self) -> float:
        """Give the seconds of one product, the mean of twenty that stand in a row."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_NUM_PRODUCTS):
            self._torch.matmul(*self._factors, out=self._result)
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000 / _NUM_PRODUCTS
