"""The disk storage: the contract of every storage, how blocks move, their order, and closing."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import PoolClosed, StorageError, TransferTimeout
from kvbm.layout import BlockLayout
from kvbm.storage import Storage
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.testing.storages import StorageTests

DIMS: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": 4, "dtype": "uint8"}
SMALL = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=12, **DIMS)  # 192 bytes in a slot of 4096
EVEN = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=256, **DIMS)  # 4096 bytes, a slot exactly
ODD = BlockLayout.layer_separate(num_blocks=8, inner_dim=300, block_first=True, **DIMS)  # 4800 in 8192
LAYOUTS = {"small": SMALL, "even": EVEN, "odd": ODD}
PATIENCE_S = 60


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


class TestDiskStorage(StorageTests):
    @pytest.fixture(autouse=True, params=list(LAYOUTS))
    def _use_layout(self, request: pytest.FixtureRequest) -> None:
        self.layout = LAYOUTS[request.param]

    @pytest.fixture(autouse=True, params=["direct", "buffered"])
    def _use_mode(self, request: pytest.FixtureRequest, directory: Path) -> None:
        self.use_direct_io, self.directory = request.param == "direct", directory

    def make_storage(self) -> Storage:
        return DiskStorage(self.layout, self.directory, use_direct_io=self.use_direct_io)


class GatedOs(OsCalls):
    """Holds every positional call once `is_gated`, and notes which ones came."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_gated = False
        self.seen: list[tuple[str, int, int]] = []  # verb, offset, bytes
        self.has_begun = threading.Semaphore(0)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._pass("read", buffers, offset)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._pass("write", buffers, offset)
        return super().pwritev(fd, buffers, offset)

    def _pass(self, verb: str, buffers: Sequence[Any], offset: int) -> None:
        if self.is_gated:
            self.seen.append((verb, offset, sum(memoryview(buffer).nbytes for buffer in buffers)))
            self.has_begun.release()
            assert self.gate.wait(PATIENCE_S)


@pytest.fixture
def gated() -> Iterator[GatedOs]:
    calls = GatedOs()
    yield calls
    calls.gate.set()


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def aligned(num_rows: int, row_nbytes: int) -> npt.NDArray[np.uint8]:
    raw = np.zeros(num_rows * row_nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + num_rows * row_nbytes].reshape(num_rows, row_nbytes)


def disk_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvbm-disk"]


def test_adjacent_slots_move_in_one_call(directory: Path, gated: GatedOs) -> None:
    with DiskStorage(EVEN, directory, os_calls=gated) as storage:
        memory = aligned(8, 4096)
        memory[:] = np.arange(8, dtype=np.uint8)[:, None]
        gated.is_gated = True
        gated.gate.set()
        assert storage.submit_write(ids(3, 1, 2, 6, 5), memory, ids(3, 1, 2, 6, 5)).result(PATIENCE_S).all()
        assert sorted(gated.seen) == [("write", 4096, 3 * 4096), ("write", 5 * 4096, 2 * 4096)]
        gated.seen.clear()
        back = aligned(8, 8192)  # rows apart: one call still
        assert storage.submit_read(ids(1, 2, 3), back, ids(0, 4, 2)).result(PATIENCE_S).all()
        assert gated.seen == [("read", 4096, 3 * 4096)]
        assert back[[0, 4, 2], 0].tolist() == [1, 2, 3]
        assert not back[:, 4096:].any()
        assert storage.counters.num_calls == 3


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("row_nbytes", [192, 4096, 8192])
def test_rows_go_straight_or_through_a_bounce_buffer(directory: Path, is_aligned: bool, row_nbytes: int) -> None:
    with DiskStorage(SMALL, directory) as storage:
        memory = aligned(9, row_nbytes).reshape(-1)
        memory = memory[: 8 * row_nbytes] if is_aligned else memory[1 : 8 * row_nbytes + 1]
        memory = memory.reshape(8, row_nbytes)
        data = np.random.default_rng(1).integers(0, 256, (8, 192), dtype=np.uint8)
        memory[:, :192] = data
        order = ids(7, 6, 0, 1, 2, 5, 3, 4)
        assert storage.submit_write(order, memory, np.arange(8, dtype=np.int32)).result(PATIENCE_S).all()
        assert np.array_equal(storage.read(order), data)
        memory[:] = 0
        assert storage.submit_read(order, memory, np.arange(8, dtype=np.int32)).result(PATIENCE_S).all()
        assert np.array_equal(memory[:, :192], data)


def test_reads_go_before_writes_that_wait(directory: Path, gated: GatedOs) -> None:
    with DiskStorage(EVEN, directory, os_calls=gated, num_threads=1) as storage:
        memory = aligned(8, 4096)
        gated.is_gated = True
        transfers = [storage.submit_write(ids(0), memory, ids(0))]
        assert gated.has_begun.acquire(timeout=PATIENCE_S)
        transfers += [storage.submit_write(ids(i), memory, ids(i)) for i in (1, 2)]
        transfers += [storage.submit_read(ids(i), memory, ids(i)) for i in (3, 4)]
        assert not any(transfer.done() for transfer in transfers)
        gated.gate.set()
        assert all(transfer.result(PATIENCE_S).all() for transfer in transfers)
        assert [(verb, offset // 4096) for verb, offset, _ in gated.seen] == [
            ("write", 0), ("read", 3), ("read", 4), ("write", 1), ("write", 2)
        ]  # fmt: skip


def test_writes_do_not_wait_for_ever_behind_reads(directory: Path, gated: GatedOs) -> None:
    with DiskStorage(EVEN, directory, os_calls=gated, num_threads=1) as storage:
        memory = aligned(64, 4096)
        gated.is_gated = True
        storage.submit_read(ids(0), memory, ids(0))
        assert gated.has_begun.acquire(timeout=PATIENCE_S)
        storage.submit_write(ids(7), memory, ids(63))
        transfers = [storage.submit_read(ids(i % 7), memory, ids(i)) for i in range(40)]
        gated.gate.set()
        assert all(transfer.result(PATIENCE_S).all() for transfer in transfers)
        assert 1 <= [verb for verb, _, _ in gated.seen].index("write") <= 17


def test_submitter_waits_for_room_and_reads_have_their_own(directory: Path, gated: GatedOs) -> None:
    with DiskStorage(EVEN, directory, os_calls=gated, num_threads=1, max_queued_nbytes=2 * 4096) as storage:
        memory = aligned(8, 4096)
        gated.is_gated = True
        storage.submit_write(ids(0), memory, ids(0))
        storage.submit_write(ids(1), memory, ids(1))
        num_written: list[int] = []

        def submit_one_more() -> None:
            storage.submit_write(ids(2), memory, ids(2))
            num_written.append(storage.counters.num_writes)

        waiter = threading.Thread(target=submit_one_more)
        waiter.start()
        read = storage.submit_read(ids(3), memory, ids(3))  # at once: the room of writes is not its room
        assert not num_written
        gated.gate.set()
        waiter.join(PATIENCE_S)
        assert num_written[0] >= 1, "one of the two had to end first"
        assert read.result(PATIENCE_S).all()
        assert storage.submit_write(np.arange(8, dtype=np.int32), memory, np.arange(8)).result(PATIENCE_S).all()


def test_close_lets_queued_work_end(directory: Path, gated: GatedOs) -> None:
    storage = DiskStorage(EVEN, directory, os_calls=gated, num_threads=2)
    memory = aligned(8, 4096)
    memory[:] = 9
    gated.is_gated = True
    transfers = [storage.submit_write(ids(i), memory, ids(i)) for i in range(8)]
    assert gated.has_begun.acquire(timeout=PATIENCE_S)
    with pytest.raises(TransferTimeout, match="2 threads still read or write after 0 s"):
        storage.close(0)
    with pytest.raises(PoolClosed):
        storage.submit_read(ids(0), memory, ids(0))
    with pytest.raises(StorageError, match="in use"):  # bytes still move there
        DiskStorage(EVEN, directory)
    gated.gate.set()
    storage.close()
    storage.close()
    assert all(transfer.result(0).all() for transfer in transfers)
    assert storage.path.read_bytes() == b"\x09" * 8 * 4096
    assert not disk_threads()
    DiskStorage(EVEN, directory).close()


def test_close_wakes_a_submitter_that_waits_for_room(directory: Path, gated: GatedOs) -> None:
    storage = DiskStorage(EVEN, directory, os_calls=gated, num_threads=1, max_queued_nbytes=1)
    memory = aligned(8, 4096)
    gated.is_gated = True
    storage.submit_write(ids(0), memory, ids(0))
    assert gated.has_begun.acquire(timeout=PATIENCE_S)
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            storage.submit_write(ids(1), memory, ids(1))
        except PoolClosed as error:
            errors.append(error)

    waiter = threading.Thread(target=submit)
    waiter.start()
    with pytest.raises(TransferTimeout):
        storage.close(0)
    waiter.join(PATIENCE_S)
    assert len(errors) == 1
    gated.gate.set()
    storage.close()


def test_cancelled_transfer_moves_nothing_that_had_not_begun(directory: Path, gated: GatedOs) -> None:
    with DiskStorage(EVEN, directory, os_calls=gated, num_threads=1) as storage:
        memory = aligned(8, 4096)
        gated.is_gated = True
        begun, queued = storage.submit_write(ids(0), memory, ids(0)), storage.submit_write(ids(1), memory, ids(1))
        assert gated.has_begun.acquire(timeout=PATIENCE_S)
        assert begun.cancel()
        assert queued.cancel()
        assert begun.is_draining
        assert queued.is_draining
        gated.gate.set()
        storage.close()
        assert not begun.is_draining
        assert not queued.is_draining
        assert gated.seen == [("write", 0, 4096)]


def test_interrupted_submit_moves_nothing_more_and_delays_nobody(directory: Path, gated: GatedOs) -> None:
    class Interrupted:
        def __init__(self, wake: Any) -> None:
            self.wake, self.get = wake, wake.get

        def put(self, item: bool) -> None:
            engine._wake = self.wake
            raise KeyboardInterrupt

    storage = DiskStorage(EVEN, directory, os_calls=gated, num_threads=1)
    memory = aligned(8, 4096)
    storage.write(ids(0), memory[:1])
    engine = storage._engine
    engine._wake = Interrupted(engine._wake)  # type: ignore[assignment]
    gated.is_gated = True
    with pytest.raises(KeyboardInterrupt):
        storage.submit_write(ids(1), memory, ids(1))
    gated.gate.set()
    assert storage.submit_write(ids(2), memory, ids(2)).result(PATIENCE_S).all()
    storage.close()
    assert gated.seen == [("write", 2 * 4096, 4096)]


def test_callback_may_submit_and_close_but_not_wait(directory: Path) -> None:
    storage = DiskStorage(EVEN, directory, num_threads=1, max_queued_nbytes=1)
    memory = aligned(2, 4096)
    memory[0] = 5
    answers: list[Any] = []
    is_over = threading.Event()

    def chain(_: Any) -> None:
        with pytest.raises(StorageError, match="cannot wait in a callback"):
            storage.read(ids(0))
        answers.append(storage.submit_read(ids(0), memory, ids(1)))
        answers.append(storage.submit_write(ids(1), memory, ids(0)))
        storage.close()
        is_over.set()

    storage.submit_write(ids(0), memory, ids(0)).add_done_callback(chain)
    assert is_over.wait(PATIENCE_S)
    assert all(transfer.result(PATIENCE_S).all() for transfer in answers)
    assert (memory[1] == 5).all()
    storage.close()
    assert not disk_threads()


def test_dropped_storage_stops_its_threads_and_gives_the_directory_free(directory: Path) -> None:
    storage = DiskStorage(EVEN, directory)
    storage.write(ids(0), np.zeros((1, 4096), dtype=np.uint8))
    threads = disk_threads()
    del storage
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
    DiskStorage(EVEN, directory).close()


def test_counters_count_blocks_and_bytes(directory: Path) -> None:
    with DiskStorage(SMALL, directory) as storage:
        storage.write(ids(0, 1, 5), np.zeros((3, 192), dtype=np.uint8))
        storage.read(ids(5, 5))
        counters = storage.counters
        assert (counters.num_writes, counters.written_nbytes) == (3, 3 * 192)
        assert (counters.num_reads, counters.read_nbytes) == (2, 2 * 192)
        assert (counters.num_failures, counters.last_error) == (0, "")


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([SMALL, EVEN, ODD]),
    use_direct_io=st.booleans(),
    batches=st.lists(
        st.tuples(
            st.booleans(), st.lists(st.integers(0, 7), unique=True), st.sampled_from([0, 1, 4096]), st.booleans()
        ),
        max_size=12,
    ),
)
def test_random_batches_agree_with_a_dict(
    layout: BlockLayout, use_direct_io: bool, batches: list[tuple[bool, list[int], int, bool]]
) -> None:
    model: dict[int, npt.NDArray[np.uint8]] = {}
    rng = np.random.default_rng(3)
    nbytes = layout.block_nbytes
    with tempfile.TemporaryDirectory() as parent:
        with DiskStorage(layout, f"{parent}/disk", use_direct_io=use_direct_io, num_threads=2) as storage:
            for is_read, wanted, extra, is_aligned in batches:
                blocks = [block for block in wanted if block in model or not is_read]
                row_nbytes = -(-(nbytes + extra) // 4096) * 4096 if is_aligned else nbytes + extra
                memory = aligned(10, row_nbytes)
                memory[:] = rng.integers(0, 256, memory.shape, dtype=np.uint8)
                before = memory.copy()
                rows = rng.permutation(10)[: len(blocks)].astype(np.int32)
                submit = storage.submit_read if is_read else storage.submit_write
                assert submit(ids(*blocks), memory, rows).result(PATIENCE_S).all()
                if is_read:
                    for block, row in zip(blocks, rows.tolist(), strict=True):
                        assert np.array_equal(memory[row, :nbytes], model[block])
                    memory[rows] = before[rows]
                else:
                    model.update(
                        {block: before[row, :nbytes] for block, row in zip(blocks, rows.tolist(), strict=True)}
                    )
                assert np.array_equal(memory, before)
            known = sorted(model)
            assert all(np.array_equal(data, model[i]) for i, data in zip(known, storage.read(ids(*known)), strict=True))
