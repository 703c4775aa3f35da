"""Whatever fails and in whatever order streams run: bytes are right or there is an error, and nothing leaks."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import numpy as np
import pytest
from gpu_site import KINDS, PATIENCE_S, as_layout, ids, names, on_gpu, on_host, random_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm.errors import CudaError, PoolClosed, StorageError, TransferError
from kvbm.gpu import DeviceMemory
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine, PathTable
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell

NUM_BLOCKS = 8
CALLS = (
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaMemcpy3DAsync",
    "cudaLaunchKernel",
    "cudaEventCreateWithFlags",
    "cudaEventRecord",
    "cudaStreamWaitEvent",
    "cudaMalloc",
    "cudaHostRegister",
)
ALL = np.arange(NUM_BLOCKS, dtype=np.int32)


@st.composite
def copies(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """Draw a direction and pairs of blocks."""
    n = draw(st.integers(1, 3))
    pick = st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=n, max_size=n, unique=True)
    return draw(st.sampled_from(["down", "up", "urgent"])), draw(pick), draw(pick)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("copy"), copies()),
        st.tuples(st.just("advance"), st.sampled_from(["down", "up", "expedited"]), st.integers(1, 4)),
        st.tuples(st.just("settle")),
        st.tuples(st.just("fail call"), st.sampled_from(CALLS), st.integers(0, 6)),
        st.tuples(st.just("fail operation"), st.integers(0, 8)),
    ),
    min_size=1,
    max_size=14,
)


class Machine:
    """Storages, an engine, and what every block may hold.

    Blocks are touched by one copy at a time, as a pool sees to it: those of a copy that has not landed are left alone.
    """

    def __init__(self, stepped: SimulatedGpu, kinds: tuple[str, str], path: str) -> None:
        self.stepped = stepped
        self.gpu = on_gpu(stepped.gpu, kinds[0], streams=())
        self.host = on_host(stepped.gpu, kinds[1])
        cells = tuple(Cell(direction, 0, 1, (path,)) for direction in DIRECTIONS)
        self.engine = GpuTransferEngine(
            stepped.gpu, table=PathTable(cells), has_threads=False, max_in_flight=3, staging_nbytes=700
        )
        self.content: dict[str, list[Any]] = {}  # what each block holds; None where nobody knows
        for name, storage, seed in (("gpu", self.gpu, 1), ("host", self.host, 2)):
            data = random_bytes(storage.layout, NUM_BLOCKS, seed)
            storage.write(ALL, data)
            order = as_layout(data, storage.layout, self.gpu.layout)
            self.content[name] = [row.tobytes() for row in order]
        self.busy: dict[str, set[int]] = {"gpu": set(), "host": set()}
        self.open: list[tuple[Any, str, list[int], str, list[int]]] = []
        self.num_failed = 0

    def copy(self, direction: str, source_ids: list[int], destination_ids: list[int]) -> None:
        here, there = ("gpu", "host") if direction == "down" else ("host", "gpu")
        if self.busy[here] & set(source_ids) or self.busy[there] & set(destination_ids):
            return
        storages = {"gpu": self.gpu, "host": self.host}
        try:
            transfer = self.engine.copy(
                storages[here],
                storages[there],
                ids(*source_ids),
                ids(*destination_ids),
                hashes=names(NUM_BLOCKS)[np.array(source_ids)],
                is_urgent=direction == "urgent",
            )
        except (CudaError, StorageError):  # no memory or stream for it: nothing was queued
            self.num_failed += 1
            return
        self.busy[here] |= set(source_ids)
        self.busy[there] |= set(destination_ids)
        self.open.append((transfer, here, source_ids, there, destination_ids))
        self.look()

    def look(self) -> None:
        """Take note of what has ended, as a planner does: its blocks are somebody else's from now on."""
        for entry in list(self.open):
            transfer, here, source_ids, there, destination_ids = entry
            if not transfer.done() or transfer.is_draining:
                continue
            self.open.remove(entry)
            self.busy[here] -= set(source_ids)
            self.busy[there] -= set(destination_ids)
            error = transfer.exception(0)
            if error is not None:
                assert isinstance(error, TransferError)
                self.num_failed += 1
            for at, to, is_good in zip(
                source_ids,
                destination_ids,
                [False] * len(source_ids) if error else transfer.result(0).good,
                strict=True,
            ):
                self.content[there][to] = self.content[here][at] if is_good else None

    def end(self) -> None:
        self.stepped.run()
        self.engine.settle()
        self.engine.close()
        self.look()
        assert not self.open, "a transfer neither ended nor landed"
        assert self.engine.num_in_flight == 0
        if self.engine.lost_reason is None:
            assert self.engine.means.scratch.num_taken == 0, "scratch leaks"
            for name, storage in (("gpu", self.gpu), ("host", self.host)):
                data = as_layout(storage.read(ALL), storage.layout, self.gpu.layout)
                for row, expected in zip(data, self.content[name], strict=True):
                    assert expected is None or row.tobytes() == expected, name
        self.gpu.close()
        self.host.close()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), path=st.sampled_from(PATHS), steps=STEPS)
def test_bytes_are_right_or_there_is_an_error(kinds: tuple[str, str], path: str, steps: list[tuple[Any, ...]]) -> None:
    pytest.importorskip("kvbm._native.simulated_device", reason="this build has no simulated device")
    logging.disable(logging.CRITICAL)
    try:
        with SimulatedGpu(is_stepped=True) as stepped:
            machine = Machine(stepped, kinds, path)
            has_faults = False
            for name, *arguments in steps:
                if name == "copy":
                    machine.copy(*arguments[0])
                elif name == "advance":
                    lane = machine.engine._lanes[arguments[0]]
                    if lane._stream is not None:
                        stepped.step(lane.stream, arguments[1])
                elif name == "settle":
                    machine.engine.settle()
                    machine.look()
                elif name == "fail call":
                    stepped.fail_call(arguments[0], 2, after=arguments[1])
                    has_faults = True
                else:
                    stepped.fail_operation(700, after=arguments[0])
                    has_faults = True
            num_copies = sum(step[0] == "copy" for step in steps)
            try:
                machine.end()
            except CudaError:  # a fault that was left hit the reading at the end
                assert has_faults
            assert has_faults or machine.num_failed == 0
            assert machine.num_failed <= num_copies
    finally:
        logging.disable(logging.NOTSET)


def test_lost_device_ends_everything_and_takes_nothing_more(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    source.write(ALL, random_bytes(source.layout, NUM_BLOCKS))
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    stepped.fail_operation(700)
    first = engine.copy(source, destination, ids(0), ids(0), hashes=names(1))
    second = engine.copy(source, destination, ids(1), ids(1))
    third = engine.copy(destination, source, ids(2), ids(2))
    stepped.run()
    engine.settle()
    for transfer in (first, second, third):
        with pytest.raises(TransferError, match="cudaErrorIllegalAddress") as caught:
            transfer.result(0)
        assert isinstance(caught.value.__cause__, CudaError)
        assert not transfer.is_draining
    assert not destination.has_checksum[0]
    assert engine.lost_reason is not None
    refused = engine.copy(source, destination, ids(3), ids(3))
    with pytest.raises(TransferError, match="cudaErrorIllegalAddress"):
        refused.result(0)
    engine.close()
    source.close()
    destination.close()


def test_failure_half_way_lands_only_after_what_was_queued(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    stepped.fail_call("cudaMemcpyAsync", 2, after=1)
    table = PathTable((Cell("down", 0, 1, ("memcpy",)),))
    engine = GpuTransferEngine(stepped.gpu, table=table, has_threads=False)
    transfer = engine.copy(source, destination, ids(0, 3, 1), ids(5, 0, 2))
    assert not transfer.done()  # the first run is still queued
    assert engine.settle() == 0
    stepped.run()
    assert engine.settle() == 1
    with pytest.raises(TransferError, match=r"cudaMemcpyAsync.*cudaErrorMemoryAllocation"):
        transfer.result(0)
    assert engine.means.scratch.num_taken == 0
    stepped.fail_call("cudaMemcpyAsync", 2, after=1)
    with pytest.raises(TransferError, match="cudaMemcpyAsync"):
        engine.copy(source, destination, ids(0, 3, 1), ids(5, 0, 2)).result()
    assert stepped.step() == 0  # whoever waits for the end waits for what was queued, too
    again = engine.copy(source, destination, ids(0), ids(5))
    assert again.result().num_blocks == 1
    engine.close()
    source.close()
    destination.close()


def test_event_that_cannot_be_had_is_replaced_by_waiting_for_the_stream(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    stepped.fail_call("cudaEventRecord", 2)
    transfer = engine.copy(source, destination, ids(0), ids(0))
    with pytest.raises(TransferError, match="cudaEventRecord"):
        transfer.result()
    assert engine.num_in_flight == 0
    engine.close()
    source.close()
    destination.close()


def test_full_lane_waits_for_its_oldest(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False, max_in_flight=2)
    transfers = [engine.copy(source, destination, ids(i), ids(i)) for i in range(5)]
    assert engine.num_in_flight == 2
    assert [transfer.done() for transfer in transfers] == [True] * 3 + [False] * 2
    engine.close()
    assert all(transfer.done() for transfer in transfers)
    source.close()
    destination.close()


def test_callback_may_submit_more_on_a_full_lane(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, streams=()), on_host(simulated.gpu)
    engine = GpuTransferEngine(simulated.gpu, max_in_flight=1)
    has_ended = threading.Event()
    left = [1, 2, 3, 4, 5]

    def again(_: Any = None) -> None:
        if not left:
            has_ended.set()
            return
        block = ids(left.pop())
        engine.copy(source, destination, block, block).add_done_callback(again)

    again()
    assert has_ended.wait(PATIENCE_S)
    engine.close(PATIENCE_S)
    source.close()
    destination.close()


def test_everything_is_freed_in_any_order(simulated: SimulatedGpu) -> None:
    simulation = simulated.gpu.module.simulation
    gc.collect()
    before = simulation.counts()
    source: Any = on_gpu(simulated.gpu)
    destination: Any = on_host(simulated.gpu)
    engine: Any = GpuTransferEngine(simulated.gpu)
    transfers = [engine.copy(source, destination, ids(i), ids(i), hashes=names(1)) for i in range(8)]
    source.close()
    destination.close()
    engine.close(PATIENCE_S)
    assert all(transfer.exception(PATIENCE_S) is None for transfer in transfers)
    del source, destination, engine, transfers
    gc.collect()
    after = simulation.counts()
    assert {name: after[name] for name in ("allocations", "registrations", "streams", "events")} == {
        name: before[name] for name in ("allocations", "registrations", "streams", "events")
    }


def test_too_much_memory_is_refused_with_what_is_free(simulated: SimulatedGpu) -> None:
    free, _ = simulated.gpu.device.memory_info()
    with pytest.raises(StorageError, match=rf"cannot have {2**50} bytes on .*, {free} are free: give fewer blocks"):
        DeviceMemory(simulated.gpu, 2**50)


def test_engine_of_another_process_refuses(simulated: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_gpu(simulated.gpu) as source, on_host(simulated.gpu) as destination:
        engine = GpuTransferEngine(simulated.gpu)
        with monkeypatch.context() as patch:
            patch.setattr("kvbm.gpu.runtime.os.getpid", lambda: -1)
            with pytest.raises(PoolClosed, match="was made before a fork"):
                engine.copy(source, destination, ids(0), ids(0))
        engine.close()
