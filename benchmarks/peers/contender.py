"""What is measured, and what a contender offers to be measured: one turn of storing requests and getting them back.

A turn is prepare, store of each request, wipe, retrieve of each request, read_back, forget. Only store and retrieve are
timed. Requests share no prefix; each goes to the CPU tier and comes back as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvbm.layout import BlockLayout

Bytes = npt.NDArray[np.uint8]

WIPED = 0xA5  # what the engine's memory holds between store and retrieve


@dataclass(frozen=True)
class Workload:
    """Requests of equal length over blocks of one shape.

    Attributes
    ----------
    num_blocks : int
        A multiple of request_blocks.
    request_blocks : int
        Blocks of a request: stored by one call, and found again by one.
    block_size : int
        Tokens per block; LMCache's chunk size.
    num_layers, inner_dim : int
        K and V both count on top: a token has num_layers * 2 * inner_dim elements.
    dtype : str
    """

    num_blocks: int
    request_blocks: int
    block_size: int
    num_layers: int = 8
    inner_dim: int = 128
    dtype: str = "float16"

    @property
    def num_requests(self) -> int:
        """Requests of a turn."""
        return self.num_blocks // self.request_blocks

    @property
    def num_cpu_blocks(self) -> int:
        """Blocks of the CPU tier: a quarter more than are stored, so that nothing is evicted."""
        return self.num_blocks + self.num_blocks // 4

    @property
    def nbytes(self) -> int:
        """Bytes of all requests."""
        return self.num_blocks * self.layout.block_nbytes

    @cached_property
    def layout(self) -> BlockLayout:
        """The engine's memory: one buffer, each block in one piece, as large as all requests."""
        return BlockLayout.fully_contiguous(
            num_blocks=self.num_blocks,
            num_layers=self.num_layers,
            outer_dim=2,
            block_size=self.block_size,
            inner_dim=self.inner_dim,
            dtype=self.dtype,
        )

    @cached_property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """Random token ids: (num_requests, request_blocks * block_size) uint32."""
        rng = np.random.default_rng(7)
        shape = self.num_requests, self.request_blocks * self.block_size
        return rng.integers(0, 128_000, shape, dtype=np.uint32)

    @cached_property
    def data(self) -> Bytes:
        """Random bytes of the blocks, in the order of the requests: (num_blocks, block_nbytes) uint8."""
        rng = np.random.default_rng(8)
        return rng.integers(0, 256, (self.num_blocks, self.layout.block_nbytes), dtype=np.uint8)


class Contender(ABC):
    """A cache with a CPU tier, and the engine's memory in front of it.

    Parameters
    ----------
    name : str
    moves_bytes : bool
        False where the bytes are left out on purpose, so that there are none to verify.
    """

    def __init__(self, name: str, *, moves_bytes: bool = True) -> None:
        self.name = name
        self.moves_bytes = moves_bytes

    @abstractmethod
    def prepare(self) -> None:
        """Put the bytes of all requests into the engine's memory; the CPU tier is empty."""

    @abstractmethod
    def store(self, request: int) -> None:
        """Bring a request into the CPU tier, from its tokens on; return when its bytes are there."""

    @abstractmethod
    def wipe(self) -> None:
        """Overwrite the engine's memory, and let nothing but the CPU tier know the requests."""

    @abstractmethod
    def retrieve(self, request: int) -> int:
        """Bring a request back into the engine's memory, from its tokens on; return how many blocks came."""

    @abstractmethod
    def read_back(self) -> Bytes:
        """Give what `retrieve` brought, in the order of the requests: (num_blocks, block_nbytes) uint8."""

    @abstractmethod
    def forget(self) -> None:
        """Empty the engine's memory and the CPU tier."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory."""
