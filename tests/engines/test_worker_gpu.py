"""The worker's half on a simulated GPU: whatever is copied too early, or overwritten too early, is seen.

In stepped mode nothing runs until somebody waits for it, and then only what that needs: a copy that does not wait for
its producer takes the old bytes, each time.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from worker_site import LAYER_NBYTES, NBYTES, NUM_LAYERS, PATIENCE_S, WorkerSite, content, ids, layers_on

from kvbm._backend import Backend
from kvbm.engines import shard as shard_module
from kvbm.engines.messages import LoadOrder
from kvbm.engines.stream_copies import StreamCopies
from kvbm.errors import StorageError
from kvbm.gpu import DeviceMemory
from kvbm.jobs import JobResult, Outcome
from kvbm.storage import CudaStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine

OLD, FRESH = 1, 2


class GpuSite(WorkerSite):
    """A worker whose engine computes on a stream of a GPU."""

    def __init__(self, backend: Backend, simulated: SimulatedGpu, *, is_outermost: bool = False) -> None:
        super().__init__(backend, simulated.gpu, is_outermost=is_outermost)
        self.simulated = simulated
        self.device = simulated.gpu.device
        self.stream = self.device.create_stream()
        self.staged = DeviceMemory(simulated.gpu, NBYTES)  # what a pass is about to write
        self.seen = DeviceMemory(simulated.gpu, NBYTES)  # what a pass has read

    def queue_write(self, slot: int, seed: int) -> None:
        """Queue a pass that fills a slot."""
        self.device.write(self.staged.address, content(seed))
        for layer in range(NUM_LAYERS):
            place = self.engine.address(slot, layer, 0)
            self.device.memcpy(self.stream, place, self.staged.address + layer * LAYER_NBYTES, LAYER_NBYTES)

    def queue_read(self, slot: int, layer: int) -> None:
        """Queue a layer's part of a pass that reads a slot."""
        place = self.seen.address + layer * LAYER_NBYTES
        self.device.memcpy(self.stream, place, self.engine.address(slot, layer, 0), LAYER_NBYTES)

    def settle(self) -> None:
        """Let the device do all that is queued, and finish what it is done with."""
        self.simulated.run()
        streams: Any = self.shard.executor.streams
        if streams is not None:
            streams._engine.settle()

    def seen_seed(self) -> int | None:
        """Tell whose bytes the pass has read."""
        self.stream.synchronize()
        data = self.device.read(self.seen.address, NBYTES)
        return next((seed for seed in range(40) if np.array_equal(data, content(seed))), None)


def need_simulation() -> None:
    if importlib.util.find_spec("kvbm._native.simulated_device") is None:
        pytest.skip("this build has no simulated device")


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    need_simulation()
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    # Threads of lanes would wait for copies, and so run them, at times that no test chooses.
    monkeypatch.setattr(
        "kvbm.engines.stream_copies.GpuTransferEngine",
        lambda gpu, **given: GpuTransferEngine(gpu, has_threads=False, **given),
    )
    with SimulatedGpu(is_stepped=True) as stepped:
        yield stepped


@pytest.fixture(params=[False, True], ids=["separate", "outermost"])
def site(backend: Backend, stepped: SimulatedGpu, request: pytest.FixtureRequest) -> Iterator[GpuSite]:
    site = GpuSite(backend, stepped, is_outermost=request.param)
    yield site
    site.settle()
    site.close()


def wait_for(site: GpuSite, *job_ids: int) -> None:
    site.core._wait_for_end({(0, job_id) for job_id in job_ids})


def test_memory_of_a_gpu_is_taken_and_the_host_tier_is_pinned(site: GpuSite) -> None:
    assert isinstance(site.engine, CudaStorage)
    assert site.engine.streams == ()
    assert isinstance(site.shard.executor.streams, StreamCopies)
    assert site.host.wait_pinned(ids(7))
    site.put_below(5)
    assert site.seed_in(site.host, 0) == 5


def test_save_waits_for_the_pass_that_fills_its_block(site: GpuSite) -> None:
    site.write(3, OLD)
    save = site.save(3, 0, FRESH)
    site.core.begin(site.orders(save), stream=site.stream)
    site.queue_write(3, FRESH)
    site.core.after_forward(site.stream)
    wait_for(site, save.job_id)
    assert site.seed_in(site.host, 0) == FRESH


def test_load_waits_for_the_passes_that_read_its_slot(site: GpuSite) -> None:
    site.put_below(FRESH)
    site.write(3, OLD)
    for layer in range(NUM_LAYERS):
        site.queue_read(3, layer)
    load = site.load(0, 3, FRESH)
    order = LoadOrder(request_id="a", job_ids=[(0, load.job_id)])
    site.core.begin(site.orders(load, loads=[order]), stream=site.stream)
    wait_for(site, load.job_id)
    assert site.core.take().received == {"a"}
    assert site.seen_seed() == OLD
    assert site.seed_in(site.engine, 3) == FRESH


def test_held_load_comes_behind_what_the_engine_does_to_new_blocks(site: GpuSite) -> None:
    site.put_below(FRESH)
    load = site.load(0, 3, FRESH)
    site.core.begin(site.orders(load), stream=site.stream, holds_loads=True)
    site.queue_write(3, OLD)
    site.core.begin_loads(site.stream)
    wait_for(site, load.job_id)
    site.stream.synchronize()
    assert site.seed_in(site.engine, 3) == FRESH


def test_fence_holds_the_stream_back_and_not_the_engine(site: GpuSite, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    end = StreamCopies._end

    def late(self: StreamCopies, *arguments: Any) -> JobResult:
        assert gate.wait(PATIENCE_S)
        return end(self, *arguments)

    monkeypatch.setattr(StreamCopies, "_end", late)
    site.write(3, OLD)
    site.write(4, OLD + 2)
    saves = site.save(3, 0, OLD), site.save(4, 1, OLD + 2)
    site.core.begin(site.orders(*saves), stream=site.stream)
    site.core.after_forward(site.stream)
    site.core.begin(site.orders(has_fence=True), stream=site.stream)
    assert site.core.num_open == 2, "one waits, the other was not even begun by its thread, and the engine goes on"
    for slot in (3, 4):
        site.queue_write(slot, FRESH)
    site.stream.synchronize()
    assert [site.seed_in(site.engine, slot) for slot in (3, 4)] == [FRESH, FRESH]
    gate.set()
    wait_for(site, *(save.job_id for save in saves))
    assert site.outcomes(site.core.take()) == {save.job_id: [Outcome.OK] for save in saves}
    assert [site.seed_in(site.host, block) for block in (0, 1)] == [OLD, OLD + 2]


def test_job_whose_time_is_over_is_not_begun_any_more_but_ended_where_it_was(site: GpuSite) -> None:
    streams: Any = site.shard.executor.streams
    site.write(3, OLD)
    late, early = site.save(3, 0, OLD), site.save(3, 1, OLD)
    for job in (late, early):
        streams.announce(job, streams.mark(site.stream))
    assert streams.execute(late, -1.0).outcomes.tolist() == [Outcome.LATE]
    streams.hold_back(site.stream)
    assert streams.execute(early, -1.0).outcomes.tolist() == [Outcome.OK]
    for job in (late, early):
        streams.forget(job.job_id)
    assert [site.seed_in(site.host, block) for block in (0, 1)] == [None, OLD]


def test_fence_is_not_held_up_by_a_save_that_could_not_be_queued(
    site: GpuSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StreamCopies, *arguments: Any) -> Any:
        raise StorageError("no")

    monkeypatch.setattr(StreamCopies, "_begin", refuse)
    save = site.save(3, 0, OLD)
    site.core.begin(site.orders(save), stream=site.stream)
    site.core.after_forward(site.stream)
    site.core.begin(site.orders(has_fence=True), stream=site.stream)
    wait_for(site, save.job_id)
    assert site.outcomes(site.core.take()) == {save.job_id: [Outcome.FAILED]}


@pytest.mark.parametrize("by_layer", [False, True])
def test_pass_reads_each_layer_of_a_synchronous_load_when_it_is_there(site: GpuSite, by_layer: bool) -> None:
    site.put_below(5, 6)
    site.write(3, OLD)
    jobs = site.load(1, 4, 6), site.load(0, 3, 5)
    site.core.begin(site.orders(*jobs, loads=[site.sync(*jobs)]), stream=site.stream)
    site.core.begin_sync_loads(site.stream, by_layer=by_layer)
    has_layers = site.core.has_layers
    assert has_layers
    for layer in range(NUM_LAYERS):
        if by_layer:
            site.core.wait_for_layer(layer, stream=site.stream)
        site.queue_read(3, layer)
    assert site.seen_seed() == 5
    site.settle()
    site.core.after_forward(site.stream)
    assert not site.core.has_layers
    news = site.core.take()
    assert (news.received, news.lost_slots) == (set(), set())
    assert site.outcomes(news) == {job.job_id: [Outcome.OK] for job in jobs}


def test_first_layer_is_read_while_the_others_are_on_their_way(site: GpuSite) -> None:
    site.put_below(5)
    load = site.load(0, 3, 5)
    site.core.begin(site.orders(load, loads=[site.sync(load)]), stream=site.stream)
    site.core.begin_sync_loads(site.stream, by_layer=True)
    site.core.wait_for_layer(0, stream=site.stream)
    site.queue_read(3, 0)
    site.stream.synchronize()
    first = site.device.read(site.seen.address, LAYER_NBYTES)
    assert np.array_equal(first, content(5)[:LAYER_NBYTES])
    last = site.device.read(site.engine.address(3, NUM_LAYERS - 1, 0), LAYER_NBYTES)
    assert not np.array_equal(last, content(5)[-LAYER_NBYTES:]), "nothing has waited for it"
    site.settle()
    site.core.after_forward(site.stream)
    assert site.seed_in(site.engine, 3) == 5


def test_synchronous_load_waits_for_the_passes_that_read_its_slot(site: GpuSite) -> None:
    site.put_below(FRESH)
    site.write(3, OLD)
    for layer in range(NUM_LAYERS):
        site.queue_read(3, layer)
    load = site.load(0, 3, FRESH)
    site.core.begin(site.orders(load, loads=[site.sync(load)]), stream=site.stream)
    site.core.begin_sync_loads(site.stream)
    streams: Any = site.shard.executor.streams
    streams._engine._lanes["expedited"].stream.synchronize()  # runs it, and only what it waits for
    assert site.seed_in(site.engine, 3) == FRESH
    assert site.seen_seed() == OLD
    site.settle()
    site.core.finish_sync_loads()


def test_bad_bytes_found_behind_the_pass_are_told_in_its_step_and_nothing_is_saved_of_it(site: GpuSite) -> None:
    site.put_below(5, 6)
    site.spoil(1)
    jobs = site.load(0, 3, 5), site.load(1, 4, 6)
    save = site.save(7, 5, 9)
    site.core.begin(site.orders(*jobs, save, loads=[site.sync(*jobs)]), stream=site.stream)
    site.core.begin_sync_loads(site.stream, by_layer=True)
    for layer in range(NUM_LAYERS):
        site.core.wait_for_layer(layer, stream=site.stream)
        site.queue_read(4, layer)
    site.settle()
    site.core.after_forward(site.stream)
    news = site.core.take()
    assert news.lost_slots == {4}
    assert not site.engine.read(ids(4)).any(), "bad bytes may be numbers that spoil others"
    assert site.outcomes(news) == {
        jobs[0].job_id: [Outcome.OK],
        jobs[1].job_id: [Outcome.CORRUPT],
        save.job_id: [Outcome.FAILED],
    }


def test_load_by_layers_that_cannot_begin_has_failed(site: GpuSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise StorageError("no")

    monkeypatch.setattr("kvbm.engines.stream_copies.submit_layers", refuse)
    load = site.load(0, 3, 5)
    site.core.begin(site.orders(load, loads=[site.sync(load)]), stream=site.stream)
    site.core.begin_sync_loads(site.stream)
    site.core.wait_for_layer(0, stream=site.stream)
    site.core.after_forward(site.stream)
    assert site.core.take().lost_slots == {3}


def test_device_that_fails_fails_the_load_and_is_told(site: GpuSite, stepped: SimulatedGpu) -> None:
    site.put_below(5)
    load = site.load(0, 3, 5)
    site.core.begin(site.orders(load, loads=[site.sync(load)]), stream=site.stream)
    stepped.fail_call("cudaMemcpyBatchAsync", 1)
    stepped.fail_call("cudaMemcpyAsync", 1)
    stepped.fail_call("cudaLaunchKernel", 1)
    site.core.begin_sync_loads(site.stream)
    site.settle()
    site.core.after_forward(site.stream)
    assert site.core.take().lost_slots == {3}


def test_memory_of_a_gpu_goes_and_comes_back_elsewhere(site: GpuSite, stepped: SimulatedGpu) -> None:
    site.put_below(5)
    site.core.fence(PATIENCE_S)
    site.shard.detach()
    assert site.shard.executor.streams is None
    away = site.load(0, 3, 5)
    site.core.begin(site.orders(away, loads=[site.sync(away)], has_fence=True), stream=site.stream)
    site.core.begin_sync_loads(site.stream)
    assert site.core._sync_lost == set()
    site.core.after_forward(site.stream)
    assert site.core.take().lost_slots == {3}
    site.shard.attach(layers_on(stepped.gpu))
    back = site.load(0, 3, 5)
    site.core.begin(site.orders(back), stream=site.stream)
    wait_for(site, back.job_id)
    assert site.seed_in(site.engine, 3) == 5


@pytest.mark.parametrize("by_layer", [False, True])
def test_blocks_go_down_and_up_with_the_threads_that_lanes_have(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    need_simulation()
    monkeypatch.setenv("KVBM_DEVICE", "simulated")
    with SimulatedGpu() as running:
        site = GpuSite(backend, running, is_outermost=by_layer)
        for slot in (3, 4, 5):
            site.queue_write(slot, slot)
            site.stream.synchronize()
            save = site.save(slot, slot, slot)
            site.core.begin(site.orders(save), stream=site.stream)
            site.core.after_forward(site.stream)
            site.core.begin(site.orders(has_fence=True), stream=site.stream)
            site.queue_write(slot, FRESH)
        site.core.fence(PATIENCE_S)
        site.spoil(5)
        jobs = [site.load(block, 7 - block, block) for block in (3, 4, 5)]
        site.core.begin(site.orders(*jobs, loads=[site.sync(*jobs)]), stream=site.stream)
        site.core.begin_sync_loads(site.stream, by_layer=by_layer)
        for layer in range(NUM_LAYERS):
            site.core.wait_for_layer(layer, stream=site.stream)
            site.queue_read(4, layer)
        site.core.after_forward(site.stream)
        assert site.core.take().lost_slots == {2}
        assert site.seen_seed() == 3
        assert [site.seed_in(site.engine, slot) for slot in (4, 3)] == [3, 4]
        site.close()


def test_gpu_that_cannot_be_used_is_named(
    backend: Backend, stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "find_gpu", lambda index: None)
    with pytest.raises(StorageError, match="on GPU 0, which cannot be used"):
        WorkerSite(backend, stepped.gpu)
