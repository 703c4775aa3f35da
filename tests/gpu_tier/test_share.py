"""A device tier that is given no size takes its share of what is free on a GPU that is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tier_site import BLOCK_NBYTES, MODEL

from kvbm._backend import Backend
from kvbm.config import LAYOUTS, Config
from kvbm.errors import StorageError
from kvbm.gpu import DeviceMemory
from kvbm.manager import BlockManager
from kvbm.storage import CudaStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.types import Tier

MIB = 1 << 20


def manager_of(backend: Backend, **device: Any) -> BlockManager:
    tree = {
        "model": {**MODEL, "fingerprint": "toy"},
        "device": {"kind": "simulated", **device},
        "host": {"num_blocks": 4},
    }
    return BlockManager(Config.from_dict(tree), backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_device_tier_takes_its_share_of_what_is_free(
    simulated: SimulatedGpu, backend: Backend, layout: str, fraction: float | None
) -> None:
    simulated.gpu.module.simulation.total_nbytes = 3 * MIB
    engines = DeviceMemory(simulated.gpu, 2 * MIB)  # of what is left the share is taken, not of all
    given = {} if fraction is None else {"gpu_memory_fraction": fraction}
    with manager_of(backend, layout=layout, **given) as manager:
        storage = manager.storage("device")
        assert isinstance(storage, CudaStorage)
        taken = storage.num_blocks * BLOCK_NBYTES
        share = (fraction or 0.9) * MIB
        assert share - 4 * 256 - BLOCK_NBYTES < taken <= share
        assert manager.device.total_blocks == storage.num_blocks
    assert engines.nbytes == 2 * MIB


def test_number_and_size_go_before_the_share(simulated: SimulatedGpu, backend: Backend) -> None:
    assert simulated.gpu.is_usable
    with manager_of(backend, num_blocks=3, gpu_memory_fraction=0.1) as manager:
        assert manager.device.total_blocks == 3
    with manager_of(backend, size=5 * BLOCK_NBYTES, gpu_memory_fraction=0.1) as manager:
        assert manager.device.total_blocks == 5


def test_share_in_which_no_block_fits_is_refused_with_what_is_free(simulated: SimulatedGpu, backend: Backend) -> None:
    simulated.gpu.module.simulation.total_nbytes = 1024
    with pytest.raises(
        StorageError, match=r"gpu_memory_fraction is 0\.25 and 1024 bytes are free on .*, one block takes 288"
    ):
        manager_of(backend, gpu_memory_fraction=0.25)


@pytest.mark.parametrize("kind", ["auto", "cpu"])
def test_gpu_that_is_not_named_is_left_alone_and_a_share_of_it_is_said_to_be_idle(
    simulated: SimulatedGpu,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    for given, num_lines in (({}, 0), ({"gpu_memory_fraction": 0.5}, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kvbm.manager"), manager_of(backend, kind=kind, **given) as manager:
            assert list(manager.status()) == [Tier.HOST]
        assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["no device tier"] * num_lines
    assert simulated.gpu.module.simulation.counts()["allocations"] == 0
