"""The thread of the object storage, on a store that does as it is told: bounds, order, cancel, deadlines, closing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from object_site import LAYOUT, PATIENCE_S, Blocks, FakeClient, MakeStorage

from kvbm.errors import PoolClosed, StorageError, TransferCancelled, TransferTimeout
from kvbm.layout import BlockLayout
from kvbm.storage.object_store import ObjectStorage
from kvbm.storage.object_store.batch import Batch

MANY = BlockLayout.fully_contiguous(num_blocks=64, num_layers=1, outer_dim=1, block_size=4, inner_dim=9, dtype="uint8")


@pytest.fixture
def client() -> Iterator[FakeClient]:
    client = FakeClient()
    yield client
    client.release()


def wait_for(client: FakeClient, num_requests: int) -> None:
    for _ in range(num_requests):
        assert client.has_come.acquire(timeout=PATIENCE_S)


def settle(storage: ObjectStorage) -> None:
    """Let the storage's thread do what it has been told."""
    blocks = Blocks(0)
    storage.submit_read(blocks.ids, blocks.back, blocks.ids, hashes=blocks.hashes).result(PATIENCE_S)
    done = threading.Event()
    assert storage._engine._loop is not None
    for _ in range(5):
        storage._engine._loop.call_soon_threadsafe(done.set)
        assert done.wait(PATIENCE_S)
        done.clear()


def test_requests_under_way_are_bounded(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(layout=MANY, client=client, max_concurrency=5), Blocks(64, MANY)
    client.is_gated = True
    transfers = [blocks.submit_write(storage), blocks.submit_read(storage)]
    wait_for(client, 5)
    settle(storage)
    assert client.num_at_once == 5
    client.release()
    for transfer in transfers:
        transfer.result(PATIENCE_S)
    assert storage.holds(blocks.ids, blocks.hashes).all()
    assert client.max_at_once == 5
    assert len([thread for thread in threading.enumerate() if thread.name == "kvbm-objects"]) == 1


@pytest.mark.parametrize(("max_nbytes", "num_at_once"), [(1, 1), (100, 1), (350, 3), (1 << 20, 32)])
def test_bytes_under_way_are_bounded(
    make_storage: MakeStorage, client: FakeClient, max_nbytes: int, num_at_once: int
) -> None:
    storage, blocks = make_storage(layout=MANY, client=client, max_in_flight_nbytes=max_nbytes), Blocks(64, MANY)
    assert all(blocks.write(storage))  # 100 bytes each, with the header
    assert all(blocks.read(storage))
    assert client.max_at_once == num_at_once


@pytest.mark.parametrize("max_concurrency", [1, 2, 5, 6])
def test_parts_of_a_block_count_as_requests(
    make_storage: MakeStorage, client: FakeClient, max_concurrency: int
) -> None:
    storage, blocks = make_storage(client=client, part_nbytes=100, max_concurrency=max_concurrency), Blocks(8)
    assert all(blocks.write(storage))
    assert client.max_at_once == max(1, max_concurrency // 3)  # each upload is three requests, but for small stores
    client.seen.clear()
    assert all(blocks.read(storage))
    assert client.seen == ["get"] * 8 * 3
    assert client.max_at_once <= max_concurrency


def test_reads_go_before_writes_that_wait_but_not_for_ever(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(layout=MANY, client=client, max_concurrency=1), Blocks(64, MANY)
    client.is_gated = True
    first = blocks.submit_write(storage)
    wait_for(client, 1)
    reading = blocks.submit_read(storage)
    settle(storage)
    client.release()
    assert first.result(PATIENCE_S).all()
    reading.result(PATIENCE_S)
    assert client.seen[0] == "put"
    assert client.seen[1:18] == ["get"] * 16 + ["put"]
    assert client.seen[18:34] == ["get"] * 16


def test_cancelled_before_it_began_nothing_moves(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client, max_concurrency=1), Blocks(4)
    assert all(blocks.write(storage))
    client.is_gated = True
    ahead = Blocks(1, seed=2).submit_write(storage)
    wait_for(client, 1)
    transfers = [blocks.submit_write(storage), blocks.submit_read(storage)]
    for transfer in transfers:
        assert transfer.cancel()
        assert not transfer.cancel()
    client.seen.clear()
    client.release()
    assert ahead.result(PATIENCE_S).all()
    settle(storage)
    assert client.seen == []
    assert (blocks.back == 0xA5).all()
    assert [transfer.is_draining for transfer in transfers] == [False, False]
    with pytest.raises(TransferCancelled):
        transfers[1].result(0)


def test_a_read_that_was_cancelled_under_way_never_writes_into_its_rows(
    make_storage: MakeStorage, client: FakeClient
) -> None:
    storage, blocks = make_storage(client=client), Blocks(4)
    assert all(blocks.write(storage))
    client.is_gated = True
    reading = blocks.submit_read(storage)
    wait_for(client, 4)
    assert reading.cancel()
    assert not reading.is_draining  # from here on the rows are another's
    client.release()
    settle(storage)
    assert (blocks.back == 0xA5).all()
    assert not storage.has_checksum[blocks.ids].any()
    assert blocks.read(storage) == [True] * 4


def test_cancelled_a_moment_before_it_begins_nothing_moves(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, first, second = make_storage(client=client, max_concurrency=1), Blocks(1), Blocks(2, seed=2)
    assert all(first.write(storage))
    client.is_gated = True
    reading = first.submit_read(storage)
    wait_for(client, 1)
    writing = second.submit_write(storage)
    settle(storage)
    client.seen.clear()
    client.on_answer = writing.cancel  # the next thing that the storage's thread does is to begin the write
    client.release()
    assert reading.result(PATIENCE_S).all()
    settle(storage)
    assert client.seen == []
    assert not writing.is_draining


@pytest.mark.parametrize("part_nbytes", [1 << 20, 100])
def test_a_read_that_is_cancelled_when_its_answer_has_come_never_writes_into_its_rows(
    make_storage: MakeStorage, client: FakeClient, part_nbytes: int
) -> None:
    storage, blocks = make_storage(client=client, part_nbytes=part_nbytes), Blocks(1)
    assert all(blocks.write(storage))
    client.is_gated = True
    reading = blocks.submit_read(storage)
    wait_for(client, 1)
    client.on_answer = reading.cancel  # before anything else in the storage's thread hears of it
    client.release()
    assert reading.wait(PATIENCE_S)
    settle(storage)
    assert reading.cancelled()
    assert (blocks.back == 0xA5).all()
    assert not storage.has_checksum.any()
    assert storage.counters.num_reads == 0


def test_a_block_is_not_called_good_after_the_end() -> None:
    blocks = Blocks(1)
    rows = blocks.ids.astype(np.int64)
    batch = Batch(True, blocks.ids, blocks.back, rows, hashes=blocks.hashes, checksums=None)
    sums, has_sum = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.bool_)
    assert batch.put_bytes(0, 10, b"xy")
    assert blocks.back[0, 9:13].tolist() == [0xA5, ord("x"), ord("y"), 0xA5]
    batch.end()
    assert not batch.put_bytes(0, 10, b"ab")
    assert not batch.settle(0, sums, has_sum, 5)
    assert blocks.back[0, 10] == ord("x")
    assert (sums[0], has_sum[0], batch.is_good[0]) == (0, False, False)


def test_a_write_that_was_cancelled_has_landed_when_its_rows_are_free(
    make_storage: MakeStorage, client: FakeClient
) -> None:
    storage, blocks = make_storage(client=client), Blocks(2)
    client.is_gated = client.keeps_blocks = True
    writing = blocks.submit_write(storage)
    wait_for(client, 2)
    assert writing.cancel()
    settle(storage)
    assert writing.is_draining  # the client still has the rows
    client.lent.clear()
    gc.collect()
    storage.close(PATIENCE_S)
    assert not writing.is_draining


def test_a_transfer_ends_at_its_deadline(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client, deadline_s=0.05, max_concurrency=3), Blocks(6)
    client.objects = {f"{storage.root}/x": b""}
    client.is_gated = True
    for submit in (blocks.submit_read, blocks.submit_write):
        transfer = submit(storage)
        assert transfer.result(PATIENCE_S).tolist() == [False] * 6
        assert not transfer.is_draining
    assert storage.counters.num_late == 12
    assert not storage.holds(blocks.ids, blocks.hashes).any()
    with pytest.raises(StorageError, match="did not end within"):
        storage.forget(blocks.hashes)
    client.release()
    settle(storage)
    assert (blocks.back == 0xA5).all()
    assert client.num_at_once == 0
    assert all(blocks.write(storage))


def test_what_came_before_the_deadline_is_good(make_storage: MakeStorage, client: FakeClient) -> None:
    blocks = Blocks(3)
    assert all(blocks.write(make_storage(client=client, prefix="same")))
    slow = make_storage(client=client, prefix="same", max_concurrency=1, deadline_s=0.05)
    passed: list[int] = []
    real = client.get

    async def get_one_then_none(path: str, nbytes: int, begin: int, end: int) -> object:
        client.is_gated = bool(passed)
        passed.append(1)
        return await real(path, nbytes, begin, end)

    client.get = get_one_then_none  # type: ignore[method-assign, assignment]
    assert blocks.read(slow) == [True, False, False]


def test_rows_that_a_client_never_gives_back_end_not_landed(
    make_storage: MakeStorage, client: FakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvbm.storage.object_store.engine._GRACE_S", 0.01)
    storage, blocks = make_storage(client=client, deadline_s=0.02), Blocks(2)
    client.is_gated = client.keeps_blocks = True
    writing = blocks.submit_write(storage)
    assert writing.result(PATIENCE_S).tolist() == [False, False]
    assert writing.is_draining
    assert "holds on to rows" in caplog.text
    client.lent.clear()
    settle(storage)
    assert not writing.is_draining


def test_forget_waits_for_uploads_of_the_same_blocks(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(3)
    client.is_gated = True
    writing = blocks.submit_write(storage)
    wait_for(client, 3)
    forgetting = threading.Thread(target=storage.forget, args=(blocks.hashes[:2],))
    forgetting.start()
    settle(storage)
    assert "delete" not in client.seen
    client.release()
    forgetting.join(PATIENCE_S)
    assert writing.result(PATIENCE_S).all()
    assert storage.holds(blocks.ids, blocks.hashes).tolist() == [False, False, True]


def test_disowned_blocks_are_deleted_and_nobody_waits(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(3)
    assert all(blocks.write(storage))
    client.is_gated = True
    storage.disown(blocks.ids[:2], blocks.hashes[:2])
    wait_for(client, 1)
    assert len(client.objects) == 3
    client.release()
    settle(storage)
    assert storage.holds(blocks.ids, blocks.hashes).tolist() == [False, False, True]


def test_close_lets_transfers_end(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(2)
    client.is_gated = True
    writing = blocks.submit_write(storage)
    wait_for(client, 2)
    with pytest.raises(TransferTimeout, match="1 transfers still move"):
        storage.close(0.0)
    with pytest.raises(PoolClosed):
        blocks.submit_read(storage)
    assert not writing.done()
    client.release()
    storage.close(PATIENCE_S)
    assert writing.result(0).all()


def test_a_callback_may_submit_and_close_but_not_wait(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(2)
    errors: list[str] = []
    done = threading.Event()

    def call_back(_: object) -> None:
        try:
            storage.holds(blocks.ids, blocks.hashes)
        except StorageError as error:
            errors.append(str(error))
        blocks.submit_read(storage)
        storage.close()
        done.set()

    client.is_gated = True  # or the callback would run here, where it may wait
    blocks.submit_write(storage).add_done_callback(call_back)
    client.release()
    assert done.wait(PATIENCE_S)
    assert "in a callback" in errors[0]
    storage.close(PATIENCE_S)


@pytest.mark.filterwarnings("error")
def test_a_dropped_storage_leaves_no_thread(client: FakeClient) -> None:
    storage = ObjectStorage(LAYOUT, "memory://", fingerprint="m", client=client)
    blocks = Blocks(2)
    assert all(blocks.write(storage))
    threads = [thread for thread in threading.enumerate() if thread.name == "kvbm-objects"]
    assert len(threads) == 1
    del storage
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_transfer_keeps_no_memory(make_storage: MakeStorage, client: FakeClient) -> None:
    storage, blocks = make_storage(client=client), Blocks(1)
    data = np.zeros((1, LAYOUT.block_nbytes), dtype=np.uint8)
    transfer = storage.submit_write(blocks.ids, data, blocks.ids, hashes=blocks.hashes)
    assert transfer.result(PATIENCE_S).all()
    settle(storage)
    memory = weakref.ref(data)
    del data
    assert memory() is None
    assert transfer.done()
