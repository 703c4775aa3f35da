"""An engine's memory above a host tier and a disk tier: its slots are its own, its bytes say which block they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tier_site import MODEL, content_of, names

from kvbm._backend import Backend
from kvbm.executor import Executor
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.planner import Limits, Planner
from kvbm.planner.foreign import ForeignTier
from kvbm.pool import BlockPool
from kvbm.storage import DeviceStorage, HostStorage, Storage
from kvbm.storage.disk import DiskStorage
from kvbm.testing.channels import SteppedChannel
from kvbm.types import HashArray, IdArray, Tier

POISON = 0xEE


class ForeignSite:
    """A planner over host and disk whose jobs wait until a test steps them, and the memory of an engine.

    Parameters
    ----------
    backend : Backend
    folder : Path
    slots, host, disk : int
        Blocks of each.
    limits : Limits
    """

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        *,
        slots: int = 16,
        host: int = 12,
        disk: int = 32,
        limits: Limits | None = None,
        num_ranks: int = 1,
    ) -> None:
        self.now = 0.0
        self.pools = [
            BlockPool(host, name="host", tier=Tier.HOST, backend=backend),
            BlockPool(disk, name="disk", tier=Tier.DISK, backend=backend),
        ]
        self.ranks: list[dict[Tier, Storage]] = []
        for rank in range(num_ranks):
            storages: dict[Tier, Storage] = {
                Tier.DEVICE: DeviceStorage(
                    BlockLayout.layer_separate(num_blocks=slots, block_first=True, **MODEL), backend=backend
                ),
                Tier.HOST: HostStorage(BlockLayout.fully_contiguous(num_blocks=host, **MODEL), backend=backend),
                Tier.DISK: DiskStorage(
                    BlockLayout.fully_contiguous(num_blocks=disk, **MODEL),
                    folder,
                    name=f"rank{rank}",
                    fingerprint="test",
                    backend=backend,
                ),
            }
            self.ranks.append(storages)
        self.executors = [Executor(storages, backend=backend) for storages in self.ranks]
        self.channels = [SteppedChannel(executor.execute) for executor in self.executors]
        self.planner = Planner(
            self.pools,
            self.channels,
            recording_tiers=[Tier.DISK],
            foreign_tier=Tier.DEVICE,
            limits=limits or Limits(in_flight_share=1.0),
            clock=lambda: self.now,
        )
        assert self.planner.foreign is not None
        self.foreign: ForeignTier = self.planner.foreign
        self.wipe(np.arange(slots, dtype=np.int32))

    # -- the engine --------------------------------------------------------------------------------------------

    def wipe(self, slots: IdArray) -> None:
        """Let the engine use slots for something else."""
        for storages in self.ranks:
            engine = storages[Tier.DEVICE]
            engine.write(slots, np.full((len(slots), engine.layout.block_nbytes), POISON, dtype=np.uint8))

    def compute(self, slots: IdArray, hashes: HashArray) -> None:
        """Let the engine fill slots with what these blocks hold, a shard of it on each rank."""
        for rank, storages in enumerate(self.ranks):
            storages[Tier.DEVICE].write(slots, content_of(hashes) ^ np.uint8(rank))

    def holds(self, slots: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which slots hold what these blocks hold, on every rank."""
        good = np.ones(len(slots), dtype=np.bool_)
        for rank, storages in enumerate(self.ranks):
            good &= (storages[Tier.DEVICE].read(slots) == (content_of(hashes) ^ np.uint8(rank))).all(axis=1)
        return good

    # -- what it asks for --------------------------------------------------------------------------------------

    def save(self, hashes: HashArray, slots: IdArray, *, is_stepped: bool = True, **settings: Any) -> Transfer[Any]:
        """Compute blocks in slots and save them."""
        self.compute(slots, hashes)
        parents = np.concatenate([np.zeros((1, 2), dtype=np.uint64), hashes[:-1]])
        transfer = self.foreign.save(slots, hashes, parents, **settings)
        if is_stepped:
            self.step_all()
        return transfer

    def load(self, hashes: HashArray, slots: IdArray, *, is_stepped: bool = True, **settings: Any) -> Transfer[Any]:
        """Bring a prefix from whatever tier into slots."""
        self.wipe(slots)
        staged = self.planner.onboard(self.planner.match(hashes))
        self.step_all()
        blocks = staged.result(0)
        transfer = self.foreign.load(blocks, slots[: len(blocks)], **settings)
        if is_stepped:
            self.step_all()
        return transfer

    def step_all(self) -> None:
        """Execute all that waits, and what that brings, offloads too."""
        while True:
            for channel in self.channels:
                channel.step_all()
            if not self.planner.pump() and not any(channel.waiting for channel in self.channels):
                return

    def close(self) -> None:
        """Close all, and see that nothing is left."""
        for channel in self.channels:
            channel.step_all()
        self.planner.close(0.0)
        for channel in self.channels:  # what it told the records at last
            channel.step_all()
        for executor, storages in zip(self.executors, self.ranks, strict=True):
            executor.close()
            for storage in storages.values():
                storage.close()
        assert self.foreign.num_open == 0
        assert self.planner.num_open_jobs == 0

    def calm(self) -> None:
        """See that no block is held and the pools are sound."""
        self.step_all()
        for pool in self.pools:
            pool.check()
            assert pool.status().active == pool.status().mutable == pool.status().complete == 0, pool.name
        counters = self.planner.statistics()
        assert all(route.in_flight == 0 for route in counters.routes.values())


def slots_of(*ids: int) -> IdArray:
    return np.array(ids, dtype=np.int32)


__all__ = ["POISON", "ForeignSite", "names", "slots_of"]
