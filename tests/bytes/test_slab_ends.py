"""How a slab and its engine end: at any moment of a start, in a callback, and where the engine itself breaks."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_native import KINDS, PATIENCE_S, aligned

from kvbm._backend import load_backend
from kvbm.errors import StorageError
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.slab import Slab

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=8, num_layers=2, outer_dim=2, block_size=16, inner_dim=32, dtype="float16"
)  # 4096 bytes a block
NAMES = np.arange(2, 18, dtype=np.uint64).reshape(-1, 2)
SUMS = np.ones(8, dtype=np.uint64)


def ids(*slots: int) -> Any:
    return np.array(slots, dtype=np.int32)


def disk_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvbm-disk")]


def in_thread(call: Callable[[], Any]) -> None:
    """Fail where a call hangs."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in disk_threads():
        thread.join(PATIENCE_S)
    assert not disk_threads()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_close_while_the_sync_thread_starts_ends_it_and_closes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine="python")
    slab, start = storage._slab, threading.Thread.start

    def start_and_close(thread: threading.Thread) -> None:
        if moment == "after":
            start(thread)
        slab.close()
        if moment == "before":
            start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_close)
        slab.note(has_data=True)
    assert slab.wait_until_closed(PATIENCE_S)
    assert slab.fd == -1
    DiskStorage(LAYOUT, tmp_path / "d", engine="python").close()
    storage.close()


def test_close_before_the_sync_thread_is_known_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine="python")
    slab, start = storage._slab, Slab._start_thread

    def close_first(self: Slab) -> bool:
        self.close()
        return start(self)

    monkeypatch.setattr(Slab, "_start_thread", close_first)
    slab.note(has_data=True)
    assert slab.wait_until_closed(PATIENCE_S)
    storage.close()


def test_close_left_to_a_sync_thread_that_cannot_start_closes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine="python")
    slab = storage._slab

    def refuse(thread: threading.Thread) -> None:
        slab.close()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        slab.note(has_data=True)
    assert slab.wait_until_closed(PATIENCE_S)
    assert slab.fd == -1
    storage.close()


def test_data_noted_while_a_sync_runs_is_synced_by_the_next(tmp_path: Path) -> None:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine="python")
    slab = storage._slab
    synced: list[int] = []

    def sync_and_write(fd: int) -> None:
        synced.append(fd)
        if len(synced) == 1:
            slab.note(has_data=True)
            slab.note(has_data=False)

    slab._os.fdatasync = sync_and_write  # type: ignore[method-assign]
    slab._is_noted = True  # its thread stays out of this
    slab.note(has_data=True)
    slab.sync()
    slab.sync()
    slab.sync()
    assert synced == [slab.fd] * 2
    storage.close()


@pytest.mark.parametrize("engine", ["python", *KINDS])
def test_callback_may_close_a_storage_that_has_something_to_sync(tmp_path: Path, engine: str) -> None:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine=engine, num_threads=1, backend=_backend(engine))
    storage.record(ids(1), hashes=NAMES[:1], checksums=SUMS[:1])
    has_closed, may_move = threading.Event(), threading.Event()

    def close(_: Any) -> None:
        assert storage._engine.is_worker
        storage.close()
        has_closed.set()

    mover: Any = storage._engine._mover if engine == "python" else storage._engine  # type: ignore[attr-defined]
    name = "move" if engine == "python" else "_take"
    move = getattr(mover, name)

    def move_later(*arguments: Any) -> None:
        assert may_move.wait(PATIENCE_S)
        move(*arguments)

    setattr(mover, name, move_later)
    storage.submit_write(ids(0), aligned(1, 4096), ids(0)).add_done_callback(close)
    may_move.set()
    assert has_closed.wait(PATIENCE_S)
    in_thread(storage.close)
    DiskStorage(LAYOUT, tmp_path / "d", engine="python").close()


def _backend(engine: str) -> Any:
    return load_backend("native" if engine in KINDS else "pure")


class Broken:
    """A native queue whose answers are lost, once or for ever."""

    def __init__(self, queue: Any, *, num_failures: int) -> None:
        self.queue, self.num_failures = queue, num_failures
        self.may_fail = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)

    def wait(self, timeout: float | None = None) -> Any:
        if self.num_failures:
            assert self.may_fail.wait(PATIENCE_S)
            self.num_failures -= 1
            raise MemoryError("no room for an answer")
        return self.queue.wait(timeout)


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskStorage]:
    storage = DiskStorage(LAYOUT, tmp_path / "d", engine=request.param, backend=load_backend("native"))
    yield storage
    in_thread(storage.close)


def broken(storage: DiskStorage, num_failures: int) -> Broken:
    engine: Any = storage._engine
    engine._queue = queue = Broken(engine._queue, num_failures=num_failures)
    return queue


@pytest.mark.parametrize("num_failures", [1, 3])
def test_engine_whose_answers_are_lost_fails_what_is_open_and_takes_nothing_more(
    storage: DiskStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_failures: int
) -> None:
    queue = broken(storage, num_failures)
    memory = aligned(3, 4096)
    open_ones = [storage.submit_write(ids(slot), memory, ids(slot)) for slot in range(3)]
    with caplog.at_level(logging.ERROR):
        queue.may_fail.set()
        for transfer in open_ones:
            assert transfer.result(PATIENCE_S).tolist() == [False]
            assert not transfer.is_draining
    assert [record.message for record in caplog.records if "disk engine is broken" in record.message]
    assert "MemoryError" in storage.counters.last_error
    assert storage.counters.num_failures == 3
    with pytest.raises(StorageError, match=r"close the storage and open it again.*MemoryError") as refusal:
        storage.submit_read(ids(0), memory, ids(0))
    assert refusal.value.errno == errno.EIO
    in_thread(storage.close)
    DiskStorage(LAYOUT, tmp_path / "d", engine="python").close()


def test_engine_that_breaks_wakes_who_waits_for_room(tmp_path: Path) -> None:
    for kind in KINDS:
        storage = DiskStorage(LAYOUT, tmp_path / kind, engine=kind, max_queued_nbytes=1, backend=load_backend("native"))
        queue = broken(storage, 1)
        memory = aligned(1, 4096)
        storage.submit_write(ids(0), memory, ids(0))
        errors: list[BaseException] = []

        def submit(storage: DiskStorage = storage, memory: Any = memory, errors: Any = errors) -> None:
            try:
                storage.submit_write(ids(1), memory, ids(0))
            except StorageError as error:
                errors.append(error)

        threading.Timer(0, queue.may_fail.set).start()
        in_thread(submit)
        assert len(errors) == 1
        in_thread(storage.close)


def test_queue_that_never_ends_leaves_its_file_open_and_its_rows_draining(
    storage: DiskStorage, caplog: pytest.LogCaptureFixture
) -> None:
    queue = broken(storage, 1_000)
    transfer = storage.submit_write(ids(0), aligned(1, 4096), ids(0))
    with caplog.at_level(logging.ERROR):
        queue.may_fail.set()
        assert transfer.result(PATIENCE_S).tolist() == [False]
    assert transfer.is_draining, "nobody knows whether its bytes still move"
    in_thread(storage.close)
    assert storage._slab.fd >= 0, "a number that is given to another file would be written to"
    assert [record.message for record in caplog.records if "its file stays open" in record.message]
    storage._slab.close()
