"""Storage of a GPU keeps what every storage keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu_site import KINDS, layout_of

from kvbm.storage import CudaStorage, HostStorage, Storage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.testing.storages import StorageTests


@pytest.mark.parametrize("kind", KINDS)
class TestCudaStorage(StorageTests):
    @pytest.fixture(autouse=True)
    def _use(self, simulated: SimulatedGpu, kind: str) -> Iterator[None]:
        self._make = lambda: CudaStorage(layout_of(kind), gpu=simulated.gpu)
        yield
        del self._make

    def make_storage(self) -> Storage:
        return self._make()


@pytest.mark.parametrize("kind", KINDS)
class TestPinnedHostStorage(StorageTests):
    @pytest.fixture(autouse=True)
    def _use(self, simulated: SimulatedGpu, kind: str) -> Iterator[None]:
        self._make = lambda: HostStorage(layout_of(kind), gpu=simulated.gpu)
        yield
        del self._make

    def make_storage(self) -> Storage:
        return self._make()
