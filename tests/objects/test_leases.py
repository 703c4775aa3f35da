"""Rows that a client holds on to: nobody gets them back before, and closing waits, bounded, and says so."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from object_site import LAYOUT, PATIENCE_S, Blocks, FakeClient, MakeStorage

import kvbm.storage.object_store.engine as engine
from kvbm.errors import TransferTimeout
from kvbm.storage.object_store import ObjectStorage


def lending() -> FakeClient:
    client = FakeClient()
    client.is_gated = client.keeps_blocks = True
    return client


def wait_for(client: FakeClient, n: int) -> None:
    for _ in range(n):
        assert client.has_come.acquire(timeout=PATIENCE_S)


def test_rows_of_a_write_cancelled_after_its_deadline_are_not_given_back_while_they_are_read(
    make_storage: MakeStorage,
) -> None:
    client, blocks = lending(), Blocks(2)
    storage = make_storage(client=client, deadline_s=0.01)
    writing = blocks.submit_write(storage)
    wait_for(client, 2)
    while not storage.counters.num_late:  # its deadline is over, and its workers wait for the rows
        storage._engine.post(_nothing()).result(PATIENCE_S)
    writing.cancel()
    storage._engine.post(_nothing()).result(PATIENCE_S)
    assert client.lent
    assert writing.is_draining
    client.lent.clear()
    client.release()
    landed = threading.Event()
    writing.add_landed_callback(lambda _: landed.set())
    assert landed.wait(PATIENCE_S)


def test_close_waits_for_lent_rows_says_so_and_hears_of_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_GRACE_S", 0.01)
    client, blocks = lending(), Blocks(2)
    storage = ObjectStorage(LAYOUT, "memory://", fingerprint="m", client=client, deadline_s=0.01)
    writing = blocks.submit_write(storage)
    wait_for(client, 2)
    assert not writing.result(PATIENCE_S).any(), "it ends for its waiter"
    for _ in range(2):
        with pytest.raises(TransferTimeout, match="holds on to rows of memory"):
            storage.close(0.0)
        assert writing.is_draining, "the loop is gone, or nobody looks"
    landed = threading.Event()
    writing.add_landed_callback(lambda _: landed.set())
    client.lent.clear()
    assert landed.wait(PATIENCE_S)
    storage.close(PATIENCE_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-objects"]


def test_each_of_two_reads_of_one_id_has_the_checksum_of_its_own_bytes(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    memory = np.zeros((2, LAYOUT.block_nbytes), dtype=np.uint8)
    first = storage.submit_read(blocks.ids, memory, np.array([0]), hashes=blocks.hashes)
    assert first.result(PATIENCE_S).all()
    before = blocks.checksums.copy()
    blocks.checksums[:] = ~before
    assert all(blocks.write(storage)), "another worker computed it anew"
    second = storage.submit_read(blocks.ids, memory, np.array([1]), hashes=blocks.hashes)
    assert second.result(PATIENCE_S).all()
    assert (first.checksums.tolist(), second.checksums.tolist()) == (before.tolist(), blocks.checksums.tolist())
    assert first.has_checksum.all()
    assert second.has_checksum.all()


async def _nothing() -> None:
    pass
