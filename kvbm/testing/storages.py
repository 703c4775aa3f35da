"""What every storage must keep: bytes come back as written, neighbours untouched, errors before any byte moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.errors import BlockIdError, KvbmError, StorageError
from kvbm.storage.base import Storage


class StorageTests:
    """Inherit, override `make_storage`, and let pytest collect the class."""

    def make_storage(self) -> Storage:
        """Give an open storage of at least four blocks."""
        raise TypeError(f"{type(self).__name__} must override make_storage")

    def test_blocks_come_back_as_written(self) -> None:
        """In any order, in one batch and block by block."""
        with self.make_storage() as storage:
            data = _bytes_for(storage, 4)
            storage.write(np.array([2, 0, 3, 1], dtype=np.int32), data)
            assert np.array_equal(storage.read(np.array([0, 1, 2, 3], dtype=np.int32)), data[[1, 3, 0, 2]])
            for place, block_id in enumerate((2, 0, 3, 1)):
                assert np.array_equal(storage.read(np.array([block_id], dtype=np.int32))[0], data[place])

    def test_writing_leaves_other_blocks_alone(self) -> None:
        """Only the named slot changes."""
        with self.make_storage() as storage:
            data = _bytes_for(storage, 4)
            storage.write(np.arange(4, dtype=np.int32), data)
            storage.write(np.array([1], dtype=np.int32), ~data[1:2])
            assert np.array_equal(storage.read(np.array([0, 2, 3], dtype=np.int32)), data[[0, 2, 3]])
            assert np.array_equal(storage.read(np.array([1], dtype=np.int32)), ~data[1:2])

    def test_no_blocks_is_no_work(self) -> None:
        """An empty batch gives an empty answer."""
        with self.make_storage() as storage:
            nothing = np.zeros(0, dtype=np.int32)
            assert storage.read(nothing).shape == (0, storage.layout.block_nbytes)
            storage.write(nothing, np.zeros((0, storage.layout.block_nbytes), dtype=np.uint8))

    def test_wrong_ids_and_data_are_refused_before_a_byte_moves(self) -> None:
        """Ids outside, ids given twice, and data of another shape or type."""
        with self.make_storage() as storage:
            data = _bytes_for(storage, 2)
            first = np.array([0], dtype=np.int32)
            storage.write(first, data[:1])
            for ids in ([0, storage.num_blocks], [0, -1], [0, 0]):
                with pytest.raises(BlockIdError):
                    storage.write(np.array(ids, dtype=np.int32), ~data)
            with pytest.raises(StorageError, match="data must be a"):
                storage.write(first, data)
            with pytest.raises(StorageError, match="data must be a"):
                storage.write(first, data[:1].astype(np.int16))
            assert np.array_equal(storage.read(first), data[:1])

    def test_writing_forgets_the_checksum(self) -> None:
        """A checksum never outlives the bytes that it was taken of."""
        with self.make_storage() as storage:
            storage.checksums[1], storage.has_checksum[1] = 5, True
            storage.write(np.array([1], dtype=np.int32), _bytes_for(storage, 1))
            assert not storage.has_checksum[1]

    def test_closed_storage_refuses_and_closes_twice(self) -> None:
        """Close is final and harmless."""
        storage = self.make_storage()
        storage.close()
        storage.close()
        with pytest.raises(KvbmError):
            storage.read(np.array([0], dtype=np.int32))


def _bytes_for(storage: Storage, n: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, storage.layout.block_nbytes), dtype=np.uint8)
