"""The public suites for storages, allocators and tiers, on the device: what every storage keeps, these keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gpu_site import KINDS, layout_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tier_site import PATIENCE_S, Site, names

from kvbm._backend import Backend
from kvbm.config import LAYOUTS
from kvbm.gpu import Gpu, PinnedMemory
from kvbm.storage import CudaStorage, HostStorage, Storage
from kvbm.testing.allocators import AllocatorTests
from kvbm.testing.storages import StorageTests
from kvbm.testing.tier_schedules import NUM_BLOCKS, OPERATIONS, Schedule, TierSchedules
from kvbm.types import Tier

SCHEDULES = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255)), min_size=40, max_size=100)


class OnGpu:
    """Gives a suite the device; its methods take no fixtures."""

    @pytest.fixture(autouse=True)
    def _use(self, gpu: Gpu) -> Iterator[None]:
        self.gpu = gpu
        yield
        del self.gpu


@pytest.mark.parametrize("kind", KINDS)
class InEveryLayout(OnGpu):
    @pytest.fixture(autouse=True)
    def _lay_out(self, kind: str) -> None:
        self.layout = layout_of(kind)


class TestCudaStorage(InEveryLayout, StorageTests):
    def make_storage(self) -> Storage:
        return CudaStorage(self.layout, gpu=self.gpu)


class TestPinnedHostStorage(InEveryLayout, StorageTests):
    def make_storage(self) -> Storage:
        return HostStorage(self.layout, gpu=self.gpu)


class TestPinnedMemory(OnGpu, AllocatorTests):
    def make_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        return PinnedMemory(self.gpu, nbytes).memory


def schedules_on(gpu: Gpu) -> type[TierSchedules]:
    """Give schedules whose device tier is on a GPU."""

    class Schedules(TierSchedules):
        def make_storages(self) -> dict[Tier, Storage]:
            storages = super().make_storages()
            device, host = storages[Tier.DEVICE].layout, storages[Tier.HOST].layout
            for tier in (Tier.DEVICE, Tier.HOST):
                storages[tier].close()
            storages[Tier.DEVICE] = CudaStorage(device, gpu=gpu)
            storages[Tier.HOST] = HostStorage(host, gpu=gpu, backend=self.backend)
            assert {tier: storage.num_blocks for tier, storage in storages.items()} == NUM_BLOCKS
            return storages

    return Schedules


def test_no_schedule_gives_a_wrong_byte_or_keeps_a_block(gpu: Gpu, backend: Backend) -> None:
    kind = schedules_on(gpu)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SCHEDULES)
    def run(schedule: Schedule) -> None:
        tiers = kind(backend)
        try:
            tiers.run(schedule)
        finally:
            for executor in tiers.executors:
                executor.close()

    run()


@pytest.mark.parametrize("device", LAYOUTS)
def test_blocks_go_down_through_every_tier_and_come_back(
    gpu: Gpu, backend: Backend, tmp_path: Path, device: str
) -> None:
    tiers = Site(tmp_path, backend)(device=6, host=24, disk=64, settings={"device": {"layout": device}})
    storage = tiers.manager.storage("device")
    assert isinstance(storage, CudaStorage)
    assert storage.gpu is gpu
    prompts = [names(4) for _ in range(10)]
    for hashes in prompts:
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
    for hashes in reversed(prompts):
        assert tiers.num_hit(hashes) == 4
    tiers.see_idle()
    tiers.manager.close()
