"""Whole managers whose device tier is a simulated GPU: blocks go down through every tier and come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_site import BLOCK_NBYTES, MODEL, PATIENCE_S, Site, content_of, names

from kvbm._backend import Backend
from kvbm.config import LAYOUTS, Config
from kvbm.errors import BackendError, BlockStateError, ConfigError, StorageError
from kvbm.layout import BlockLayout
from kvbm.manager import BlockManager
from kvbm.storage import CudaStorage, DeviceStorage, HostStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.types import Tier

LAYER_NBYTES = BLOCK_NBYTES // 3


@pytest.fixture
def make_gpu_tiers(
    simulated: SimulatedGpu, tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    before = set(threading.enumerate())
    site = Site(tmp_path, backend)
    yield site
    for manager in site.managers:
        manager.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} is left"
    for manager in site.managers:
        manager.check()
        for tier, status in manager.status().items():
            assert (status.mutable, status.complete, status.active) == (0, 0, 0), f"{tier} leaks: {status}"


@pytest.mark.parametrize("device", LAYOUTS)
@pytest.mark.parametrize("host", LAYOUTS)
def test_block_comes_back_through_every_tier_as_it_was_stored(make_gpu_tiers: Site, device: str, host: str) -> None:
    tiers = make_gpu_tiers(device=4, host=8, disk=16, settings={"device": {"layout": device}, "host": {"layout": host}})
    manager = tiers.manager
    assert isinstance(manager.storage("device"), CudaStorage)
    hashes = names(3)
    content = content_of(hashes)
    fresh = manager.allocate_blocks(3)
    for block, data in zip(fresh, content, strict=True):
        for layer in range(3):
            manager.store_kv(block, layer, data[layer * LAYER_NBYTES :][:LAYER_NBYTES].tobytes())
    manager.register_blocks(fresh.complete(hashes)).release()
    manager.flush(PATIENCE_S)
    assert [tiers.lies(tier, hashes) for tier in ("device", "host", "disk")] == [[True] * 3] * 3
    for emptied, source in (("device", "host"), ("host", "disk")):
        tiers.evict("device")
        tiers.evict(emptied)
        hit = manager.match_sequence_hashes(hashes)
        assert hit.tiers == {source: 3}
        blocks = manager.onboard(hit).result(PATIENCE_S)
        tiers.see_right(blocks, hashes)
        for block, data in zip(blocks, content, strict=True):
            for layer in range(3):
                expected = data[layer * LAYER_NBYTES :][:LAYER_NBYTES].tobytes()
                assert manager.load_kv(block, layer) == expected
        blocks.release()
    tiers.see_idle()


@pytest.mark.parametrize("device", LAYOUTS)
def test_gpu_and_disk_need_no_host_tier(make_gpu_tiers: Site, device: str) -> None:
    tiers = make_gpu_tiers(device=6, disk=16, settings={"device": {"layout": device}})
    hashes = names(5)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 5
    tiers.see_idle()


@pytest.mark.parametrize("place", [0, 17, BLOCK_NBYTES - 1])
def test_spoilt_byte_in_host_memory_never_reaches_the_gpu(make_gpu_tiers: Site, place: int) -> None:
    tiers = make_gpu_tiers(device=8, host=8)
    hashes = names(4)
    tiers.put_below(hashes, "host")
    tiers.spoil_memory("host", hashes[2], place)
    assert tiers.num_hit(hashes) == 2
    assert tiers.lies("host", hashes) == [True, True, False, True]
    tiers.see_idle()


def test_spoilt_byte_on_the_disk_never_reaches_the_gpu(make_gpu_tiers: Site) -> None:
    tiers = make_gpu_tiers(device=8, disk=16)
    hashes = names(4)
    tiers.put_below(hashes, "disk")
    tiers.spoil_disk(hashes[1], 30)
    assert tiers.num_hit(hashes) == 1
    tiers.see_idle()


def test_more_blocks_than_the_gpu_holds_go_round(make_gpu_tiers: Site) -> None:
    tiers = make_gpu_tiers(device=6, host=40, disk=80)
    prompts = [names(4) for _ in range(8)]
    for hashes in prompts:
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
    for hashes in reversed(prompts):
        assert tiers.num_hit(hashes) == 4
    tiers.see_idle()


def test_lost_gpu_is_a_miss_and_no_hang(make_gpu_tiers: Site, simulated: SimulatedGpu) -> None:
    tiers = make_gpu_tiers(device=8, host=8)
    hashes = names(4)
    tiers.put_below(hashes, "host")
    simulated.fail_operation(700)
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert len(tiers.manager.onboard(hit).result(PATIENCE_S)) == 0
    again = tiers.manager.match_sequence_hashes(hashes)
    assert len(tiers.manager.onboard(again).result(PATIENCE_S)) == 0
    tiers.settle()


def test_view_of_a_registered_block_is_read_only(make_gpu_tiers: Site) -> None:
    tiers = make_gpu_tiers(device=4, host=4)
    with tiers.fill(names(1)) as blocks:
        view = blocks[0].layer(1)
        assert view.__cuda_array_interface__["data"][1] is True
        with pytest.raises(StorageError, match=r"torch\.from_dlpack"):
            view.numpy()
        with pytest.raises(BlockStateError):
            tiers.manager.store_kv(blocks[0], 1, bytes(LAYER_NBYTES))


def test_host_tier_below_a_gpu_is_pinned(make_gpu_tiers: Site) -> None:
    storage = make_gpu_tiers(device=4, host=4).manager.storage("host")
    assert isinstance(storage, HostStorage)
    assert storage.wait_pinned(np.arange(4, dtype=np.int32))


def test_configuration_names_the_device(
    simulated: SimulatedGpu, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVBM_DEVICE", raising=False)
    tree = {"model": {**MODEL, "fingerprint": "toy"}, "device": {"num_blocks": 2}}
    for kind, expected in (("simulated", CudaStorage), ("cpu", DeviceStorage)):
        tree["device"]["kind"] = kind
        with BlockManager(Config.from_dict(tree), backend=backend) as manager:
            assert type(manager.storage("device")) is expected
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    tree["device"]["kind"] = "auto"
    with BlockManager(Config.from_dict(tree), backend=backend) as manager:
        assert type(manager.storage("device")) is CudaStorage
    tree["device"]["index"] = 3
    with pytest.raises(BackendError, match="device 3 is not there"):
        BlockManager(Config.from_dict(tree), backend=backend)
    tree["device"]["kind"] = "tpu"
    with pytest.raises(ConfigError, match=r"device\.kind"):
        Config.from_dict(tree)


class Counting:
    """A device that notes how many thread blocks each kernel may take."""

    def __init__(self, device: Any, noted: list[int]) -> None:
        self._device, self._noted = device, noted

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._device, name)
        if name not in ("copy", "checksum", "permute"):
            return call

        def counted(*given: Any, **named: Any) -> Any:
            if named.get("path") != "memcpy" or named.get("hashes") is not None:  # else there is no kernel
                self._noted.append(named["num_thread_blocks"])
            return call(*given, **named)

        return counted


@pytest.mark.parametrize(("settings", "expected"), [({}, 0), ({"copy_thread_blocks": 7}, 7)], ids=["default", "seven"])
def test_kernels_take_as_many_thread_blocks_as_the_configuration_says(
    make_gpu_tiers: Site, simulated: SimulatedGpu, settings: dict[str, int], expected: int
) -> None:
    noted: list[int] = []
    object.__setattr__(simulated.gpu, "device", Counting(simulated.gpu.device, noted))
    tiers = make_gpu_tiers(device=6, host=8, disk=16, settings={"device": settings})
    hashes = names(4)
    tiers.put_below(hashes, "host")
    assert tiers.num_hit(hashes) == 4
    assert noted
    assert set(noted) == {expected}
    assert any(kind.startswith("kernel:") for kind, *_ in simulated.operations())


def test_storage_of_an_engine_is_the_device_tier(make_gpu_tiers: Site, simulated: SimulatedGpu) -> None:
    layout = BlockLayout.layer_separate(block_first=False, num_blocks=6, **MODEL)
    given = CudaStorage(layout, gpu=simulated.gpu)
    tiers = make_gpu_tiers(host=8, storages={Tier.DEVICE: given})
    host = tiers.manager.storage("host")
    assert isinstance(host, HostStorage)
    assert host.pinned is not None
    hashes = names(4)
    tiers.put_below(hashes, "host")
    assert tiers.num_hit(hashes) == 4
    tiers.see_idle()
