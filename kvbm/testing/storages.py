"""What every storage must keep: bytes come back as written, neighbours untouched, errors before any byte moves."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.errors import BlockIdError, KvbmError, PoolClosed, StorageError
from kvbm.storage.base import Storage

_PATIENCE_S = 60.0


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
        memory, row = np.zeros((1, storage.layout.block_nbytes), dtype=np.uint8), np.array([0], dtype=np.int32)
        for submit in (storage.submit_read, storage.submit_write):
            with pytest.raises(PoolClosed):
                submit(row, memory, row)

    def test_submitted_blocks_come_back_as_written(self) -> None:
        """From and into rows in any order, narrow and wide, other rows untouched."""
        with self.make_storage() as storage:
            nbytes = storage.layout.block_nbytes
            ids = np.array([2, 0, 3, 1], dtype=np.int32)
            for row_nbytes in (nbytes, nbytes + 1, -(-nbytes // 4096) * 4096 + 4096):
                data = _bytes_for(storage, 4)
                memory = np.full((7, row_nbytes), 0xAB, dtype=np.uint8)
                rows = np.array([5, 1, 2, 3], dtype=np.int32)
                memory[rows, :nbytes] = data
                written = storage.submit_write(ids, memory, rows)
                assert written.result(_PATIENCE_S).tolist() == [True] * 4
                assert not written.is_draining
                back = np.full((9, row_nbytes), 0xCD, dtype=np.uint8)
                places = np.array([8, 1, 0, 4], dtype=np.int32)
                read = storage.submit_read(ids, back, places)
                assert read.result(_PATIENCE_S).tolist() == [True] * 4
                assert not read.is_draining
                assert np.array_equal(back[places, :nbytes], data)
                assert (back[[2, 3, 5, 6, 7]] == 0xCD).all()
                assert np.array_equal(storage.read(ids), data)

    def test_submitting_no_blocks_is_no_work(self) -> None:
        """An empty batch has an empty answer."""
        with self.make_storage() as storage:
            memory, nothing = np.zeros((0, storage.layout.block_nbytes), dtype=np.uint8), np.zeros(0, dtype=np.int32)
            for submit in (storage.submit_read, storage.submit_write):
                assert submit(nothing, memory, nothing).result(_PATIENCE_S).shape == (0,)

    def test_wrong_submissions_are_refused_before_a_byte_moves(self) -> None:
        """Ids, rows and memory of the wrong kind raise in the caller."""
        with self.make_storage() as storage:
            nbytes = storage.layout.block_nbytes
            data = _bytes_for(storage, 2)
            first, both = np.array([0], dtype=np.int32), np.array([0, 1], dtype=np.int32)
            storage.write(both, data)
            memory = np.zeros((2, nbytes), dtype=np.uint8)
            for submit in (storage.submit_read, storage.submit_write):
                for ids in ([0, storage.num_blocks], [-1, 0]):
                    with pytest.raises(BlockIdError):
                        submit(np.array(ids, dtype=np.int32), memory, both)
                for rows in ([0], [0, 2], [-1, 0], [[0, 1]], [0.0, 1.0]):
                    with pytest.raises(StorageError, match="row"):
                        submit(both, memory, np.array(rows))
                wrong_memory = [memory[:, 1:], memory[0], memory.astype(np.int16), np.zeros((nbytes, 2), np.uint8).T]
                for wrong in wrong_memory if nbytes > 2 else wrong_memory[:3]:
                    with pytest.raises(StorageError, match="memory must be"):
                        submit(first, wrong, first)
            with pytest.raises(BlockIdError):
                storage.submit_write(np.array([0, 0], dtype=np.int32), memory, both)
            with pytest.raises(StorageError, match="row is given twice"):
                storage.submit_read(both, memory, np.array([1, 1], dtype=np.int32))
            memory.flags.writeable = False
            with pytest.raises(StorageError, match="must be writable"):
                storage.submit_read(first, memory, first)
            assert np.array_equal(storage.read(both), data)
            assert not memory.any()

    def test_submitted_write_forgets_the_checksum(self) -> None:
        """At once, not only when the bytes have moved."""
        with self.make_storage() as storage:
            storage.checksums[:2], storage.has_checksum[:2] = 5, True
            row = np.array([0], dtype=np.int32)
            written = storage.submit_write(np.array([1], dtype=np.int32), _bytes_for(storage, 1), row)
            assert storage.has_checksum[:2].tolist() == [True, False]
            written.result(_PATIENCE_S)

    def test_ids_and_rows_may_be_reused_after_submitting(self) -> None:
        """The storage keeps copies of its own."""
        with self.make_storage() as storage:
            data = _bytes_for(storage, 2)
            ids, rows = np.array([3, 1], dtype=np.int32), np.array([0, 1], dtype=np.int32)
            written = storage.submit_write(ids, data, rows)
            ids[:], rows[:] = 0, 1
            assert written.result(_PATIENCE_S).all()
            assert np.array_equal(storage.read(np.array([3, 1], dtype=np.int32)), data)

    def test_threads_submit_at_once(self) -> None:
        """Each its own blocks."""
        with self.make_storage() as storage:
            data = _bytes_for(storage, 4)
            is_same: list[bool] = []

            def write_and_read(i: int) -> None:
                block, row = np.array([i], dtype=np.int32), np.array([i], dtype=np.int32)
                for _ in range(20):
                    back = np.zeros((4, data.shape[1]), dtype=np.uint8)
                    is_good = storage.submit_write(block, data, row).result(_PATIENCE_S).all()
                    is_good &= storage.submit_read(block, back, row).result(_PATIENCE_S).all()
                    is_same.append(bool(is_good) and np.array_equal(back[i], data[i]))

            threads = [threading.Thread(target=write_and_read, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(_PATIENCE_S)
            assert is_same == [True] * 80


def _bytes_for(storage: Storage, n: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, storage.layout.block_nbytes), dtype=np.uint8)
