"""The worker's half on the CPU: loads that a step waits for, saves it must not make, memory that goes and comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worker_site import (
    LAYER_NBYTES,
    NBYTES,
    NUM_LAYERS,
    NUM_SLOTS,
    PATIENCE_S,
    WorkerSite,
    ids,
    layers_on,
)

from kvbm._backend import Backend
from kvbm.engines.messages import LoadOrder
from kvbm.engines.shard import layout_of
from kvbm.engines.tensors import layers_of, memory_of
from kvbm.errors import LayoutError
from kvbm.jobs import JobResult, Outcome
from kvbm.types import Tier


@pytest.fixture(params=[False, True], ids=["separate", "outermost"])
def site(backend: Backend, request: pytest.FixtureRequest) -> Iterator[WorkerSite]:
    site = WorkerSite(backend, is_outermost=request.param)
    yield site
    site.close()


# -- synchronous loads ----------------------------------------------------------------------------------------------


def test_synchronous_load_is_there_when_it_has_begun_and_is_not_reported(site: WorkerSite) -> None:
    site.put_below(5, 6)
    jobs = site.load(0, 3, 5), site.load(1, 4, 6)
    site.core.begin(site.orders(*jobs, loads=[site.sync(*jobs)]))
    assert site.seed_in(site.engine, 3) is None, "the pass of this step has not been told to begin"
    site.core.begin_sync_loads()
    assert [site.seed_in(site.engine, slot) for slot in (3, 4)] == [5, 6]
    site.core.wait_for_layer(0)
    assert not site.core.has_layers
    site.core.after_forward()
    news = site.core.take()
    assert (news.received, news.failed, news.lost_slots) == (set(), set(), set())
    assert site.outcomes(news) == {job.job_id: [Outcome.OK] for job in jobs}


def test_bad_bytes_of_a_synchronous_load_are_told_in_the_step_and_nothing_is_saved_of_it(site: WorkerSite) -> None:
    site.put_below(5, 6)
    site.spoil(1)
    jobs = site.load(0, 3, 5), site.load(1, 4, 6)
    save = site.save(7, 5, 9)
    site.write(7, 9)
    site.core.begin(site.orders(*jobs, save, loads=[site.sync(*jobs)]))
    site.core.begin_sync_loads()
    site.core.after_forward()
    news = site.core.take()
    assert news.lost_slots == {4}
    assert not news.received
    assert site.seed_in(site.engine, 3) == 5
    assert not site.engine.read(ids(4)).any(), "bad bytes may be numbers that spoil others"
    assert site.outcomes(news)[save.job_id] == [Outcome.FAILED], "it was computed from bytes that nobody vouches for"
    assert site.seed_in(site.host, 5) is None
    again = site.save(7, 5, 9)
    site.core.begin(site.orders(again))
    site.core.fence(PATIENCE_S)
    news = site.core.take()
    assert (site.outcomes(news), news.lost_slots) == ({again.job_id: [Outcome.OK]}, set())


def test_bad_bytes_of_any_load_are_cleared_before_that_is_told(site: WorkerSite) -> None:
    site.put_below(5)
    site.spoil(0)
    job = site.load(0, 3, 5)
    site.core.begin(site.orders(job, loads=[LoadOrder(request_id="a", job_ids=[(0, job.job_id)])]))
    site.core._wait_for_end({(0, job.job_id)})
    assert site.core.take().lost_slots == {3}
    assert not site.engine.read(ids(3)).any()


def test_saves_are_refused_although_the_news_are_taken_before_them(site: WorkerSite) -> None:
    save = site.save(7, 5, 9)
    site.core.begin(site.orders(save, loads=[site.sync(lost=[2])]))
    site.core.begin_sync_loads()
    site.core.finish_sync_loads()
    assert site.core.take().lost_slots == {2}
    site.core.after_forward()
    assert site.outcomes(site.core.take())[save.job_id] == [Outcome.FAILED]


def test_step_that_is_not_told_to_load_loads_before_it_saves(site: WorkerSite) -> None:
    site.put_below(5)
    job = site.load(0, 3, 5)
    site.core.begin(site.orders(job, loads=[site.sync(job)]))
    site.core.after_forward()
    assert site.seed_in(site.engine, 3) == 5
    assert site.core.take().lost_slots == set()


def gate_copies(site: WorkerSite, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let the engine's copies wait for a gate; give what says that one has begun, and the gate."""
    has_begun, gate = threading.Event(), threading.Event()
    copies: Any = site.shard.executor._copies
    run = copies.execute

    def late(job: Any, deadline: float | None = None) -> JobResult:
        has_begun.set()
        assert gate.wait(PATIENCE_S)
        result: JobResult = run(job, deadline)
        return result

    monkeypatch.setattr(copies, "execute", late)
    return has_begun, gate


def test_synchronous_order_waits_for_jobs_that_were_sent_before(
    site: WorkerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put_below(5)
    has_begun, gate = gate_copies(site, monkeypatch)
    job = site.load(0, 3, 5)
    site.core.begin(site.orders(job))
    assert has_begun.wait(PATIENCE_S)
    site.core.begin(site.orders(loads=[site.sync(job)]))
    wait = site.core._wait_for_end

    def open_and_wait(job_ids: set[tuple[int, int]]) -> None:
        if job_ids:
            gate.set()
        wait(job_ids)

    monkeypatch.setattr(site.core._step_loads, "_wait_for_end", open_and_wait)
    site.core.begin_sync_loads()
    assert gate.is_set()
    assert site.seed_in(site.engine, 3) == 5


def test_step_without_a_pass_waits_for_what_it_can_report(site: WorkerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put_below(5)
    site.core.take()
    assert site.core.wait_for_results(0), "nothing is open"
    has_begun, gate = gate_copies(site, monkeypatch)
    job = site.load(0, 3, 5)
    site.core.begin(site.orders(job, loads=[LoadOrder(request_id="a", job_ids=[(0, job.job_id)])]))
    assert has_begun.wait(PATIENCE_S)
    assert not site.core.wait_for_results(0)
    gate.set()
    assert site.core.wait_for_results(PATIENCE_S)
    assert site.core.take().received == {"a"}


def test_held_loads_begin_when_that_is_said(site: WorkerSite) -> None:
    site.put_below(5)
    job = site.load(0, 3, 5)
    order = LoadOrder(request_id="a", job_ids=[(0, job.job_id)])
    site.core.begin(site.orders(job, loads=[order]), holds_loads=True)
    site.write(3, 1)  # what an engine does to new blocks
    assert site.core.take().received == set()
    site.core.begin_loads()
    site.core._wait_for_end({(0, job.job_id)})
    assert site.core.take().received == {"a"}
    assert site.seed_in(site.engine, 3) == 5


# -- sleep and wake -------------------------------------------------------------------------------------------------


def test_memory_goes_and_comes_back_elsewhere_and_what_lies_below_stays(site: WorkerSite) -> None:
    site.put_below(5)
    old = site.engine
    for _ in range(2):
        site.core.fence(PATIENCE_S)
        site.shard.detach()
    assert Tier.DEVICE not in site.shard.storages
    away = site.load(0, 3, 5)
    site.core.begin(site.orders(away, loads=[LoadOrder(request_id="a", job_ids=[(0, away.job_id)])]))
    site.core._wait_for_end({(0, away.job_id)})
    news = site.core.take()
    assert (news.received, news.failed, news.lost_slots) == ({"a"}, {"a"}, {3})
    assert site.outcomes(news) == {away.job_id: [Outcome.FAILED]}
    assert site.shard.describe().block_nbytes == NBYTES
    for _ in range(2):
        site.shard.attach(layers_on(None))
    assert site.engine is not old
    back = site.load(0, 3, 5)
    site.core.begin(site.orders(back, loads=[site.sync(back)]))
    site.core.begin_sync_loads()
    assert site.seed_in(site.engine, 3) == 5


def test_memory_goes_only_when_no_byte_moves_there(site: WorkerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put_below(5)
    has_begun, gate = gate_copies(site, monkeypatch)
    changed: Any = site.shard.executor._changed
    wait_for = changed.wait_for

    def open_and_wait(is_quiet: Any) -> Any:
        gate.set()
        return wait_for(is_quiet)

    job = site.load(0, 3, 5)
    site.core.begin(site.orders(job))
    assert has_begun.wait(PATIENCE_S)
    monkeypatch.setattr(changed, "wait_for", open_and_wait)
    site.shard.detach()
    assert gate.is_set()
    assert site.shard.executor._num_running == 0
    assert site.shard.executor.execute(site.load(0, 2, 5)).reason == "the engine's memory is away"
    site.core._wait_for_end({(0, job.job_id)})
    assert site.outcomes(site.core.take()) == {job.job_id: [Outcome.OK]}, "it had begun"


def test_other_blocks_than_before_are_refused(site: WorkerSite) -> None:
    site.shard.detach()
    with pytest.raises(LayoutError, match="came back with"):
        site.shard.attach(layers_on(None, num_slots=NUM_SLOTS - 1))
    site.shard.attach(layers_on(None))


# -- tensors --------------------------------------------------------------------------------------------------------


def tensor(array: np.ndarray[Any, Any], kind: str = "cpu", index: int | None = None) -> Any:
    """Give what looks like a torch tensor over an array."""
    return SimpleNamespace(
        device=SimpleNamespace(type=kind, index=index),
        shape=array.shape,
        stride=lambda: tuple(step // array.itemsize for step in array.strides),
        element_size=lambda: array.itemsize,
        data_ptr=lambda: array.ctypes.data,
    )


def test_tensor_is_described_by_its_strides() -> None:
    array = np.zeros((4, 2, 3, 5), dtype=np.uint16)
    layer = memory_of(tensor(array), "l")
    assert (layer.num_blocks, layer.block_stride, layer.block_nbytes, layer.device) == (4, 60, 60, None)
    turned = np.zeros((4, 3, 2, 5), dtype=np.uint16).transpose(0, 2, 1, 3)
    assert memory_of(tensor(turned), "l").block_nbytes == 60, "the order inside is the engine's business"
    all_layers = np.zeros((4, 7, 2, 3, 5), dtype=np.uint16)
    layer = memory_of(tensor(all_layers[:, 2], "cuda", 1), "l")
    assert (layer.block_stride, layer.block_nbytes, layer.device) == (420, 60, 1)
    assert layer.address == all_layers.ctypes.data + 2 * 60


def test_block_that_kernels_cut_up_is_one_block() -> None:
    layer = memory_of(tensor(np.zeros((12, 2, 5), dtype=np.uint8)), "l", num_blocks=4)
    assert (layer.num_blocks, layer.block_stride, layer.block_nbytes, layer.nbytes) == (4, 30, 30, 120)


@pytest.mark.parametrize(
    ("given", "num_blocks", "words"),
    [
        (tensor(np.zeros((4, 2), dtype=np.uint8), "xpu"), None, "CUDA device"),
        (tensor(np.zeros(64, dtype=np.uint8)), None, "no axis of blocks"),
        (tensor(np.zeros((2, 4, 5), dtype=np.uint8).transpose(1, 0, 2)), None, "does not lie in one piece"),
        (tensor(np.zeros((4, 2), dtype=np.uint8)), 3, "has 4 blocks, the engine counts 3"),
        (tensor(np.zeros((4, 2), dtype=np.uint8)), 5, "has 4 blocks, the engine counts 5"),
        (tensor(np.zeros((8, 3, 5), dtype=np.uint8)[:, 1]), 4, "2 parts of a block lie 15 bytes apart"),
    ],
)
def test_tensor_that_cannot_be_cached_says_why(given: Any, num_blocks: int | None, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        memory_of(given, "l", num_blocks)


def test_layers_that_share_a_tensor_are_one() -> None:
    one, two = (tensor(np.zeros((4, 2), dtype=np.uint8)) for _ in range(2))
    layers, numbers = layers_of(["a", "none", "b", "c"], {"a": one, "b": two, "c": one})
    assert len(layers) == 2
    assert numbers == {"a": 0, "b": 1, "c": 0}


def test_layers_of_a_block_that_lie_together_are_copied_in_one_piece() -> None:
    together, apart = layout_of(layers_on(None, is_outermost=True)), layout_of(layers_on(None))
    assert (together.num_buffers, together.is_dense, together.strides.layer) == (1, True, LAYER_NBYTES)
    assert apart.num_buffers == NUM_LAYERS
    backwards = layout_of(layers_on(None, is_outermost=True)[::-1])
    assert backwards.num_buffers == NUM_LAYERS


def test_layers_on_two_devices_are_refused() -> None:
    first, second, _ = layers_on(None)
    with pytest.raises(LayoutError, match="layer 1 is on device 1, layer 0 on None"):
        layout_of([first, replace(second, device=1)])
