"""No copy runs before the work that it needs, none after it before the copy: with streams that a test advances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_site import PATIENCE_S, as_layout, ids, names, on_gpu, on_host

from kvbm.errors import TransferTimeout
from kvbm.storage import CudaStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine, PathTable, submit_layers
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell

OLD, FRESH = 1, 2


class Scene:
    """A block on the GPU with old bytes, and a forward pass that writes fresh ones when it is let."""

    def __init__(self, stepped: SimulatedGpu, kind: str = "contiguous", path: str = "memcpy", **arguments: Any) -> None:
        self.stepped = stepped
        self.device = stepped.gpu.device
        self.source = on_gpu(stepped.gpu, **arguments)
        self.destination = on_host(stepped.gpu, kind)
        table = PathTable(tuple(Cell(direction, 0, 1, (path,)) for direction in DIRECTIONS))
        self.engine = GpuTransferEngine(stepped.gpu, table=table, has_threads=False)
        self.producer = self.device.create_stream()
        self.nbytes = self.source.layout.block_nbytes
        self.fill(self.device.create_stream(), OLD)
        self.stepped.run()
        self.old = self.bytes()
        self.delay()
        self.fill(self.producer, FRESH)

    def delay(self) -> None:
        self.device.delay(self.producer, 0.001)

    def fill(self, stream: Any, seed: int) -> None:
        self.device.fill(stream, self.source.address(3, 0, 0), self.nbytes, seed)

    def bytes(self) -> Any:
        return self.source.read(ids(3))[0].copy()

    def copy(self, **arguments: Any) -> Any:
        return self.engine.copy(self.source, self.destination, ids(3), ids(0), **arguments)

    def arrived(self) -> Any:
        """Let our own streams run as far as they can before the producer's, then the rest."""
        for lane in self.engine._lanes.values():
            if lane._stream is not None:
                self.stepped.step(lane.stream, 1000)
        early = self.destination.read(ids(0))[0].copy()
        self.stepped.run()
        self.engine.settle()
        return early, self.destination.read(ids(0))[0].copy()

    def close(self) -> None:
        self.stepped.run()
        self.engine.close()
        self.source.close()
        self.destination.close()


def test_copy_that_is_started_too_early_takes_the_old_bytes(stepped: SimulatedGpu) -> None:
    """The simulation catches what `wait_for` is there to prevent."""
    scene = Scene(stepped, streams=())
    transfer = scene.copy()
    _, arrived = scene.arrived()
    assert transfer.done()
    assert (arrived == scene.old).all()
    assert not (scene.bytes() == scene.old).all()
    scene.close()


@pytest.mark.parametrize("how", ["stream", "event", "attached"])
def test_copy_waits_for_the_work_that_fills_its_blocks(stepped: SimulatedGpu, how: str) -> None:
    scene = Scene(stepped, streams=())
    arguments: dict[str, Any] = {}
    if how == "attached":
        scene.source.attach_streams(scene.producer)
    elif how == "event":
        event = scene.device.create_event()
        scene.producer.record(event)
        arguments["wait_for"] = [event]
    else:
        arguments["wait_for"] = [scene.producer]
    transfer = scene.copy(**arguments)
    early, arrived = scene.arrived()
    assert not early.any()
    assert transfer.result(0).num_blocks == 1
    assert (arrived == scene.bytes()).all()
    assert not (arrived == scene.old).all()
    scene.close()


@pytest.mark.parametrize("is_event", [False, True])
@pytest.mark.parametrize("is_by_layers", [False, True])
@pytest.mark.parametrize("how", [*PATHS, "permute"])
def test_every_path_waits_for_the_work_that_fills_its_blocks(
    stepped: SimulatedGpu, how: str, is_by_layers: bool, is_event: bool
) -> None:
    kind, path = ("head_major", "memcpy") if how == "permute" else ("outer_first", how)
    scene = Scene(stepped, kind, path, streams=())
    work: Any = scene.producer
    if is_event:
        work = scene.device.create_event()
        scene.producer.record(work)
    if is_by_layers:
        ends = scene.source, scene.destination, ids(3), ids(0)
        transfer = submit_layers(scene.engine, *ends, hashes=names(1), wait_for=[work]).transfer
    else:
        transfer = scene.copy(wait_for=[work], hashes=names(1))
    early, arrived = scene.arrived()
    assert not early.any()
    assert transfer.result(0).good.all()
    fresh = as_layout(scene.bytes()[None], scene.source.layout, scene.destination.layout)[0]
    assert (arrived == fresh).all()
    own = scene.engine.compute_checksums(scene.destination, ids(0), names(1))
    assert (scene.destination.checksums[ids(0)] == own).all()
    scene.close()


def test_checksums_wait_for_the_work_that_fills_the_blocks(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    old = scene.engine.compute_checksums(scene.source, ids(3), names(1))
    scene.source.attach_streams(scene.producer)
    fresh = scene.engine.compute_checksums(scene.source, ids(3), names(1))
    assert fresh != old
    assert fresh == scene.engine.compute_checksums(scene.source, ids(3), names(1))
    scene.close()


def test_default_stream_is_waited_for_unless_told_otherwise(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped)
    default = scene.device.adopt_stream(0)
    scene.fill(default, 5)
    scene.copy()
    early, arrived = scene.arrived()
    assert not early.any()
    assert not (arrived == scene.old).all()
    scene.close()


def test_block_is_not_overwritten_before_the_work_that_reads_it(stepped: SimulatedGpu) -> None:
    """An onboard into a block whose last forward pass is still queued."""
    scene = Scene(stepped, streams=())
    scene.source.attach_streams(scene.producer)
    result = on_gpu(stepped.gpu, streams=())
    scene.device.memcpy(scene.producer, result.address(0, 0, 0), scene.source.address(3, 0, 0), scene.nbytes)
    scene.destination.write(ids(0), np.full((1, scene.nbytes), 7, np.uint8))
    scene.engine.copy(scene.destination, scene.source, ids(0), ids(3), is_urgent=True)
    scene.arrived()
    assert not (result.read(ids(0)) == 7).all()
    assert (scene.bytes() == 7).all()
    result.close()
    scene.close()


def test_streams_that_follow_see_what_was_copied(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    follower, careless = scene.device.create_stream(), scene.device.create_stream()
    result = on_gpu(stepped.gpu, num_blocks=2, streams=())
    scene.destination.write(ids(0), np.full((1, scene.nbytes), 7, np.uint8))
    scene.engine.copy(scene.destination, scene.source, ids(0), ids(4), then=[follower])
    for place, stream in enumerate((follower, careless)):
        scene.device.memcpy(stream, result.address(place, 0, 0), scene.source.address(4, 0, 0), scene.nbytes)
        stepped.step(stream, 1000)
    stepped.run()
    assert (result.read(ids(0)) == 7).all()
    assert not (result.read(ids(1)) == 7).all()
    result.close()
    scene.close()


def test_reading_and_writing_blocks_waits_for_the_attached_streams(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    assert (scene.bytes() == scene.old).all()  # nobody was named, nobody is waited for
    scene.source.attach_streams(scene.producer)
    fresh = scene.bytes()
    assert not (fresh == scene.old).all()
    scene.fill(scene.producer, 9)
    scene.source.write(ids(3), np.full((1, scene.nbytes), 7, np.uint8))
    stepped.run()
    assert (scene.bytes() == 7).all()
    scene.close()


def test_copies_down_and_up_do_not_wait_for_each_other(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    stuck = scene.copy(wait_for=[scene.producer])
    other = on_host(stepped.gpu)
    upward = scene.engine.copy(other, scene.source, ids(1), ids(1))
    urgent = scene.engine.copy(other, scene.source, ids(2), ids(2), is_urgent=True)
    for name in ("down", "up", "expedited"):
        stepped.step(scene.engine._lanes[name].stream, 1000)
    scene.engine.settle()
    assert [transfer.done() for transfer in (stuck, upward, urgent)] == [False, True, True]
    stepped.run()
    scene.engine.settle()
    assert stuck.done()
    other.close()
    scene.close()


def test_deadline_ends_for_the_waiter_and_the_blocks_drain(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    transfer = scene.copy(wait_for=[scene.producer], deadline_s=0.0)
    with pytest.raises(TransferTimeout):
        transfer.result()
    assert transfer.is_draining
    landed: list[Any] = []
    transfer.add_landed_callback(landed.append)
    scene.arrived()
    assert not transfer.is_draining
    assert landed == [transfer]
    scene.close()


def test_wait_without_a_limit_needs_no_thread(stepped: SimulatedGpu) -> None:
    scene = Scene(stepped, streams=())
    assert scene.copy(wait_for=[scene.producer]).result().num_blocks == 1
    scene.close()


def test_thread_of_a_lane_sleeps_until_the_device_is_done(stepped: SimulatedGpu) -> None:
    stepped.gpu.module.simulation.set_mode("held")
    with GpuTransferEngine(stepped.gpu) as engine:
        source, destination = CudaStorage(on_gpu(stepped.gpu).layout, gpu=stepped.gpu, streams=()), on_host(stepped.gpu)
        transfer = engine.copy(source, destination, ids(3), ids(0))
        assert not transfer.wait(0)
        assert engine.num_in_flight == 1
        stepped.run()
        assert transfer.result(PATIENCE_S).num_blocks == 1
        stepped.gpu.module.simulation.set_mode("running")
    source.close()
    destination.close()
