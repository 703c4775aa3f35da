"""Layers arrive one after the other, are offloaded as they are written, and are compared at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_site import KINDS, PATIENCE_S, as_layout, ids, layout_of, names, on_gpu, on_host, random_bytes

from kvbm._backend import Backend
from kvbm.errors import (
    ConfigError,
    CudaError,
    LayoutError,
    PoolClosed,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from kvbm.storage import DeviceStorage, HostStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine, TransferEngine, submit_layers

FROM, TO = ids(6, 1, 2), ids(0, 7, 3)
NUM_LAYERS = 3


def layer_of(storage: Any, block: int, layer: int) -> Any:
    nbytes = storage.layout.outer_dim * storage.layout.region_nbytes
    return storage.read(ids(block))[0, layer * nbytes : (layer + 1) * nbytes]


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("destination_kind", KINDS)
@pytest.mark.parametrize("is_down", [False, True])
def test_layers_add_up_to_the_blocks(
    simulated: SimulatedGpu, source_kind: str, destination_kind: str, is_down: bool
) -> None:
    source: Any = on_gpu(simulated.gpu, source_kind) if is_down else on_host(simulated.gpu, source_kind)
    destination: Any = on_host(simulated.gpu, destination_kind) if is_down else on_gpu(simulated.gpu, destination_kind)
    data = random_bytes(source.layout, 3)
    with GpuTransferEngine(simulated.gpu) as engine:
        source.write(FROM, data)
        layers = submit_layers(engine, source, destination, FROM, TO, hashes=names(3), when_written=is_down)
        if is_down:
            for layer in (2, 0, 1):
                assert not layers.transfer.done()
                layers.layer_written(layer)
        assert layers.transfer.result(PATIENCE_S).good.all()
        assert (destination.read(TO) == as_layout(data, source.layout, destination.layout)).all()
        if is_down:  # what was kept is what a copy of the whole would have kept
            back = on_gpu(simulated.gpu, source_kind)
            assert engine.copy(destination, back, TO, FROM, hashes=names(3)).result(PATIENCE_S).good.all()
            back.close()
    source.close()
    destination.close()


def test_layer_can_be_used_while_the_next_is_on_its_way(stepped: SimulatedGpu) -> None:
    source, destination = on_host(stepped.gpu), on_gpu(stepped.gpu, "block_first", streams=())
    data = random_bytes(source.layout, 3)
    source.write(FROM, data)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    layers = submit_layers(engine, source, destination, FROM, TO)
    compute = stepped.gpu.device.create_stream()
    seen = on_gpu(stepped.gpu, "block_first", streams=())
    layer_nbytes = source.layout.outer_dim * source.layout.region_nbytes
    for layer in range(NUM_LAYERS):
        layers.wait_layer(layer, compute)
        there, here = seen.address(0, layer, 0), destination.address(0, layer, 0)
        stepped.gpu.device.memcpy(compute, there, here, layer_nbytes)
        assert stepped.step(compute, 100) == 0  # nothing has arrived
        lane = engine._lanes["expedited"].stream
        while not stepped.step(compute, 1):
            assert stepped.step(lane, 1) == 1
        stepped.step(compute, 100)
        assert layers.transfer.done() is False
    assert (seen.read(ids(0))[0] == data[0]).all()
    stepped.run()
    engine.settle()
    assert layers.transfer.result(0).good.all()
    engine.close()
    for storage in (source, destination, seen):
        storage.close()


def test_layer_is_offloaded_after_the_kernel_that_writes_it(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    layers = submit_layers(engine, source, destination, FROM, TO, when_written=True)
    compute = stepped.gpu.device.create_stream()
    layer_nbytes = source.layout.outer_dim * source.layout.region_nbytes
    for layer in range(NUM_LAYERS):
        for block in FROM.tolist():
            stepped.gpu.device.fill(compute, source.address(block, layer, 0), layer_nbytes, 10 * layer + block)
        layers.layer_written(layer, compute)
    down = engine._lanes["down"].stream
    assert stepped.step(down, 1000) == 0
    stepped.step(compute, 4)  # three fills, and the event that says so
    stepped.step(down, 1000)
    assert layer_of(destination, 7, 0).any()
    assert not layer_of(destination, 7, 1).any()
    stepped.run()
    engine.settle()
    assert layers.transfer.result(0).num_blocks == 3
    assert (destination.read(TO) == source.read(FROM)).all()
    engine.close()
    source.close()
    destination.close()


def test_spoilt_block_is_known_at_the_end(simulated: SimulatedGpu) -> None:
    with on_gpu(simulated.gpu) as gpu, on_host(simulated.gpu) as host, GpuTransferEngine(simulated.gpu) as engine:
        gpu.write(FROM, random_bytes(gpu.layout, 3))
        engine.copy(gpu, host, FROM, TO, hashes=names(3)).result(PATIENCE_S)
        host.buffers[0][7 * host.layout.strides.block] ^= 1
        layers = submit_layers(engine, host, gpu, TO, FROM, hashes=names(3))
        for layer in range(NUM_LAYERS):
            layers.wait_layer(layer)
        assert layers.transfer.result(PATIENCE_S).good.tolist() == [True, False, True]


def test_wrong_layers_are_refused(simulated: SimulatedGpu) -> None:
    with on_gpu(simulated.gpu) as gpu, on_host(simulated.gpu) as host, GpuTransferEngine(simulated.gpu) as engine:
        layers = submit_layers(engine, gpu, host, FROM, TO, when_written=True)
        for call in (layers.layer_written, layers.wait_layer):
            for layer in (-1, 3):
                with pytest.raises(LayoutError, match=rf"layer {layer} is outside 0\.\.2"):
                    call(layer)
        with pytest.raises(ConfigError, match="nothing is under way"):
            layers.wait_layer(0)
        layers.layer_written(0)
        with pytest.raises(ConfigError, match="layer 0 was said to be written before"):
            layers.layer_written(0)
        assert layers.cancel()
        assert not layers.cancel()
        layers.layer_written(1)
        with pytest.raises(TransferCancelled):
            layers.transfer.result(PATIENCE_S)


def test_cancelled_layers_drain_until_those_under_way_have_landed(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    for end in ("cancel", "deadline"):
        layers = submit_layers(
            engine, source, destination, FROM, TO, when_written=True, deadline_s=None if end == "cancel" else 0.0
        )
        if end == "cancel":
            layers.layer_written(0)
            layers.cancel()
        else:
            with pytest.raises(TransferTimeout):
                layers.transfer.result()
            layers.layer_written(0)  # too late: nothing is copied, and it may land
        assert layers.transfer.is_draining
        stepped.run()
        engine.settle()
        assert not layers.transfer.is_draining
    engine.close()
    source.close()
    destination.close()


def test_failed_layer_fails_the_transfer(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu), on_host(simulated.gpu)
    engine = GpuTransferEngine(simulated.gpu)
    layers = submit_layers(engine, source, destination, FROM, TO, when_written=True)
    layers.layer_written(0)
    layers.wait_layer(0)
    simulated.fail_operation(700)
    layers.layer_written(1)
    with pytest.raises(TransferError):
        layers.wait_layer(1)
    layers.layer_written(2)
    with pytest.raises(TransferError, match="the copy of 3 blocks failed"):
        layers.transfer.result(PATIENCE_S)
    assert not layers.transfer.is_draining
    engine.close()
    source.close()
    destination.close()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layer_that_could_not_be_queued_fails_the_transfer(simulated: SimulatedGpu, layer: int) -> None:
    source, destination = on_gpu(simulated.gpu, streams=()), on_host(simulated.gpu)
    with GpuTransferEngine(simulated.gpu) as engine:
        engine.copy(source, destination, FROM, TO).result()  # the lane has all that it needs
        layers = submit_layers(engine, source, destination, FROM, TO, when_written=True)
        for i in range(3):
            if i == layer:
                simulated.fail_call("cudaEventCreateWithFlags", 2)  # the other layers are not the worse for it
            layers.layer_written(i)
            if i == layer:
                with pytest.raises(TransferError, match="cudaEventCreateWithFlags"):
                    layers.wait_layer(i)
        with pytest.raises(TransferError, match="cudaEventCreateWithFlags"):
            layers.transfer.result(PATIENCE_S)
        assert engine.lost_reason is None
        assert engine.means.scratch.num_taken == 0
    source.close()
    destination.close()


def test_layers_of_a_closed_engine_end_when_they_are_cancelled(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    engine = GpuTransferEngine(stepped.gpu)
    layers = submit_layers(engine, source, destination, FROM, TO, when_written=True)
    layers.layer_written(0)
    engine.close(PATIENCE_S)
    with pytest.raises(PoolClosed):
        layers.layer_written(1)
    assert layers.cancel()
    assert not layers.transfer.is_draining
    with pytest.raises(TransferCancelled):
        layers.transfer.result(0)
    assert engine.means.scratch.num_taken == 0
    source.close()
    destination.close()


def test_layer_whose_copy_could_not_begin_is_not_taken_for_copied(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    data = random_bytes(source.layout, 3)
    source.write(FROM, data)
    producer = stepped.gpu.device.create_stream()
    stepped.gpu.device.delay(producer, 0.001)
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        layers = submit_layers(engine, source, destination, FROM, TO, when_written=True, wait_for=[producer])
        stepped.fail_call("cudaStreamCreateWithPriority", 2)
        with pytest.raises(CudaError, match="cudaStreamCreateWithPriority"):
            layers.layer_written(0)
        for layer in (1, 2, 0):
            layers.layer_written(layer)
        stepped.step(engine._lanes["down"].stream, 1000)
        assert engine.settle() == 0  # what was to be waited for is not forgotten
        stepped.run()
        engine.settle()
        assert layers.transfer.result(0).good.all()
        assert (destination.read(TO) == data).all()
    source.close()
    destination.close()


@pytest.mark.parametrize("source_kind", KINDS)
def test_host_engine_keeps_the_same_interface(backend: Backend, source_kind: str) -> None:
    source = DeviceStorage(layout_of(source_kind), backend=backend)
    with source, HostStorage(layout_of("contiguous"), backend=backend) as destination:
        with TransferEngine(backend=backend) as engine:
            data = random_bytes(source.layout, 3)
            source.write(FROM, data)
            down = submit_layers(engine, source, destination, FROM, TO, hashes=names(3), when_written=True)
            for layer in range(NUM_LAYERS):
                with pytest.raises(ConfigError, match="nothing is under way"):
                    down.wait_layer(layer)
                down.layer_written(layer)
                down.wait_layer(layer)
            assert down.transfer.result(0).good.all()
            assert (destination.read(TO) == as_layout(data, source.layout, destination.layout)).all()
            destination.buffers[0][3 * destination.layout.strides.block] ^= 1
            up = submit_layers(engine, destination, source, TO, FROM, hashes=names(3))
            assert up.transfer.result(0).good.tolist() == [True, True, False]
            with pytest.raises(ConfigError, match="neither storage is on one"):
                submit_layers(engine, destination, source, TO, FROM, wait_for=[None])
            part = submit_layers(engine, source, destination, FROM, TO, when_written=True)
            part.layer_written(1)
            part.cancel()
            assert not part.transfer.is_draining
            nothing = np.empty(0, np.int32)
            assert submit_layers(engine, source, destination, nothing, nothing).transfer.result(0).num_blocks == 0
