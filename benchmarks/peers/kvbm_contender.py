"""kvbm as a contender: a manager with a device and a host tier, checksums on, every setting its default."""

from __future__ import annotations

import numpy as np
from contender import WIPED, Bytes, Contender, Workload

from kvbm import BlockManager
from kvbm.blocks import ImmutableBlocks, MutableBlocks
from kvbm.storage.device import DeviceStorage


class KvbmContender(Contender):
    """Store: hash, complete, register, flush. Retrieve: hash, match, onboard, wait.

    Parameters
    ----------
    workload : Workload
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__("kvbm")
        self._workload = workload
        self._manager = BlockManager(
            num_layers=workload.num_layers,
            page_size=workload.block_size,
            inner_dim=workload.inner_dim,
            dtype=workload.dtype,
            device_blocks=workload.num_blocks,
            host_blocks=workload.num_cpu_blocks,
        )
        storage = self._manager.storage("device")
        assert isinstance(storage, DeviceStorage)
        self._storage = storage
        self._fresh: list[MutableBlocks] = []  # filled, by request
        self._held: list[ImmutableBlocks] = []  # stored or brought back, by request

    def prepare(self) -> None:
        """Allocate and fill the blocks of every request."""
        workload, manager = self._workload, self._manager
        self._fresh = [manager.allocate_blocks(workload.request_blocks) for _ in range(workload.num_requests)]
        self._storage.write(np.concatenate([blocks.block_ids for blocks in self._fresh]), workload.data)

    def store(self, request: int) -> None:
        """Register a request's blocks, and wait until they are in the host tier."""
        manager = self._manager
        hashes = manager.sequence(self._workload.tokens[request]).hashes
        self._held.append(manager.register_blocks(self._fresh[request].complete(hashes)))
        manager.flush()

    def wipe(self) -> None:
        """Release all blocks, forget those of the device tier, and overwrite its memory."""
        self._release()
        self._manager.reset_pool("device")
        self._storage.open_buffer(0)[...] = WIPED

    def retrieve(self, request: int) -> int:
        """Match a request over the tiers and onboard what was found."""
        manager = self._manager
        hit = manager.match_sequence_hashes(manager.sequence(self._workload.tokens[request]).hashes)
        blocks = manager.onboard(hit).result()
        self._held.append(blocks)
        return len(blocks)

    def read_back(self) -> Bytes:
        """Read the blocks that were brought back, where the pool put them."""
        return self._storage.read(np.concatenate([blocks.block_ids for blocks in self._held]))

    def forget(self) -> None:
        """Reset both tiers."""
        self._release()
        self._manager.reset_all()

    def close(self) -> None:
        """Close the manager."""
        self._release()
        self._manager.close()

    def _release(self) -> None:
        for blocks in (*self._fresh, *self._held):
            blocks.release()
        self._fresh, self._held = [], []
