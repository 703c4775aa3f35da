"""The object storage on memory, a directory and a real S3 server: the contract, sharing, garbage, parts."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from object_site import LAYOUT, PATIENCE_S, Blocks, FakeClient, MakeStorage

from kvbm.errors import ConfigError, PoolClosed, StorageError
from kvbm.layout import BlockLayout
from kvbm.storage import Storage
from kvbm.storage.object_store import ObjectHeader, ObjectStorage
from kvbm.testing.keyed_storages import KeyedStorageTests
from kvbm.types import hash_list

BIG = BlockLayout.fully_contiguous(num_blocks=8, num_layers=2, outer_dim=2, block_size=16, inner_dim=48, dtype="uint8")


class TestObjectStorage(KeyedStorageTests):
    @pytest.fixture(autouse=True)
    def _use(self, make_any: MakeStorage) -> None:
        self.make = make_any

    def make_keyed_storage(self) -> Storage:
        return self.make()


class TestObjectStorageInParts(KeyedStorageTests):
    @pytest.fixture(autouse=True)
    def _use(self, make_any: MakeStorage) -> None:
        self.make = make_any

    def make_keyed_storage(self) -> Storage:
        return self.make(layout=BIG, part_nbytes=1000)  # 3,136 bytes in four parts


@pytest.fixture(params=["file", "s3"])
def make_shared(request: pytest.FixtureRequest, make_storage: MakeStorage, tmp_path: Path) -> MakeStorage:
    if request.param == "s3":
        make: MakeStorage = request.getfixturevalue("make_s3")
        return make
    return lambda **settings: make_storage((tmp_path / "objects").as_uri(), **settings)


def put(storage: ObjectStorage, sequence_hash: bytes, data: bytes) -> None:
    """Put any bytes under a block's key, past the storage."""
    client: Any = storage._books._client
    client._obstore.put(client._store, f"{storage.root}/{sequence_hash.hex()}", data)


def test_workers_of_one_model_share_blocks_and_others_do_not(make_shared: MakeStorage) -> None:
    blocks = Blocks(3)
    first, second = make_shared(prefix="shared"), make_shared(prefix="shared")
    stranger, elsewhere = make_shared(prefix="shared", fingerprint="other"), make_shared(prefix="else/where")
    assert all(blocks.write(first))
    assert blocks.read(second) == [True] * 3
    assert second.holds(blocks.ids, blocks.hashes).all()
    assert sorted(second.inventory()[1].tolist()) == sorted(blocks.hashes.tolist())
    for other in (stranger, elsewhere):
        assert blocks.read(other) == [False] * 3
        assert not other.holds(blocks.ids, blocks.hashes).any()
        other.clear()
    assert blocks.read(first) == [True] * 3


def test_blocks_survive_the_storage_that_wrote_them(make_shared: MakeStorage) -> None:
    blocks = Blocks(3)
    with make_shared(prefix="kept") as first:
        blocks.write(first)
    assert blocks.read(make_shared(prefix="kept")) == [True] * 3


def test_another_layout_has_other_keys(make_storage: MakeStorage) -> None:
    def root(**dimensions: Any) -> str:
        fields = {"num_blocks": 8, "num_layers": 2, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"}
        layout = BlockLayout.fully_contiguous(**{**fields, **dimensions})
        return make_storage(layout=layout, client=FakeClient(), prefix="p").root

    by_head = BlockLayout.custom(
        num_blocks=8,
        num_layers=2,
        outer_dim=2,
        block_size=4,
        inner_dim=12,
        dtype="uint8",
        num_heads=2,
        strides={"block": 192, "layer": 96, "outer": 48, "token": 6, "head": 24},
    )
    roots = [root(), root(num_layers=4), root(outer_dim=1), root(block_size=8), root(dtype="int8")]
    roots += [root(num_heads=2), root(num_heads=3), make_storage(layout=by_head, client=FakeClient(), prefix="p").root]
    assert len(set(roots)) == len(roots)
    assert root(num_blocks=3, alignment=512) == root()


@pytest.mark.parametrize("part_nbytes", [1 << 20, 100])
def test_garbage_under_a_right_key_is_a_miss(make_any: MakeStorage, part_nbytes: int) -> None:
    storage, blocks = make_any(part_nbytes=part_nbytes), Blocks(8)
    names = hash_list(blocks.hashes)
    nbytes = LAYOUT.block_nbytes
    body = blocks.data[0].tobytes()
    right = ObjectHeader(names[7], nbytes, int(blocks.checksums[7])).encode()
    damaged = bytearray(right + blocks.data[7].tobytes())
    damaged[40] ^= 1
    for name, data in zip(
        names,
        [
            b"",
            b"short",
            bytes(64 + nbytes),
            ObjectHeader(names[0], nbytes, 1).encode() + body,  # another block's
            ObjectHeader(names[4], nbytes - 1, 1).encode() + body[:-1],
            ObjectHeader(names[5], nbytes, 1).encode() + body + b"x",
            ObjectHeader(names[6], nbytes, 1).encode() + body[:-1],
            bytes(damaged),
        ],
        strict=True,
    ):
        put(storage, name, data)
    assert blocks.read(storage) == [False] * 8
    assert not storage.has_checksum.any()
    assert storage.counters.num_garbage == 8
    assert (storage.counters.num_failures, storage.counters.num_misses) == (0, 0)
    assert all(blocks.write(storage))  # garbage is replaced
    assert blocks.read(storage) == [True] * 8


def test_objects_of_another_size_are_not_held_and_not_listed(make_any: MakeStorage) -> None:
    storage, blocks = make_any(), Blocks(2)
    blocks.write(storage)
    put(storage, hash_list(blocks.hashes)[0], b"short")
    put(storage, b"strange", bytes(64 + LAYOUT.block_nbytes))
    assert storage.holds(blocks.ids, blocks.hashes).tolist() == [False, True]
    assert storage.inventory()[1].tolist() == blocks.hashes[1:].tolist()
    storage.clear()
    assert not list(storage._books._client._store.list(storage.root))  # type: ignore[attr-defined]


def test_inventory_gives_the_oldest_first(make_storage: MakeStorage) -> None:
    storage, blocks = make_storage(client=FakeClient()), Blocks(5)
    for i in (3, 0, 4, 1, 2):
        row = np.array([i], dtype=np.int32)
        storage.submit_write(row, blocks.data, row, hashes=blocks.hashes[i : i + 1]).result(PATIENCE_S)
    _, hashes, parents, priorities = storage.inventory()
    assert hashes.tolist() == blocks.hashes[[3, 0, 4, 1, 2]].tolist()
    assert not parents.any()
    assert set(priorities.tolist()) == {50}


def test_ids_and_addresses_find_nothing(make_storage: MakeStorage) -> None:
    storage = make_storage(client=FakeClient())
    with pytest.raises(StorageError, match="by hash"):
        storage.read(np.array([0], dtype=np.int32))
    with pytest.raises(StorageError, match="by hash"):
        storage.write(np.array([0], dtype=np.int32), np.zeros((1, LAYOUT.block_nbytes), dtype=np.uint8))
    with pytest.raises(StorageError, match="no addresses"):
        _ = storage.bound


def test_checksums_of_the_wrong_kind_are_refused(make_storage: MakeStorage) -> None:
    storage, blocks = make_storage(client=FakeClient()), Blocks(2)
    for wrong in (blocks.checksums[:1], blocks.checksums.astype(np.int64)):
        with pytest.raises(StorageError, match="checksums must be 2 uint64"):
            storage.submit_write(blocks.ids, blocks.data, blocks.ids, hashes=blocks.hashes, checksums=wrong)


def test_a_closed_storage_refuses_its_books(make_storage: MakeStorage) -> None:
    storage, blocks = make_storage(client=FakeClient()), Blocks(1)
    storage.close()
    for call in (
        lambda: storage.holds(blocks.ids, blocks.hashes),
        lambda: storage.forget(blocks.hashes),
        storage.clear,
        storage.inventory,
    ):
        with pytest.raises(PoolClosed):
            call()


@pytest.mark.parametrize(
    "setting",
    ["max_concurrency", "max_in_flight_nbytes", "timeout_s", "deadline_s", "listing_timeout_s", "max_failures"],
)
def test_impossible_settings_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is 0"):
        ObjectStorage(LAYOUT, "memory://", fingerprint="m", client=FakeClient(), **{setting: 0})


def test_a_store_needs_a_fingerprint_and_parts_more_than_a_header() -> None:
    with pytest.raises(ConfigError, match="needs a fingerprint"):
        ObjectStorage(LAYOUT, "memory://", fingerprint="", client=FakeClient())
    with pytest.raises(ConfigError, match="part_nbytes is 64"):
        ObjectStorage(LAYOUT, "memory://", fingerprint="m", part_nbytes=64, client=FakeClient())


def test_a_directory_is_made_for_its_owner_only(make_storage: MakeStorage, tmp_path: Path) -> None:
    make_storage((tmp_path / "deep er" / "objects").as_uri())
    assert stat.S_IMODE((tmp_path / "deep er" / "objects").stat().st_mode) == 0o700


def test_a_forked_child_is_refused(make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, blocks = make_storage(client=FakeClient()), Blocks(1)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StorageError, match="forked"):
            blocks.submit_write(storage)
    assert blocks.write(storage) == [True]


def test_its_name_says_where_it_is(make_storage: MakeStorage) -> None:
    storage = make_storage("s3://bucket/folder", client=FakeClient())
    assert urlsplit(storage.url).netloc == "bucket"
    assert repr(storage) == f"ObjectStorage(s3://bucket/folder, 8 rows, blocks of {LAYOUT.block_nbytes} bytes)"
    storage.close()
    assert repr(storage).endswith("bytes, closed)")
