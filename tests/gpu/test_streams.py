"""A copy that starts too early takes old bytes; one that waits for its producer never does.

A kernel that only waits stands before the producer's: the difference is as large as it must be to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_site import PATIENCE_S, ids, on_gpu, on_host

from kvbm.gpu import Gpu
from kvbm.transfer import GpuTransferEngine

OLD, FRESH = 1, 2
DELAY_S = 0.25


class Scene:
    """A block with old bytes, and a producer that is going to write fresh ones, late."""

    def __init__(self, gpu: Gpu) -> None:
        self.device = gpu.device
        self.source, self.destination = on_gpu(gpu, streams=()), on_host(gpu)
        self.spare = on_gpu(gpu, streams=())
        self.engine = GpuTransferEngine(gpu)
        self.producer, self.other = gpu.device.create_stream(), gpu.device.create_stream()
        self.nbytes = self.source.layout.block_nbytes
        self.contents = {}
        for seed in (FRESH, OLD):
            self.fill(self.other, seed)
            self.other.synchronize()
            self.contents[seed] = self.source.read(ids(3))[0].copy()
        assert (self.contents[FRESH] != self.contents[OLD]).any()
        # A first copy loads and maps what the next must not wait for.
        self.engine.copy(self.source, self.destination, ids(3), ids(0)).result(PATIENCE_S)

    def produce(self) -> None:
        self.device.delay(self.producer, DELAY_S)
        self.fill(self.producer, FRESH)

    def fill(self, stream: Any, seed: int) -> None:
        self.device.fill(stream, self.source.address(3, 0, 0), self.nbytes, seed)

    def arrived(self, **arguments: Any) -> Any:
        """Copy down while the producer is late; give the seed of what came."""
        transfer = self.engine.copy(self.source, self.destination, ids(3), ids(1), **arguments)
        transfer.result(PATIENCE_S)
        came = self.destination.read(ids(1))[0]
        return next((seed for seed, data in self.contents.items() if np.array_equal(came, data)), None)

    def close(self) -> None:
        self.producer.synchronize()
        self.engine.close()
        for storage in (self.source, self.destination, self.spare):
            storage.close()


@pytest.fixture
def scene(gpu: Gpu) -> Iterator[Scene]:
    scene = Scene(gpu)
    yield scene
    scene.close()


def test_copy_that_starts_too_early_takes_the_old_bytes(scene: Scene) -> None:
    scene.produce()
    assert scene.arrived() == OLD
    scene.producer.synchronize()
    assert scene.arrived() == FRESH


@pytest.mark.parametrize("how", ["stream", "event", "attached", "protocol"])
def test_copy_waits_for_its_producer(scene: Scene, how: str) -> None:
    scene.produce()
    if how == "attached":
        scene.source.attach_streams(scene.producer)
        assert scene.arrived() == FRESH
        return
    work: Any = scene.producer
    if how == "event":
        work = scene.device.create_event()
        scene.producer.record(work)
    elif how == "protocol":
        handle = scene.producer.handle
        work = type("Foreign", (), {"__cuda_stream__": lambda self: (0, handle)})()
    assert scene.arrived(wait_for=[work]) == FRESH


def test_one_block_is_ordered_and_the_other_copies_go_on(scene: Scene) -> None:
    scene.produce()
    late = scene.engine.copy(scene.source, scene.destination, ids(3), ids(1), wait_for=[scene.producer])
    up = scene.engine.copy(scene.destination, scene.spare, ids(0), ids(2))
    assert up.result(PATIENCE_S).good.all()
    assert not late.done()
    assert late.result(PATIENCE_S).good.all()


def test_streams_that_follow_see_what_was_copied(scene: Scene) -> None:
    follower = scene.device.create_stream()
    scene.destination.write(ids(5), np.full((1, scene.nbytes), 7, np.uint8))
    scene.device.delay(scene.producer, DELAY_S)
    scene.engine.copy(
        scene.destination, scene.source, ids(5), ids(4), wait_for=[scene.producer], then=[follower], is_urgent=True
    )
    scene.device.memcpy(follower, scene.spare.address(0, 0, 0), scene.source.address(4, 0, 0), scene.nbytes)
    follower.synchronize()
    assert (scene.spare.read(ids(0)) == 7).all()


def test_block_is_not_overwritten_before_the_work_that_reads_it(scene: Scene) -> None:
    scene.device.delay(scene.producer, DELAY_S)
    scene.device.memcpy(scene.producer, scene.spare.address(0, 0, 0), scene.source.address(3, 0, 0), scene.nbytes)
    scene.destination.write(ids(5), np.full((1, scene.nbytes), 7, np.uint8))
    scene.source.attach_streams(scene.producer)
    scene.engine.copy(scene.destination, scene.source, ids(5), ids(3), is_urgent=True).result(PATIENCE_S)
    scene.producer.synchronize()
    assert np.array_equal(scene.spare.read(ids(0))[0], scene.contents[OLD])
    assert (scene.source.read(ids(3)) == 7).all()
