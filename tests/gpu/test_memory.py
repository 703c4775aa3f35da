"""Memory is freed in any order of letting go, and a full device refuses with a reason and loses nothing."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_site import PATIENCE_S, ids, layout_of, on_gpu, on_host, random_bytes

from kvbm.errors import StorageError, TransferError
from kvbm.gpu import DeviceMemory, Gpu, PinnedMemory
from kvbm.layout import BlockLayout
from kvbm.storage import CudaStorage, HostStorage
from kvbm.transfer import GpuTransferEngine, PathTable
from kvbm.transfer.choose import Cell

MIB = 1 << 20
SLACK_NBYTES = 64 * MIB  # what a driver keeps for itself, now and then


def large(num_blocks: int) -> BlockLayout:
    """Blocks of 1 MiB in eight layers."""
    return BlockLayout.layer_separate(
        num_blocks=num_blocks,
        num_layers=8,
        outer_dim=2,
        block_size=16,
        inner_dim=4096,
        dtype="uint8",
        block_first=True,
    )


def whole(layout: BlockLayout) -> BlockLayout:
    return layout.dense(layout.num_blocks)


@pytest.mark.parametrize("order", list(itertools.permutations(("device", "host", "engine"), 3)))
def test_ends_in_any_order_leave_the_bytes_right_and_no_memory(gpu: Gpu, order: tuple[str, ...]) -> None:
    gc.collect()
    free_nbytes = gpu.device.memory_info()[0]
    parts: dict[str, Any] = {
        "device": on_gpu(gpu, "outer_first"),
        "host": on_host(gpu),
        "engine": GpuTransferEngine(gpu),
    }
    data = random_bytes(parts["device"].layout, 4)
    parts["device"].write(ids(1, 2, 3, 4), data)
    arrays = [buffer[:] for buffer in parts["host"].buffers]
    layout = parts["host"].layout
    producer = gpu.device.create_stream()
    gpu.device.delay(producer, 0.05)
    transfer = parts["engine"].copy(
        parts["device"], parts["host"], ids(1, 2, 3, 4), ids(7, 0, 5, 2), wait_for=[producer]
    )
    for name in order:
        parts.pop(name).close()
        gc.collect()
    assert transfer.result(PATIENCE_S).good.all()
    with HostStorage(layout, buffers=arrays) as kept:
        assert np.array_equal(kept.read(ids(7, 0, 5, 2)), data)
    producer.close()
    del arrays, transfer, producer, kept
    gc.collect()
    if gpu.is_simulated:
        counts = gpu.module.simulation.counts()
        assert {name: counts[name] for name in ("allocations", "registrations", "nbytes", "waiting")} == {
            "allocations": 0, "registrations": 0, "nbytes": 0, "waiting": 0
        }  # fmt: skip
    assert gpu.device.memory_info()[0] >= free_nbytes - (0 if gpu.is_simulated else SLACK_NBYTES)


def test_a_large_storage_is_free_again_once_it_is_let_go(gpu: Gpu) -> None:
    gc.collect()
    free_nbytes = gpu.device.memory_info()[0]
    storage = CudaStorage(large(192), gpu=gpu)
    assert gpu.device.memory_info()[0] <= free_nbytes - 192 * MIB
    storage.close()
    gc.collect()
    assert gpu.device.memory_info()[0] >= free_nbytes - SLACK_NBYTES


def test_pinned_memory_is_the_devices_only_while_somebody_holds_it(gpu: Gpu) -> None:
    memory = PinnedMemory(gpu, MIB, in_background=False)
    array, address = memory.memory[4096:8192], memory.address
    kind = gpu.module.pointer_kind(address)[0]
    memory.close()
    del memory
    gc.collect()
    array[:] = 5
    assert gpu.module.pointer_kind(address)[0] == kind
    del array
    gc.collect()
    assert gpu.module.pointer_kind(address)[0] != kind


# -- a full device ---------------------------------------------------------------------------------------------


@pytest.fixture
def full_gpu(gpu: Gpu) -> Iterator[tuple[Gpu, list[DeviceMemory]]]:
    """Give a device with some 96 MiB left, and what takes the rest."""
    if gpu.is_simulated:
        gpu.module.simulation.total_nbytes = 256 * MIB
    gpu.device.create_stream().close()  # a context is made, and takes its part
    hog = [DeviceMemory(gpu, gpu.device.memory_info()[0] - 96 * MIB)]
    yield gpu, hog
    hog.clear()


def test_storage_that_does_not_fit_is_refused_with_what_is_free(full_gpu: tuple[Gpu, list[DeviceMemory]]) -> None:
    gpu, hog = full_gpu
    for _ in range(3):
        with pytest.raises(
            StorageError, match=rf"cannot have {256 * MIB} bytes on .*, \d+ are free: give fewer blocks"
        ):
            CudaStorage(large(256), gpu=gpu)
    with CudaStorage(large(16), gpu=gpu) as small:
        data = random_bytes(small.layout, 2)
        small.write(ids(3, 9), data)
        assert np.array_equal(small.read(ids(3, 9)), data)
    hog.clear()
    gc.collect()
    CudaStorage(large(128), gpu=gpu).close()


def test_copy_without_room_to_stage_fails_alone_and_the_next_goes_well(
    full_gpu: tuple[Gpu, list[DeviceMemory]],
) -> None:
    gpu, hog = full_gpu
    layout = large(48)
    data = random_bytes(layout, 48)
    every = np.arange(48, dtype=np.int32)
    staged = PathTable((Cell("up", 0, 1, ("staged",)), Cell("down", 0, 1, ("staged",))))
    host = HostStorage(whole(layout), gpu=gpu)
    host.write(every, data)
    with (
        CudaStorage(layout, gpu=gpu) as device,
        GpuTransferEngine(gpu, table=staged, staging_nbytes=1024 * MIB) as engine,
    ):
        hog.append(DeviceMemory(gpu, gpu.device.memory_info()[0] - 24 * MIB))
        with pytest.raises(TransferError, match="the copy of 48 blocks failed: cannot have"):
            engine.copy(host, device, every, every).result(PATIENCE_S)
        few = every[:8]
        engine.copy(host, device, few, few).result(PATIENCE_S)
        assert np.array_equal(device.read(few), data[:8])
        hog.clear()
        gc.collect()
        engine.copy(host, device, every, every).result(PATIENCE_S)
        assert np.array_equal(device.read(every), data)
    host.close()


def test_host_memory_that_is_not_pinned_still_works(gpu: Gpu) -> None:
    with HostStorage(layout_of("contiguous")) as host, on_gpu(gpu, "block_first") as device:
        data = random_bytes(device.layout, 3)
        device.write(ids(1, 4, 6), data)
        with GpuTransferEngine(gpu) as engine:
            engine.copy(device, host, ids(1, 4, 6), ids(2, 0, 7)).result(PATIENCE_S)
        assert np.array_equal(host.read(ids(2, 0, 7)), data)
