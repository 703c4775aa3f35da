"""TransferEngine: every pair of layouts, checksums on the way, the queue, failures, cancelling and closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm._backend import Backend
from kvbm.errors import ConfigError, HashFormatError, LayoutError, PoolClosed, TransferCancelled, TransferError
from kvbm.jobs import TransferState
from kvbm.layout import BlockLayout
from kvbm.storage.host import HostStorage
from kvbm.transfer import CopyResult, TransferEngine

NUM_BLOCKS = 5
LAYOUTS = ["contiguous", "aligned", "block_first", "outer_first", "head_major", "padded"]
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 2, 5, 6, 3),
    (2, 1, 16, 64, 2),
    (2, 2, 16, 512, 4),
]  # layers, outer, tokens, inner, heads
POISON = 0xAB


def make_layout(kind: str, shape: tuple[int, int, int, int, int], dtype: str = "float16") -> BlockLayout:
    num_layers, outer_dim, block_size, inner_dim, num_heads = shape
    fields: dict[str, Any] = {
        "num_blocks": NUM_BLOCKS,
        "num_layers": num_layers,
        "outer_dim": outer_dim,
        "block_size": block_size,
        "inner_dim": inner_dim,
        "dtype": dtype,
        "num_heads": num_heads,
    }
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(**fields)
    if kind == "aligned":
        return BlockLayout.fully_contiguous(**fields, alignment=256)
    if kind in ("block_first", "outer_first"):
        return BlockLayout.layer_separate(**fields, block_first=kind == "block_first", alignment=64)
    itemsize = BlockLayout.fully_contiguous(**fields).itemsize
    head = inner_dim // num_heads * itemsize
    if kind == "head_major":
        token, head = head, head * block_size
        region = head * num_heads
    else:  # a gap after every token
        token = inner_dim * itemsize + 3
        region = token * block_size
    strides = {"block": num_layers * outer_dim * region, "layer": outer_dim * region}
    return BlockLayout.custom(**fields, strides={**strides, "outer": region, "token": token, "head": head})


def bytes_of(layout: BlockLayout, buffers: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """View the bytes of all blocks: (block, layer, outer, token, head, byte); written independently of kvbm's plans."""
    s = layout.strides
    sizes = (layout.num_blocks, layout.outer_dim, layout.block_size, layout.num_heads, layout.head_nbytes)
    strides = (s.block, s.outer, s.token, s.head, 1)
    layers = []
    for layer in range(layout.num_layers):
        buffer = buffers[layer] if layout.has_layer_buffers else buffers[0][layer * s.layer :]
        layers.append(np.lib.stride_tricks.as_strided(buffer, sizes, strides))
    return np.stack(layers, axis=1)


def make_storage(layout: BlockLayout, backend: Backend, seed: int | None = None) -> HostStorage:
    storage = HostStorage(layout, use_huge_pages=False, backend=backend)
    for buffer in storage.buffers:
        if seed is None:
            buffer[:] = POISON
        else:
            buffer[:] = np.random.default_rng(seed).integers(0, 256, len(buffer), dtype=np.uint8)
    return storage


def make_hashes(num_blocks: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(11).integers(0, 1 << 63, (num_blocks, 2), dtype=np.uint64)


@pytest.fixture
def engine(backend: Backend) -> Iterator[TransferEngine]:
    with TransferEngine(backend=backend) as made:
        yield made


@pytest.fixture
def pair(backend: Backend) -> tuple[HostStorage, HostStorage]:
    layout = make_layout("contiguous", SHAPES[2])
    return make_storage(layout, backend, seed=1), make_storage(layout, backend)


class Gate:
    """A backend whose copies wait until the gate opens."""

    def __init__(self, backend: Backend) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

        def copy_blocks(*args: Any, **kwargs: Any) -> Any:
            self.entered.release()
            assert self.opened.wait(30)
            return backend.copy_blocks(*args, **kwargs)

        self.backend = replace(backend, copy_blocks=copy_blocks)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target_kind", LAYOUTS)
@pytest.mark.parametrize("source_kind", LAYOUTS)
def test_copy_between_any_layouts_equals_numpy(
    engine: TransferEngine, backend: Backend, source_kind: str, target_kind: str, shape: Any, dtype: str
) -> None:
    source = make_storage(make_layout(source_kind, shape, dtype), backend, seed=1)
    target = make_storage(make_layout(target_kind, shape, dtype), backend)
    source_ids, target_ids = np.array([4, 0, 2], np.int32), np.array([1, 3, 0], np.int32)
    poisoned = make_storage(target.layout, backend)
    written = bytes_of(source.layout, source.buffers)[source_ids]

    result = engine.copy(source, target, source_ids, target_ids).result(0)

    assert result.num_blocks == 3
    assert result.nbytes == 3 * source.layout.block_nbytes
    expected = bytes_of(target.layout, poisoned.buffers)
    expected[target_ids] = written
    np.testing.assert_array_equal(bytes_of(target.layout, target.buffers), expected)
    for buffer in target.buffers:  # gaps keep their poison: only as many bytes changed as were written
        assert (buffer != POISON).sum() <= written.size
    changed = sum(int((buffer != POISON).sum()) for buffer in target.buffers)
    assert changed == int((written != POISON).sum())


def test_copy_without_hashes_forgets_the_old_checksum(
    engine: TransferEngine, pair: tuple[HostStorage, HostStorage]
) -> None:
    source, target = pair
    target.has_checksum[:] = True
    ids = np.array([0, 2], np.int32)
    assert engine.copy(source, target, ids, ids).result(0).good.all()
    assert target.has_checksum.tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("target_kind", LAYOUTS)
def test_copy_keeps_checksums_that_the_next_copy_verifies(
    engine: TransferEngine, backend: Backend, target_kind: str
) -> None:
    source = make_storage(make_layout("contiguous", SHAPES[3]), backend, seed=1)
    middle = make_storage(make_layout(target_kind, SHAPES[3]), backend)
    back = make_storage(source.layout, backend)
    ids, hashes = np.arange(NUM_BLOCKS, dtype=np.int32), make_hashes(NUM_BLOCKS)
    assert engine.copy(source, middle, ids, ids[::-1], hashes=hashes).result(0).good.all()
    assert middle.has_checksum.all()
    assert engine.copy(middle, back, ids[::-1], ids, hashes=hashes).result(0).good.all()
    np.testing.assert_array_equal(back.buffers[0], source.buffers[0])
    assert engine.copy(back, middle, ids, ids, hashes=hashes).result(0).good.all()


@pytest.mark.parametrize("kind", ["contiguous", "outer_first", "head_major"])
def test_copy_marks_the_block_whose_bytes_changed(engine: TransferEngine, backend: Backend, kind: str) -> None:
    source = make_storage(make_layout("contiguous", SHAPES[3]), backend, seed=1)
    middle, back = make_storage(make_layout(kind, SHAPES[3]), backend), make_storage(source.layout, backend)
    ids, hashes = np.arange(NUM_BLOCKS, dtype=np.int32), make_hashes(NUM_BLOCKS)
    engine.copy(source, middle, ids, ids, hashes=hashes).result(0)
    middle.buffers[0][middle.layout.offset(3, 0, 1)[1] + 77] ^= 0x10
    back.has_checksum[:] = True
    result = engine.copy(middle, back, ids, ids, hashes=hashes).result(0)
    assert result.good.tolist() == [True, True, True, False, True]
    assert back.has_checksum.tolist() == [True, True, True, False, True]


def test_copy_marks_blocks_under_another_hash(engine: TransferEngine, pair: tuple[HostStorage, HostStorage]) -> None:
    source, target = pair
    ids, hashes = np.arange(2, dtype=np.int32), make_hashes(2)
    engine.copy(source, target, ids, ids, hashes=hashes).result(0)
    assert engine.copy(target, source, ids, ids + 2, hashes=hashes[::-1]).result(0).good.tolist() == [False, False]


def test_copy_of_no_blocks_is_done(engine: TransferEngine, pair: tuple[HostStorage, HostStorage]) -> None:
    none = np.empty(0, np.int32)
    result = engine.copy(*pair, none, none, hashes=make_hashes(0)).result(0)
    assert (result.num_blocks, result.nbytes, result.good.shape) == (0, 0, (0,))


def test_copy_refuses_wrong_arguments(engine: TransferEngine, pair: tuple[HostStorage, HostStorage]) -> None:
    one, two = np.zeros(1, np.int32), np.arange(2, dtype=np.int32)
    with pytest.raises(LayoutError, match="give pairs"):
        engine.copy(*pair, one, two)
    with pytest.raises(HashFormatError, match="hashes has 1 entries, need 2"):
        engine.copy(*pair, two, two, hashes=make_hashes(1))
    settings: list[dict[str, Any]] = [{"num_threads": -1}, {"num_workers": 0}, {"queue_size": 0}]
    for wrong in settings:
        with pytest.raises(ConfigError, match="num_threads >= 0"):
            TransferEngine(**wrong)


def test_small_copy_is_done_in_the_callers_thread(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    with TransferEngine(backend=backend) as engine:
        ids = np.zeros(1, np.int32)
        assert engine.copy(*pair, ids, ids).state is TransferState.DONE
        assert not any(thread.name == "kvbm-transfer" for thread in threading.enumerate())


def test_large_copies_run_in_a_worker_in_order(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    order: list[int] = []
    with TransferEngine(backend=gate.backend, small_nbytes=0) as engine:
        transfers = []
        for i in range(3):
            ids = np.array([i], np.int32)
            transfers.append(engine.copy(*pair, ids, ids))
            transfers[i].add_done_callback(lambda _, i=i: order.append(i))  # type: ignore[misc]
            ids[:] = 4  # the engine has its own copy
        assert not any(transfer.done() for transfer in transfers)
        gate.opened.set()
        for transfer in transfers:
            assert transfer.result(30).good.all()
    assert order == [0, 1, 2]
    nbytes = pair[0].layout.strides.block
    np.testing.assert_array_equal(pair[1].buffers[0][: 3 * nbytes], pair[0].buffers[0][: 3 * nbytes])
    assert (pair[1].buffers[0][3 * nbytes :] == POISON).all()


@pytest.mark.parametrize("small_nbytes", [0, 1 << 20])
def test_failed_copy_is_stored_and_the_engine_lives_on(
    pair: tuple[HostStorage, HostStorage], backend: Backend, small_nbytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [RuntimeError("bus error")]

    def copy_blocks(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return backend.copy_blocks(*args, **kwargs)

    ids = np.zeros(1, np.int32)
    with TransferEngine(backend=replace(backend, copy_blocks=copy_blocks), small_nbytes=small_nbytes) as engine:
        failed = engine.copy(*pair, ids, ids)
        with pytest.raises(TransferError, match="the copy of 1 blocks failed: bus error") as caught:
            failed.result(30)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert failed.state is TransferState.FAILED
        assert not failed.is_draining
        assert engine.copy(*pair, ids, ids).result(30).good.all()
    assert "copy failed num_blocks=1" in caplog.text


def test_cancelled_copy_that_has_not_begun_moves_nothing(
    pair: tuple[HostStorage, HostStorage], backend: Backend
) -> None:
    gate = Gate(backend)
    first, second = np.array([0], np.int32), np.array([1], np.int32)
    with TransferEngine(backend=gate.backend, small_nbytes=0) as engine:
        running = engine.copy(*pair, first, first)
        waiting = engine.copy(*pair, second, second)
        assert gate.entered.acquire(timeout=30)
        assert running.cancel()
        assert waiting.cancel()
        was_draining = running.is_draining
        gate.opened.set()
    assert (was_draining, running.is_draining) == (True, False)
    assert not waiting.is_draining
    with pytest.raises(TransferCancelled):
        waiting.result(0)
    nbytes = pair[0].layout.strides.block
    assert (pair[1].buffers[0][nbytes:] == POISON).all()


def test_copy_past_its_deadline_is_dropped(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    with TransferEngine(backend=gate.backend, small_nbytes=0) as engine:
        engine.copy(*pair, ids, ids)
        late = engine.copy(*pair, ids, ids, deadline_s=0.0)
        assert late.state is TransferState.TIMED_OUT
        gate.opened.set()
    assert not late.is_draining


def test_full_queue_makes_the_caller_wait(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    with TransferEngine(backend=gate.backend, small_nbytes=0, queue_size=1) as engine:
        engine.copy(*pair, ids, ids)
        assert gate.entered.acquire(timeout=30)
        engine.copy(*pair, ids, ids)
        results: list[CopyResult] = []
        caller = threading.Thread(target=lambda: results.append(engine.copy(*pair, ids, ids).result(30)))
        caller.start()
        assert caller.is_alive()  # it cannot be otherwise while the gate is shut
        gate.opened.set()
        caller.join(30)
        assert len(results) == 1


def test_close_finishes_what_waits_and_leaves_no_thread(
    pair: tuple[HostStorage, HostStorage], backend: Backend
) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    engine = TransferEngine(backend=gate.backend, small_nbytes=0, num_workers=2)
    transfers = [engine.copy(*pair, ids, ids) for _ in range(5)]
    with pytest.raises(TimeoutError, match="2 workers still copy"):
        engine.close(0)
    with pytest.raises(PoolClosed):
        engine.copy(*pair, ids, ids)
    gate.opened.set()
    engine.close(30)
    engine.close()
    assert all(transfer.state is TransferState.DONE for transfer in transfers)
    assert not any(thread.name == "kvbm-transfer" for thread in threading.enumerate())


def test_close_wakes_a_caller_that_waits_for_room(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    engine = TransferEngine(backend=gate.backend, small_nbytes=0, queue_size=1)
    engine.copy(*pair, ids, ids)
    assert gate.entered.acquire(timeout=30)
    engine.copy(*pair, ids, ids)
    refused = threading.Event()

    def submit() -> None:
        with pytest.raises(PoolClosed):
            engine.copy(*pair, ids, ids)
        refused.set()

    caller = threading.Thread(target=submit)
    caller.start()
    with pytest.raises(TimeoutError):
        engine.close(0)
    assert refused.wait(30)
    gate.opened.set()
    engine.close(30)
    caller.join(30)


def test_engine_may_be_closed_from_a_callback(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    engine = TransferEngine(backend=gate.backend, small_nbytes=0)
    transfer = engine.copy(*pair, ids, ids)
    closed = threading.Event()

    def close(_: Any) -> None:
        engine.close()
        closed.set()

    transfer.add_done_callback(close)
    gate.opened.set()
    assert closed.wait(30)
    engine.close(30)


def test_storages_may_be_closed_while_a_copy_waits(pair: tuple[HostStorage, HostStorage], backend: Backend) -> None:
    gate = Gate(backend)
    ids = np.zeros(1, np.int32)
    with TransferEngine(backend=gate.backend, small_nbytes=0) as engine:
        transfer = engine.copy(*pair, ids, ids)
        for storage in pair:
            storage.close()
        gate.opened.set()
        assert transfer.result(30).num_blocks == 1
