"""Objects that are no blocks: met once, then gone, or at least not found again (CONFORMANCE 27)."""

from __future__ import annotations

import asyncio
import logging
import threading
import zlib
from collections.abc import AsyncIterator

import pytest
from object_site import PATIENCE_S, Blocks, FakeClient, MakeStorage

from kvbm.storage.object_store.client import Found


class PermissionDeniedError(Exception):
    """As obstore calls it."""


def spoil(client: FakeClient) -> None:
    """Turn a bit of every header."""
    for path, data in client.objects.items():
        client.objects[path] = bytes([data[0] ^ 1]) + data[1:]


def wait_for_deletions(client: FakeClient, n: int) -> None:
    """Wait until that many deletions stand at the gate."""
    for _ in range(n):
        assert client.has_come.acquire(timeout=PATIENCE_S)


def test_object_with_a_bad_header_is_deleted_counted_and_warned_of_once(
    make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    client, blocks = FakeClient(), Blocks(3)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    spoil(client)
    assert blocks.read(storage) == [False] * 3
    assert not storage.holds(blocks.ids, blocks.hashes).any(), "at once, whether or not it is deleted yet"
    assert storage.counters.num_garbage == 3
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    storage.forget(blocks.hashes)  # behind the deletions, which go first
    assert not client.objects
    assert all(blocks.write(storage))
    assert storage.holds(blocks.ids, blocks.hashes).all()
    assert all(blocks.read(storage))


def test_garbage_that_may_not_be_deleted_is_absent_until_it_is_written_anew(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    spoil(client)
    client.plan = [None, PermissionDeniedError("read only")]
    assert blocks.read(storage) == [False]
    for _ in range(3):
        assert not storage.holds(blocks.ids, blocks.hashes).any()
        assert not len(storage.inventory()[1])
    assert client.seen.count("delete") == 1
    assert len(client.objects) == 1, "it is there still"
    assert all(blocks.write(storage))
    assert storage.holds(blocks.ids, blocks.hashes).all()
    assert len(storage.inventory()[1]) == 1


def test_object_of_another_release_is_left_to_it_and_absent_here(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    ((path, data),) = client.objects.items()
    fields = data[:8] + (2).to_bytes(4, "little") + data[12:60]  # the version
    client.objects[path] = fields + zlib.crc32(fields).to_bytes(4, "little") + data[64:]
    assert blocks.read(storage) == [False]
    assert not storage.holds(blocks.ids, blocks.hashes).any()
    assert "delete" not in client.seen


def test_upload_of_a_block_waits_for_the_deletion_of_garbage_in_its_place(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    spoil(client)

    def shut() -> None:
        client.is_gated = True

    client.on_answer = shut  # after the read
    assert blocks.read(storage) == [False]
    wait_for_deletions(client, 1)
    writing = blocks.submit_write(storage)
    probing = threading.Thread(target=storage.holds, args=(blocks.ids, blocks.hashes))
    probing.start()
    wait_for_deletions(client, 1)  # of the probe: the loop has been round
    assert client.seen.count("put") == 1
    client.release()
    probing.join(PATIENCE_S)
    assert writing.result(PATIENCE_S).all()
    client.on_answer = None
    assert all(blocks.read(storage)), "the deletion did not come after the upload"


class SlowClient(FakeClient):
    """Its answers to questions are taken at once and given late."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer: asyncio.Event | None = None
        self.has_looked = threading.Event()

    async def size(self, path: str) -> int:
        nbytes = len(self._find(path))
        await self._hold()
        return nbytes

    async def list(self, prefix: str) -> AsyncIterator[list[Found]]:
        async for found in super().list(prefix):
            await self._hold()
            yield found

    async def _hold(self) -> None:
        self.may_answer = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.answer = lambda: loop.call_soon_threadsafe(self.may_answer.set)  # type: ignore[union-attr]
        self.has_looked.set()
        await self.may_answer.wait()


@pytest.mark.parametrize("question", ["probe", "listing"])
def test_an_answer_from_before_garbage_was_deleted_is_not_believed(make_storage: MakeStorage, question: str) -> None:
    client, blocks = SlowClient(), Blocks(1)
    storage = make_storage(client=client)
    assert all(blocks.write(storage))
    spoil(client)
    found: list[int] = []

    def ask() -> None:
        is_probe = question == "probe"
        found.append(int(storage.holds(blocks.ids, blocks.hashes).sum()) if is_probe else len(storage.inventory()[1]))

    asking = threading.Thread(target=ask)
    asking.start()
    assert client.has_looked.wait(PATIENCE_S)
    assert blocks.read(storage) == [False]
    storage.forget(blocks.hashes)  # behind the deletion of the garbage
    assert not client.objects
    client.answer()
    asking.join(PATIENCE_S)
    assert found == [0]
