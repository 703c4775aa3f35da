"""The engine over native queues keeps the promises of the engine of Python threads, with threads and with a ring."""

from __future__ import annotations

import errno
import gc
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from disk_native import KINDS, PAGE, PATIENCE_S, UNTOUCHED, File, aligned, disk_io, ids, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import PoolClosed, TransferTimeout
from kvbm.storage.disk.native_engine import NativeEngine

pytestmark = pytest.mark.skipif(disk_io is None, reason="the native twin has no disk queues here")

NUM_SLOTS = 16


def open_engine(file: File, kind: str, block_nbytes: int = PAGE, **options: Any) -> NativeEngine:
    slot_nbytes = -(-block_nbytes // PAGE) * PAGE
    values: dict[str, Any] = {"num_threads": 2, "max_queued_nbytes": 1 << 20, "depth": 4} | options
    return NativeEngine(file, block_nbytes=block_nbytes, slot_nbytes=slot_nbytes, disk_io=disk_io, kind=kind, **values)


@pytest.fixture(params=["direct", "buffered"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "slots", NUM_SLOTS * PAGE, is_direct=request.param == "direct")
    yield file
    file.close()


@pytest.fixture
def make(file: File, kind: str) -> Iterator[Callable[..., NativeEngine]]:
    engines: list[NativeEngine] = []

    def make(**options: Any) -> NativeEngine:
        engines.append(open_engine(file, kind, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine._queue.resume()
        engine.close()


ALL = ids(*range(NUM_SLOTS))


def filled(value: int, num_rows: int = NUM_SLOTS) -> npt.NDArray[np.uint8]:
    memory = aligned(num_rows, PAGE)
    memory[:] = value
    return memory


def result(batch: Any) -> list[bool]:
    return batch.transfer.result(PATIENCE_S).tolist()


def disk_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvbm-disk"]


def test_adjacent_slots_move_in_one_call(make: Any) -> None:
    engine, memory = make(), aligned(8, PAGE)
    memory[:] = np.arange(8, dtype=np.uint8)[:, None]
    assert all(result(engine.submit(False, ids(3, 1, 2, 6, 5), memory, rows(3, 1, 2, 6, 5))))
    assert engine.counters.num_calls == 2
    back = aligned(8, 2 * PAGE)  # rows apart: one call still
    assert all(result(engine.submit(True, ids(1, 2, 3), back, rows(0, 4, 2))))
    assert engine.counters.num_calls == 3
    assert back[[0, 4, 2], 0].tolist() == [1, 2, 3]
    assert not back[:, PAGE:].any()


def test_large_runs_are_cut_so_that_they_are_shared(tmp_path: Path, kind: str) -> None:
    file = File(tmp_path / "large", 16 << 20, is_direct=False)
    engine, memory = open_engine(file, kind, 1 << 20), aligned(9, 1 << 20)
    assert all(result(engine.submit(False, ids(*range(9)), memory, rows(*range(9)))))
    assert engine.counters.num_calls == 3
    engine.close()


def test_empty_batch_is_done_at_once(make: Any) -> None:
    assert result(make().submit(True, ids(), filled(0, 1), rows())) == []


def test_mask_is_in_the_order_of_submission(make: Any) -> None:
    engine = make(depth=1)
    engine._queue.inject([-errno.EIO])
    assert result(engine.submit(False, ids(9, 2, 6), filled(1), rows(0, 1, 2))) == [True, False, True]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("is_read", [True, False])
def test_error_spoils_only_the_block_that_has_it(
    make: Any, file: File, caplog: pytest.LogCaptureFixture, code: int, is_read: bool
) -> None:
    engine, memory = make(depth=1), filled(7, 8)
    assert all(result(engine.submit(False, ALL[:8], memory, rows(*range(8)))))
    num_calls = engine.counters.num_calls
    for _ in range(2):
        # The run fails after two blocks; of the six that are tried one by one the fourth is bad.
        engine._queue.inject([2 * PAGE, -code, *[UNTOUCHED] * 3, -code])
        batch = engine.submit(is_read, ALL[:8], memory, rows(*range(8)))
        assert result(batch) == [True] * 5 + [False] + [True] * 2
        assert batch.error is not None
        assert batch.error.errno == code
    assert engine.counters.num_calls == num_calls + 2 * 8
    assert engine.counters.num_failures == 2
    verb = "read" if is_read else "write"
    assert f"could not {verb} block 5 of {file.path}: " in engine.counters.last_error
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, "each errno is announced once"
    assert f"disk {verb} failed block_id=5 path={file.path}" in warnings[0].getMessage()


def test_file_that_somebody_cut_short_fails_and_never_hangs(make: Any, file: File) -> None:
    engine = make()
    os.truncate(file.path, 3 * PAGE)
    assert result(engine.submit(True, ALL, filled(1), rows(*ALL.tolist()))) == [True] * 3 + [False] * 13
    assert f"ended {PAGE} of {PAGE} bytes short at " in engine.counters.last_error


def test_descriptor_that_went_bad_fails_blocks(make: Any, file: File) -> None:
    engine = make()
    os.close(file.fd)
    file.fd = -1
    assert not any(result(engine.submit(True, ALL[:3], filled(1), rows(0, 1, 2))))
    assert engine.counters.num_failures == 3


def test_surprise_is_a_failure_and_the_engine_goes_on(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(depth=1)

    def surprise(*_: Any) -> None:
        raise RuntimeError("a bug")

    engine._goes_again = surprise
    engine._queue.inject([-errno.EIO])
    assert result(engine.submit(False, ALL[:2], filled(1), rows(0, 1))) == [False, False]
    assert "RuntimeError: a bug" in engine.counters.last_error
    assert "disk I/O failed in an unexpected way" in caplog.text
    assert all(result(engine.submit(False, ALL[:2], filled(1), rows(0, 1))))


def test_submitter_waits_for_room_and_reads_have_their_own(make: Any) -> None:
    engine, memory = make(max_queued_nbytes=2 * PAGE), filled(1)
    engine._queue.pause()
    first = [engine.submit(False, ids(i), memory, rows(i)) for i in (0, 1)]
    num_written: list[int] = []

    def submit_one_more() -> None:
        engine.submit(False, ids(2), memory, rows(2))
        num_written.append(engine.counters.num_writes)

    waiter = threading.Thread(target=submit_one_more)
    waiter.start()
    read = engine.submit(True, ids(3), memory, rows(3))  # at once: the room of writes is not its room
    assert not num_written
    engine._queue.resume()
    waiter.join(PATIENCE_S)
    assert num_written[0] >= 1, "one of the two had to end first"
    assert all(map(all, map(result, [*first, read])))
    assert all(result(engine.submit(False, ALL, memory, rows(*ALL.tolist())))), "larger than all room: it goes alone"


def test_close_lets_queued_work_end(make: Any, file: File) -> None:
    engine, memory = make(), filled(9)
    engine._queue.pause()
    batches = [engine.submit(False, ids(i), memory, rows(i)) for i in range(NUM_SLOTS)]
    with pytest.raises(TransferTimeout, match="16 batches still read or write after "):
        engine.close(0)
    with pytest.raises(PoolClosed):
        engine.submit(True, ids(0), memory, rows(0))
    assert not file.num_closed
    engine._queue.resume()
    engine.close()
    engine.close()
    assert all(batch.transfer.result(0).all() for batch in batches)
    assert file.path.read_bytes() == b"\x09" * NUM_SLOTS * PAGE
    assert file.num_closed == 1
    assert not disk_threads()


def test_failed_run_is_tried_again_while_closing(make: Any, file: File) -> None:
    engine = make(depth=1)
    engine._queue.pause()
    engine._queue.inject([-errno.EIO])
    batch = engine.submit(False, ALL, filled(9), rows(*ALL.tolist()))
    engine.stop()
    engine._queue.resume()
    assert all(result(batch))
    engine.close()
    assert file.path.read_bytes() == b"\x09" * NUM_SLOTS * PAGE


def test_close_wakes_a_submitter_that_waits_for_room(make: Any) -> None:
    engine, memory = make(max_queued_nbytes=1), filled(1)
    engine._queue.pause()
    engine.submit(False, ids(0), memory, rows(0))
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            engine.submit(False, ids(1), memory, rows(1))
        except PoolClosed as error:
            errors.append(error)

    waiter = threading.Thread(target=submit)
    waiter.start()
    with pytest.raises(TransferTimeout):
        engine.close(0)
    waiter.join(PATIENCE_S)
    assert len(errors) == 1


def test_cancelled_transfer_moves_nothing_and_drains(make: Any, file: File) -> None:
    engine, memory = make(), filled(9)
    engine._queue.pause()
    kept, dropped = engine.submit(False, ids(0), memory, rows(0)), engine.submit(False, ids(1), memory, rows(1))
    assert dropped.transfer.cancel()
    engine._queue.resume()
    assert result(kept) == [True]
    engine.close()
    assert not dropped.transfer.is_draining
    assert file.path.read_bytes()[: 2 * PAGE] == b"\x09" * PAGE + bytes(PAGE)
    assert engine.counters.num_failures == 0
    assert engine.counters.num_writes == 1


def test_interrupted_submit_moves_nothing_more_and_delays_nobody(make: Any, file: File) -> None:
    engine, memory = make(max_queued_nbytes=PAGE), filled(9)

    class Interrupted:
        def __init__(self, queue: Any, *, is_taken: bool) -> None:
            self.queue, self.is_taken = queue, is_taken

        def __getattr__(self, name: str) -> Any:
            return getattr(self.queue, name)

        def submit(self, *arguments: Any, **options: Any) -> None:
            if self.is_taken:
                self.queue.submit(*arguments, **options)
            raise KeyboardInterrupt

    real = engine._queue
    for is_taken in (False, True):
        real.pause()
        engine._queue = Interrupted(real, is_taken=is_taken)
        with pytest.raises(KeyboardInterrupt):
            engine.submit(False, ids(1), memory, rows(1))
        engine._queue = real
        real.resume()
        assert result(engine.submit(False, ids(2), memory, rows(2))) == [True]
    engine.close()
    assert file.path.read_bytes()[PAGE : 3 * PAGE] == bytes(PAGE) + b"\x09" * PAGE


def test_callback_may_submit_and_close(make: Any, file: File) -> None:
    engine, memory = make(max_queued_nbytes=1), filled(0)
    memory[0] = 5
    answers: list[Any] = []
    is_over = threading.Event()

    def chain(_: Any) -> None:
        assert engine.is_worker
        answers.append(engine.submit(True, ids(0), memory, rows(1)))
        answers.append(engine.submit(True, ids(0), memory, rows(2)))  # beyond the room: it must not wait here
        answers.append(engine.submit(False, ids(1), memory, rows(0)))
        engine.close()
        is_over.set()

    assert not engine.is_worker
    engine.submit(False, ids(0), memory, rows(0)).transfer.add_done_callback(chain)
    assert is_over.wait(PATIENCE_S)
    assert all(map(all, map(result, answers)))
    assert (memory[1] == 5).all()
    engine.close()
    assert not disk_threads()
    assert file.num_closed == 1


def test_engine_that_never_worked_closes_its_file_itself(make: Any, file: File) -> None:
    make().stop()
    assert file.num_closed == 1
    assert not disk_threads()


def test_stopped_and_dropped_engine_leaves_nothing(file: File, kind: str) -> None:
    engine = open_engine(file, kind)
    assert all(result(engine.submit(False, ids(0), filled(1), rows(0))))
    threads = disk_threads()
    engine.stop()
    del engine
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not disk_threads()
    assert file.num_closed == 1


def test_counters_count_blocks_and_bytes(tmp_path: Path, kind: str) -> None:
    file = File(tmp_path / "small", NUM_SLOTS * PAGE, is_direct=True)
    engine, memory = open_engine(file, kind, 192), aligned(8, 192)
    assert all(result(engine.submit(False, ids(0, 1, 5), memory, rows(0, 1, 2))))
    assert all(result(engine.submit(True, ids(5, 0), memory, rows(0, 1))))
    counters = engine.counters
    assert (counters.num_writes, counters.written_nbytes) == (3, 3 * 192)
    assert (counters.num_reads, counters.read_nbytes) == (2, 2 * 192)
    assert (counters.num_failures, counters.last_error) == (0, "")
    engine.close()


def test_many_threads_submit(make: Any) -> None:
    engine, memory = make(max_queued_nbytes=4 * PAGE), aligned(NUM_SLOTS, PAGE)
    memory[:] = np.arange(NUM_SLOTS, dtype=np.uint8)[:, None]
    back = aligned(NUM_SLOTS, PAGE)
    failures: list[int] = []

    def work(thread: int) -> None:
        for turn in range(30):
            slot = thread * 4 + turn % 4
            for is_read, side in ((False, memory), (True, back)):
                if not all(result(engine.submit(is_read, ids(slot), side, rows(slot)))):
                    failures.append(slot)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert np.array_equal(back, memory)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS or ["threads"]),
    block_nbytes=st.sampled_from([192, PAGE, 4800]),
    is_direct=st.booleans(),
    depth=st.integers(1, 6),
    faults=st.lists(st.sampled_from([-errno.EIO, -errno.EINTR, 0, PAGE, UNTOUCHED]), max_size=12),
    batches=st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.integers(0, NUM_SLOTS - 1), unique=True),
            st.sampled_from([0, 1, PAGE]),
            st.booleans(),
        ),
        max_size=8,
    ),
)
def test_random_batches_agree_with_a_dict(
    kind: str,
    block_nbytes: int,
    is_direct: bool,
    depth: int,
    faults: list[int],
    batches: list[tuple[bool, list[int], int, bool]],
) -> None:
    model: dict[int, npt.NDArray[np.uint8]] = {}
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as parent:
        file = File(Path(parent) / "slots", NUM_SLOTS * -(-block_nbytes // PAGE) * PAGE, is_direct=is_direct)
        engine = open_engine(file, kind, block_nbytes, depth=depth)
        engine._queue.inject(faults)
        for is_read, slots, extra, is_aligned in batches:
            blocks = [block for block in slots if block in model or not is_read]
            row_nbytes = -(-(block_nbytes + extra) // PAGE) * PAGE if is_aligned else block_nbytes + extra
            memory = aligned(20, row_nbytes)
            memory[:] = rng.integers(0, 256, memory.shape, dtype=np.uint8)
            before = memory.copy()
            places = rng.permutation(20)[: len(blocks)]
            good = result(engine.submit(is_read, ids(*blocks), memory, places))
            assert faults or all(good)
            if is_read:
                for block, row, is_good in zip(blocks, places.tolist(), good, strict=True):
                    assert not is_good or np.array_equal(memory[row, :block_nbytes], model[block])
                memory[places] = before[places]
            else:
                for block, row, is_good in zip(blocks, places.tolist(), good, strict=True):
                    model.pop(block, None)
                    if is_good:
                        model[block] = before[row, :block_nbytes]
            assert np.array_equal(memory, before)
        engine.close()
