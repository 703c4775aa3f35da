"""What every keyed storage must keep: blocks found by sequence hash under any id, misses, books, and all of the rest.

A keyed storage finds bytes by hash, so the plain suite runs on it through a wrapper that gives each id a hash of its
own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.errors import StorageError
from kvbm.jobs import Transfer
from kvbm.storage.base import Storage
from kvbm.testing.storages import StorageTests
from kvbm.types import HashArray, IdArray

__all__ = ["KeyedStorageTests"]

_PATIENCE_S = 60.0

MaskTransfer = Transfer[npt.NDArray[np.bool_]]


class KeyedStorageTests(StorageTests):
    """Inherit, override `make_keyed_storage`, and let pytest collect the class."""

    def make_keyed_storage(self) -> Storage:
        """Give an open storage of at least four rows, under which nothing lies yet."""
        raise TypeError(f"{type(self).__name__} must override make_keyed_storage")

    def make_storage(self) -> Storage:
        """Give the storage of `make_keyed_storage`, each id with a hash of its own."""
        return _HashOfEachId(self.make_keyed_storage())

    def test_it_says_that_it_is_keyed(self) -> None:
        """And that it has no addresses."""
        with self.make_keyed_storage() as storage:
            assert storage.capabilities.is_keyed
            assert not storage.capabilities.is_addressable

    def test_blocks_are_found_by_hash_under_any_id(self) -> None:
        """Ids of the write and ids of the read have nothing to do with each other."""
        with self.make_keyed_storage() as storage:
            data, hashes = _bytes_for(storage, 3), _hashes(1, 2, 3)
            assert _write(storage, [0, 1, 2], data, hashes).tolist() == [True] * 3
            back, good = _read(storage, [3, 0, 1], hashes[[2, 0, 1]])
            assert good.tolist() == [True] * 3
            assert np.array_equal(back, data[[2, 0, 1]])

    def test_a_block_that_is_not_there_is_a_miss(self) -> None:
        """The others of the batch come."""
        with self.make_keyed_storage() as storage:
            data = _bytes_for(storage, 2)
            _write(storage, [0, 1], data, _hashes(1, 3))
            back, good = _read(storage, [0, 1, 2], _hashes(1, 2, 3))
            assert good.tolist() == [True, False, True]
            assert np.array_equal(back[[0, 2]], data)

    def test_checksums_come_with_the_bytes(self) -> None:
        """They are there when the read has ended, under the ids of the read; where none was given, none comes."""
        with self.make_keyed_storage() as storage:
            data, sums = _bytes_for(storage, 2), np.array([0, 2**64 - 1], dtype=np.uint64)
            _write(storage, [0, 1], data, _hashes(1, 2), sums)
            _write(storage, [2], data[:1], _hashes(3))
            storage.has_checksum[:] = [False] * 3 + [True] * (storage.num_blocks - 3)
            _read(storage, [1, 2, 3], _hashes(1, 2, 3))
            assert storage.has_checksum[1:4].tolist() == [True, True, False]
            assert storage.checksums[1:3].tolist() == sums.tolist()

    def test_the_last_write_of_a_hash_is_what_is_read(self) -> None:
        """Whatever lay there before."""
        with self.make_keyed_storage() as storage:
            data = _bytes_for(storage, 2)
            _write(storage, [0], data[:1], _hashes(1))
            _write(storage, [1], data[1:], _hashes(1))
            back, _ = _read(storage, [0], _hashes(1))
            assert np.array_equal(back, data[1:])

    def test_holds_tells_what_is_there(self) -> None:
        """By hash, whatever the id."""
        with self.make_keyed_storage() as storage:
            _write(storage, [0, 1], _bytes_for(storage, 2), _hashes(1, 2))
            ids = np.array([3, 2, 1], dtype=np.int32)
            assert storage.holds(ids, _hashes(2, 3, 1)).tolist() == [True, False, True]
            assert storage.holds(np.full(3, -1, dtype=np.int32), _hashes(2, 3, 1)).tolist() == [True, False, True]
            assert storage.holds(ids[:0], _hashes()).tolist() == []

    def test_forgotten_blocks_are_gone(self) -> None:
        """Others stay; what is not there may be forgotten too."""
        with self.make_keyed_storage() as storage:
            _write(storage, [0, 1, 2], _bytes_for(storage, 3), _hashes(1, 2, 3))
            storage.forget(_hashes(2, 9, 1))
            storage.forget(_hashes(2), np.array([2], dtype=np.int32))
            storage.forget(_hashes())
            _, good = _read(storage, [0, 1, 2], _hashes(1, 2, 3))
            assert good.tolist() == [False, False, True]

    def test_clear_forgets_everything(self) -> None:
        """Twice is harmless; what is written afterwards stays."""
        with self.make_keyed_storage() as storage:
            data = _bytes_for(storage, 2)
            _write(storage, [0, 1], data, _hashes(1, 2))
            storage.clear()
            storage.clear()
            assert not _read(storage, [0, 1], _hashes(1, 2))[1].any()
            _write(storage, [0], data[:1], _hashes(2))
            assert _read(storage, [0, 1], _hashes(1, 2))[1].tolist() == [False, True]

    def test_inventory_lists_what_is_there(self) -> None:
        """With ids of its own, each once, as many as there are rows at most."""
        with self.make_keyed_storage() as storage:
            assert [len(part) for part in storage.inventory()] == [0] * 4
            data = _bytes_for(storage, 1)
            for number in range(storage.num_blocks + 2):
                _write(storage, [0], data, _hashes(number))
                if number == 1:
                    ids, hashes, parents, priorities = storage.inventory()
                    assert ids.tolist() == [0, 1]
                    assert sorted(hashes.tolist()) == _hashes(0, 1).tolist()
                    assert parents.shape == (2, 2)
                    assert priorities.shape == (2,)
            ids, hashes, _, _ = storage.inventory()
            assert ids.tolist() == list(range(storage.num_blocks))
            assert len({tuple(name) for name in hashes.tolist()}) == storage.num_blocks

    def test_bytes_without_hashes_are_refused(self) -> None:
        """There is nothing else to find them by; wrong ones are refused too."""
        with self.make_keyed_storage() as storage:
            memory, row = _bytes_for(storage, 1), np.array([0], dtype=np.int32)
            for submit in (storage.submit_read, storage.submit_write):
                with pytest.raises(StorageError, match="hash"):
                    submit(row, memory, row)
                with pytest.raises(StorageError, match="hashes must be 1"):
                    submit(row, memory, row, hashes=_hashes(1, 2))


class _HashOfEachId(Storage):
    """A keyed storage as one with slots."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.layout)
        self._storage = storage
        self.capabilities = storage.capabilities
        self.checksums, self.has_checksum = storage.checksums, storage.has_checksum

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        ids = self._begin(block_ids)
        data, good = _read(self._storage, ids.tolist(), _hashes(*ids.tolist()))
        if not good.all():
            raise StorageError(f"could not read blocks {ids[~good].tolist()}")
        return data

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        ids = self._begin(block_ids)
        good = _write(self._storage, ids.tolist(), self._checked_data(ids, data), _hashes(*ids.tolist()))
        if not good.all():
            raise StorageError(f"could not write blocks {ids[~good].tolist()}")

    def submit_read(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, hashes: HashArray | None = None
    ) -> MaskTransfer:
        return self._storage.submit_read(block_ids, memory, rows, hashes=_hashes(*block_ids.tolist()))

    def submit_write(
        self,
        block_ids: IdArray,
        memory: npt.NDArray[np.uint8],
        rows: IdArray,
        *,
        hashes: HashArray | None = None,
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> MaskTransfer:
        return self._storage.submit_write(
            block_ids, memory, rows, hashes=_hashes(*block_ids.tolist()), checksums=checksums
        )

    def close(self, timeout: float | None = None) -> None:
        super().close(timeout)
        self._storage.close(timeout)


def _hashes(*numbers: int) -> HashArray:
    """Give a hash for each number."""
    return np.array([(0xABCDEF, number & 0xFFFF) for number in numbers], dtype=np.uint64).reshape(-1, 2)


def _bytes_for(storage: Storage, n: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, storage.layout.block_nbytes), dtype=np.uint8)


def _write(
    storage: Storage,
    ids: list[int],
    data: npt.NDArray[np.uint8],
    hashes: HashArray,
    checksums: npt.NDArray[np.uint64] | None = None,
) -> npt.NDArray[np.bool_]:
    rows = np.arange(len(ids), dtype=np.int32)
    transfer = storage.submit_write(np.array(ids, dtype=np.int32), data, rows, hashes=hashes, checksums=checksums)
    return transfer.result(_PATIENCE_S)


def _read(storage: Storage, ids: list[int], hashes: HashArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    memory = np.zeros((len(ids), storage.layout.block_nbytes), dtype=np.uint8)
    rows = np.arange(len(ids), dtype=np.int32)
    transfer = storage.submit_read(np.array(ids, dtype=np.int32), memory, rows, hashes=hashes)
    return memory, transfer.result(_PATIENCE_S)
