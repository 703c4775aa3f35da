"""LMCache as a contender: its engine with the CPU tier alone, behind a connector that copies between host blocks.

LMCache moves bytes through a connector that its embedder may write. Ours stands in for a GPU: it takes block ids and
copies each chunk in one piece, which is the best that any connector could do. Importing this module imports LMCache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contender import WIPED, Bytes, Contender, Workload
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata

from kvbm._backend import default_backend
from kvbm.storage.device import DeviceStorage

Words = npt.NDArray[np.uint64]

_GIB = 1 << 30
_MIN_CHUNK_NBYTES = 4096  # what LMCache rounds a chunk up to
_NO_OFFSET = np.zeros(1, dtype=np.uint64)
_numbers = itertools.count()  # LMCache keeps its engines by name


class HostConnector(GPUConnectorInterface):  # type: ignore[misc]
    """Copies chunks to and from blocks of a storage with addresses, named by ``block_ids``.

    Parameters
    ----------
    storage : DeviceStorage
        Each block in one piece.
    how : {"memcpy", "torch", "nothing"}
        libc's memcpy in one native call for a request, a torch copy for each chunk (on as many threads as torch
        takes), or no bytes at all.
    """

    def __init__(self, storage: DeviceStorage, how: str) -> None:
        layout = storage.layout
        self._nbytes = layout.block_nbytes
        self._address = np.uint64(storage.bound.addresses[0])
        self._stride = np.uint64(layout.strides.block)
        self._blocks = torch.as_strided(
            torch.from_numpy(storage.open_buffer(0)), (layout.num_blocks, self._nbytes), (layout.strides.block, 1)
        )
        self._copy: Callable[[Sequence[Any], npt.NDArray[np.int32], bool], None] = {
            "memcpy": self._copy_by_memcpy,
            "torch": self._copy_by_torch,
            "nothing": lambda chunks, block_ids, is_store: None,
        }[how]

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        """Copy blocks into chunks."""
        self._copy(memory_objs, kwargs["block_ids"], True)

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        """Copy chunks into blocks."""
        self._copy(memory_objs, kwargs["block_ids"], False)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        """Copy a block into a chunk."""
        self._copy([memory_obj], kwargs["block_ids"], True)

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        """Copy a chunk into a block."""
        self._copy([memory_obj], kwargs["block_ids"], False)

    def get_shape(self, num_tokens: int) -> torch.Size:
        """Refuse: a chunk's shape is in the metadata here."""
        raise NotImplementedError("the engine takes the shape from its metadata")

    def _copy_by_memcpy(self, chunks: Sequence[Any], block_ids: npt.NDArray[np.int32], is_store: bool) -> None:
        blocks: Words = self._address + block_ids.astype(np.uint64) * self._stride
        memory = np.array([chunk.data_ptr for chunk in chunks], dtype=np.uint64)
        source, destination = (blocks, memory) if is_store else (memory, blocks)
        memcpy_blocks = default_backend().memcpy_blocks
        assert memcpy_blocks is not None, "the pure twin has none: main asks for the native one"
        memcpy_blocks(source, destination, _NO_OFFSET, _NO_OFFSET, self._nbytes)

    def _copy_by_torch(self, chunks: Sequence[Any], block_ids: npt.NDArray[np.int32], is_store: bool) -> None:
        for chunk, block_id in zip(chunks, block_ids.tolist(), strict=True):
            memory, block = chunk.raw_data[: self._nbytes], self._blocks[block_id]
            (memory if is_store else block).copy_(block if is_store else memory)


class LMCacheContender(Contender):
    """Store: ``engine.store(tokens)``. Retrieve: ``engine.retrieve(tokens)``.

    Tokens are a list, which was faster than a tensor. Blocks are used in order.

    Parameters
    ----------
    workload : Workload
    how : {"memcpy", "torch", "nothing"}
        As `HostConnector`.
    """

    def __init__(self, workload: Workload, how: str) -> None:
        super().__init__(f"lmcache {how}", moves_bytes=how != "nothing")
        self._workload = workload
        self._storage = DeviceStorage(workload.layout)
        self._tokens = workload.tokens.tolist()
        block_ids = np.arange(workload.num_blocks, dtype=np.int32)
        self._block_ids = block_ids.reshape(workload.num_requests, workload.request_blocks)
        self._engine_name = f"peer-{next(_numbers)}"
        chunk_nbytes = max(_MIN_CHUNK_NBYTES, workload.layout.block_nbytes)
        self._engine = LMCacheEngineBuilder.get_or_create(
            self._engine_name,
            LMCacheEngineConfig.from_defaults(
                chunk_size=workload.block_size,
                local_cpu=True,
                max_local_cpu_size=workload.num_cpu_blocks * chunk_nbytes / _GIB,
            ),
            LMCacheMetadata(
                model_name="peer",
                world_size=1,
                local_world_size=1,
                worker_id=0,
                local_worker_id=0,
                kv_dtype=getattr(torch, workload.dtype),
                kv_shape=(workload.num_layers, 2, workload.block_size, 1, workload.inner_dim),
                chunk_size=workload.block_size,
            ),
            HostConnector(self._storage, how),
            lambda tensor, rank: None,
            lambda value, rank: value,
        )
        self._engine.post_init()

    def prepare(self) -> None:
        """Fill the engine's memory."""
        self._storage.write(self._block_ids.reshape(-1), self._workload.data)

    def store(self, request: int) -> None:
        """Store a request; the CPU tier takes it before the call returns."""
        self._engine.store(self._tokens[request], block_ids=self._block_ids[request])

    def wipe(self) -> None:
        """Overwrite the engine's memory."""
        self._storage.open_buffer(0)[...] = WIPED

    def retrieve(self, request: int) -> int:
        """Retrieve a request."""
        found = self._engine.retrieve(self._tokens[request], block_ids=self._block_ids[request])
        return int(found.sum()) // self._workload.block_size

    def read_back(self) -> Bytes:
        """Read the engine's memory."""
        return self._storage.read(self._block_ids.reshape(-1))

    def forget(self) -> None:
        """Clear LMCache."""
        self._engine.clear()

    def close(self) -> None:
        """Destroy the engine and let go of the memory."""
        LMCacheEngineBuilder.destroy(self._engine_name)
        self._storage.close()
