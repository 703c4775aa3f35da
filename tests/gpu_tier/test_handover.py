"""Who waits for a copy finishes it himself; the lane's thread does it for everybody else, and nobody is forgotten."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_site import PATIENCE_S, ids, names, on_gpu, on_host

from kvbm.errors import ConfigError, LayoutError, TransferCancelled, TransferError
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine, PathTable, submit_layers
from kvbm.transfer.choose import Cell
from kvbm.transfer.gpu_copy import CopyJob


class Ends:
    """What was concluded, in order, and by which threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_expected: int = 1) -> None:
        self.blocks: list[int] = []
        self.threads: list[str] = []
        self.have_come = threading.Event()
        conclude = CopyJob.conclude

        def note(job: CopyJob) -> Any:
            self.blocks.append(int(job.source.ids[0]))
            self.threads.append(threading.current_thread().name)
            if len(self.blocks) == num_expected:
                self.have_come.set()
            return conclude(job)

        monkeypatch.setattr(CopyJob, "conclude", note)


def copy(engine: GpuTransferEngine, stepped: SimulatedGpu, *blocks: int) -> Any:
    """Begin a copy of each block; the storages live as long as the copies."""
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    transfers = [engine.copy(source, destination, ids(block), ids(block), hashes=names(1)) for block in blocks]
    return transfers if len(transfers) > 1 else transfers[0]


def test_who_waits_without_a_limit_finishes_the_copy(stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, 2)
    with GpuTransferEngine(stepped.gpu) as engine:
        first, second = copy(engine, stepped, 1, 2)
        second.result()
        first.result()
        assert engine._lanes["down"]._handed_over.empty()
    assert ends.blocks == [2, 1]
    assert set(ends.threads) == {threading.current_thread().name}


def done(transfer: Any) -> None:
    transfer.done()


def wait_a_moment(transfer: Any) -> None:
    transfer.wait(0)


def ask_for_a_call(transfer: Any) -> None:
    transfer.add_done_callback(lambda _: None)


def ask_for_a_call_when_landed(transfer: Any) -> None:
    transfer.add_landed_callback(lambda _: None)


def cancel(transfer: Any) -> None:
    transfer.cancel()


def forget(transfer: Any) -> None:
    pass


@pytest.mark.parametrize("look", [done, wait_a_moment, ask_for_a_call, ask_for_a_call_when_landed, cancel, forget])
def test_thread_of_the_lane_finishes_what_nobody_waits_for(
    stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None]
) -> None:
    ends = Ends(monkeypatch)
    with GpuTransferEngine(stepped.gpu) as engine:
        transfer = copy(engine, stepped, 1)
        look(transfer)
        if look is forget:
            gone = weakref.ref(transfer)
            del transfer
            gc.collect()
            assert gone() is None
        assert ends.have_come.wait(PATIENCE_S)
        assert ends.threads == ["kvbm-gpu-down"]


def test_callback_is_called_although_the_transfer_was_let_go_of(stepped: SimulatedGpu) -> None:
    has_ended = threading.Event()
    results: list[Any] = []

    def end(transfer: Any) -> None:
        results.append(transfer.result(0).num_blocks)
        has_ended.set()

    stepped.gpu.module.simulation.set_mode("held")
    with GpuTransferEngine(stepped.gpu) as engine:
        copy(engine, stepped, 1).add_done_callback(end)
        gc.collect()
        stepped.run()
        assert has_ended.wait(PATIENCE_S)
        stepped.gpu.module.simulation.set_mode("running")
    assert results == [1]


def test_what_was_queued_before_is_finished_before(stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, 3)
    with GpuTransferEngine(stepped.gpu) as engine:
        transfers = copy(engine, stepped, 1, 2, 3)
        assert transfers[2].wait(PATIENCE_S)
        assert ends.blocks == [1, 2, 3]
        assert engine.num_in_flight == 0


def test_full_lane_finishes_what_nobody_looked_at(simulated: SimulatedGpu) -> None:
    with GpuTransferEngine(simulated.gpu, max_in_flight=2) as engine:
        transfers = copy(engine, simulated, 0, 1, 2, 3, 4)
        assert engine.num_in_flight <= 2
        assert [transfer.result(PATIENCE_S).num_blocks for transfer in transfers] == [1] * 5


def test_closing_finishes_what_nobody_looked_at(stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch)
    engine = GpuTransferEngine(stepped.gpu)
    transfers = copy(engine, stepped, 1, 2)
    engine.close(PATIENCE_S)
    assert ends.blocks == [1, 2]
    assert [transfer.result(0).num_blocks for transfer in transfers] == [1, 1]
    assert not engine._lanes["down"]._thread.is_alive()  # type: ignore[union-attr]


def test_callback_may_close_the_engine(stepped: SimulatedGpu) -> None:
    engine = GpuTransferEngine(stepped.gpu)
    is_closed = threading.Event()

    def close(_: Any) -> None:
        engine.close()
        is_closed.set()

    copy(engine, stepped, 1).add_done_callback(close)
    assert is_closed.wait(PATIENCE_S)
    thread = engine._lanes["down"]._thread
    assert thread is not None
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("has_threads", [True, False])
def test_interrupt_while_a_copy_is_finished_leaves_it_to_the_next(
    stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, has_threads: bool
) -> None:
    conclude, interrupts = CopyJob.conclude, [KeyboardInterrupt()]

    def interrupted(job: CopyJob) -> Any:
        if interrupts:
            raise interrupts.pop()
        return conclude(job)

    monkeypatch.setattr(CopyJob, "conclude", interrupted)
    with GpuTransferEngine(stepped.gpu, has_threads=has_threads) as engine:
        transfer = copy(engine, stepped, 1)
        with pytest.raises(KeyboardInterrupt):
            transfer.result()
        assert transfer.result(PATIENCE_S if has_threads else None).num_blocks == 1
        assert engine.means.scratch.num_taken == 0


def test_who_waits_for_a_cancelled_copy_does_not_wait_for_its_bytes(stepped: SimulatedGpu) -> None:
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        transfer = copy(engine, stepped, 1)
        assert transfer.cancel()
        with pytest.raises(TransferCancelled):
            transfer.result()
        assert transfer.is_draining
        engine.settle()
        stepped.run()
        engine.settle()
        assert not transfer.is_draining


def test_every_callback_is_called_when_many_threads_look(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, streams=()), on_host(simulated.gpu)
    num_ended, lock, all_ended = [0], threading.Lock(), threading.Event()
    rounds, threads = 40, 4

    def end(transfer: Any) -> None:
        assert transfer.result(0).num_blocks == 1
        with lock:
            num_ended[0] += 1
            if num_ended[0] == rounds * threads:
                all_ended.set()

    with GpuTransferEngine(simulated.gpu, max_in_flight=3) as engine:

        def submit(block: int) -> None:
            for i in range(rounds):
                transfer = engine.copy(source, destination, ids(block), ids(block))
                if i % 2:
                    engine.settle()
                transfer.add_done_callback(end)

        crew = [threading.Thread(target=submit, args=(block,)) for block in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join(PATIENCE_S)
        assert all_ended.wait(PATIENCE_S)
    source.close()
    destination.close()


def test_layers_wake_the_thread_once(stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    with GpuTransferEngine(stepped.gpu) as engine:
        lane, handed = engine._lanes["down"], []
        wake = lane.wake

        def count(submission: Any) -> None:
            handed.append(submission)
            wake(submission)

        monkeypatch.setattr(lane, "wake", count)
        layers = submit_layers(engine, source, destination, ids(1), ids(2))
        assert layers.transfer.result(PATIENCE_S).num_blocks == 1
        assert len(handed) == 1
        assert engine.num_in_flight == 0
    source.close()
    destination.close()


# -- what is queued --------------------------------------------------------------------------------------------


def test_copy_of_a_block_is_one_wait_and_one_copy(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu), on_host(stepped.gpu)
    simulation = stepped.gpu.module.simulation
    with GpuTransferEngine(stepped.gpu) as engine:
        engine.copy(source, destination, ids(1), ids(2)).result()
        before, num_before = simulation.counts()["events"], len(simulation.operations())
        engine.copy(source, destination, ids(3), ids(4)).result()
        kinds = [kind for kind, *_ in simulation.operations()[num_before:]]
        assert kinds == ["record", "wait", "memcpy", "record"]
        assert simulation.counts()["events"] == before  # the fence is the lane's, the other went with the copy
    source.close()
    destination.close()


def test_plain_copy_takes_no_scratch(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        plain = engine.copy(source, destination, ids(1), ids(2))
        assert engine.means.scratch.num_taken == 0
        checked = engine.copy(source, destination, ids(1), ids(2), hashes=names(1))
        assert engine.means.scratch.num_taken > 0
        for transfer in (plain, checked):
            assert transfer.result().num_blocks == 1
        assert engine.means.scratch.num_taken == 0
    source.close()
    destination.close()


def test_staging_is_made_once(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, "outer_first", streams=()), on_host(simulated.gpu)
    table = PathTable((Cell("down", 0, 1, ("staged",)),))
    with GpuTransferEngine(simulated.gpu, table=table, staging_nbytes=1 << 16) as engine:
        counts = []
        for n in (1, 2, 8):
            every = np.arange(n, dtype=np.int32)
            engine.copy(source, destination, every, every).result()
            counts.append(simulated.gpu.module.simulation.counts()["nbytes"])
        assert counts == [counts[0]] * 3
    source.close()
    destination.close()


def test_engine_has_its_scratch_before_the_first_copy(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, streams=()), on_host(simulated.gpu)
    counts = simulated.gpu.module.simulation.counts
    with GpuTransferEngine(simulated.gpu) as engine:
        before = counts()["registrations"]
        engine.copy(source, destination, ids(1), ids(2), hashes=names(1)).result()
        assert counts()["registrations"] == before
    source.close()
    destination.close()


def test_scratch_that_cannot_be_made_beforehand_is_made_when_it_is_needed(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, streams=()), on_host(simulated.gpu)
    simulated.fail_call("cudaMalloc", 2)
    with GpuTransferEngine(simulated.gpu) as engine:
        assert engine.copy(source, destination, ids(1), ids(2), hashes=names(1)).result().good.all()
    source.close()
    destination.close()


# -- what is refused -------------------------------------------------------------------------------------------


def test_what_is_no_stream_is_refused_before_anything_is_queued(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        for arguments in ({"wait_for": ["stream"]}, {"then": ["stream"]}):
            with pytest.raises(ConfigError, match=r"a builtins\.str is no stream"):
                engine.copy(source, destination, ids(1), ids(2), **arguments)
        with pytest.raises(ConfigError, match=r"a builtins\.str is no stream"):
            submit_layers(engine, source, destination, ids(1), ids(2), wait_for=["stream"])
        assert engine.num_in_flight == 0
    source.close()
    destination.close()


def test_follower_that_cannot_wait_fails_the_copy_and_not_the_call(stepped: SimulatedGpu) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    follower = stepped.gpu.device.create_stream()
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        stepped.fail_call("cudaStreamWaitEvent", 2)
        transfer = engine.copy(source, destination, ids(1), ids(2), then=[follower])
        with pytest.raises(TransferError, match="cudaStreamWaitEvent"):
            transfer.result()
        assert not transfer.is_draining
        assert engine.num_in_flight == 0
    source.close()
    destination.close()


@pytest.mark.parametrize(
    ("source_ids", "destination_ids", "message"),
    [
        (ids(8), ids(0), r"source block 8 is outside 0\.\.7"),
        (ids(-1), ids(0), r"source block -1 is outside 0\.\.7"),
        (ids(0), ids(8), r"destination block 8 is outside 0\.\.7"),
        (ids(0), ids(-1), r"destination block -1 is outside 0\.\.7"),
        (ids(0, 1), ids(3, 3), "destination block 3 is given twice"),
        (ids(0, 1), ids(3), "2 source blocks for 1 destination blocks"),
    ],
)
def test_wrong_blocks_are_refused_however_few(
    stepped: SimulatedGpu, source_ids: Any, destination_ids: Any, message: str
) -> None:
    source, destination = on_gpu(stepped.gpu, streams=()), on_host(stepped.gpu)
    with GpuTransferEngine(stepped.gpu, has_threads=False) as engine:
        with pytest.raises(LayoutError, match=message):
            engine.copy(source, destination, source_ids, destination_ids)
        assert engine.num_in_flight == 0
    source.close()
    destination.close()
