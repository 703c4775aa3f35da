"""Two devices of one machine: each has its own blocks, and neither moves those of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_site import PATIENCE_S, ids, on_gpu, on_host, random_bytes

from kvbm.errors import LayoutError
from kvbm.gpu import DeviceMemory, Gpu
from kvbm.storage import CudaStorage
from kvbm.transfer import GpuTransferEngine

Pair = tuple[Gpu, Gpu]


class Foreign:
    """Memory as another package shows it, of a device that it does not name."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3, "typestr": "|u1", "shape": (memory.nbytes,), "data": (memory.address, False)
        }  # fmt: skip


def test_each_device_copies_its_own_blocks_at_once(two_gpus: Pair) -> None:
    storages = [on_gpu(gpu, "outer_first") for gpu in two_gpus]
    hosts = [on_host(gpu) for gpu in two_gpus]
    engines = [GpuTransferEngine(gpu) for gpu in two_gpus]
    contents = [random_bytes(storages[0].layout, 4, seed) for seed in (1, 2)]
    for storage, data in zip(storages, contents, strict=True):
        storage.write(ids(0, 1, 2, 3), data)
    transfers = [
        engine.copy(storage, host, ids(3, 1, 2, 0), ids(4, 5, 6, 7))
        for engine, storage, host in zip(engines, storages, hosts, strict=True)
    ]
    for transfer, host, data in zip(transfers, hosts, contents, strict=True):
        assert transfer.result(PATIENCE_S).good.all()
        assert np.array_equal(host.read(ids(4, 5, 6, 7)), data[[3, 1, 2, 0]])
    for part in (*engines, *storages, *hosts):
        part.close()


def test_memory_pinned_for_one_device_serves_the_other(two_gpus: Pair) -> None:
    first, second = two_gpus
    with on_host(first) as host, on_gpu(second) as device, GpuTransferEngine(second) as engine:
        data = random_bytes(host.layout, 3)
        host.write(ids(0, 1, 2), data)
        engine.copy(host, device, ids(0, 1, 2), ids(5, 3, 1)).result(PATIENCE_S)
        assert np.array_equal(device.read(ids(5, 3, 1)), data)


def test_engine_refuses_memory_of_the_other_device(two_gpus: Pair) -> None:
    first, second = two_gpus
    with on_host(first) as host, on_gpu(second) as device, GpuTransferEngine(first) as engine:
        with pytest.raises(LayoutError, match="lies on another GPU than this engine moves for"):
            engine.copy(host, device, ids(0), ids(0))


def test_storage_refuses_memory_of_the_other_device(two_gpus: Pair) -> None:
    first, second = two_gpus
    with on_gpu(first) as storage:
        layout = storage.layout
    foreign = Foreign(DeviceMemory(second, layout.buffer_nbytes))
    with pytest.raises(LayoutError, match="buffer 0 lies on device 1, this storage is on device 0"):
        CudaStorage(layout, gpu=first, buffers=[foreign])
