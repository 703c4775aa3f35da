"""Scrubbing and clearing a slab: every bad byte is found, and nothing changes that should not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from slab_maker import LAYOUT, SLOT_NBYTES, SLOTS, contents, fill, flip, hashes_of, make_slab

from kvbm._backend import Backend
from kvbm.errors import ConfigError, StorageError
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.storage.disk.format import HEADER_NBYTES, RECORD_NBYTES, RECORDS_AT
from kvbm.storage.disk.inspection import inspect_slab
from kvbm.storage.disk.reader import SlabName
from kvbm.storage.disk.scrub import MISMATCH, UNREADABLE, SlabScrub, clear_slab, scrub_slab


@pytest.fixture
def slab(tmp_path: Path, backend: Backend) -> SlabName:
    """Make a slab that is closed."""
    return make_slab(tmp_path / "disk", backend)


def restore(slab: SlabName) -> npt.NDArray[np.int32]:
    """Give the slots that a restart finds."""
    with DiskStorage(LAYOUT, slab.directory, fingerprint="model=tiny; layers=2") as storage:
        return np.sort(storage.inventory()[0])


@pytest.mark.parametrize("use_direct_io", [True, False])
def test_a_slab_as_it_was_written_is_all_good(slab: SlabName, backend: Backend, use_direct_io: bool) -> None:
    before = contents(slab)
    seen: list[tuple[int, int]] = []
    report = scrub_slab(
        slab, backend=backend, use_direct_io=use_direct_io, on_progress=lambda *step: seen.append(step), drop=True
    )
    assert report.is_good
    assert (report.num_blocks, report.nbytes, report.error) == (153, 153 * 4800, "")
    assert np.sum(seen, axis=0).tolist() == [153, 153 * 4800]
    assert use_direct_io or report.io_mode == "buffered"
    assert contents(slab) == before


@pytest.mark.parametrize("place", [0, 4799, 4095, 2400])
def test_a_flipped_bit_is_found_and_only_dropped_when_asked(slab: SlabName, backend: Backend, place: int) -> None:
    for slot in (5, 149, 170):
        flip(slab.directory / "rank0.blocks", slot * SLOT_NBYTES + place)
    flip(slab.directory / "rank0.blocks", 7 * SLOT_NBYTES + 4800)  # padding: nobody's byte
    flip(slab.directory / "rank0.blocks", 160 * SLOT_NBYTES)  # a free slot
    before = contents(slab)
    report = scrub_slab(slab, backend=backend)
    assert report.slots.tolist() == [5, 149, 170]
    assert report.outcomes.tolist() == [MISMATCH] * 3
    assert report.hashes.tolist() == hashes_of(200)[[5, 149, 170]].tolist()
    assert (report.num_mismatches, report.num_unreadable, report.num_dropped) == (3, 0, 0)
    assert contents(slab) == before
    assert scrub_slab(slab, backend=backend, drop=True).num_dropped == 3
    assert scrub_slab(slab, backend=backend).is_good
    assert restore(slab).tolist() == [slot for slot in SLOTS if slot not in (5, 149, 170)]


def test_blocks_that_changed_places_are_bad(slab: SlabName, backend: Backend) -> None:
    path = slab.directory / "rank0.blocks"
    data = bytearray(path.read_bytes())
    first, second = data[:SLOT_NBYTES], data[SLOT_NBYTES : 2 * SLOT_NBYTES]
    data[: 2 * SLOT_NBYTES] = second + first
    path.write_bytes(data)
    assert scrub_slab(slab, backend=backend).slots.tolist() == [0, 1]


def test_a_damaged_record_is_counted_and_dropped(slab: SlabName) -> None:
    flip(slab.directory / "rank0.index", RECORDS_AT + 9 * RECORD_NBYTES + 3)
    report = scrub_slab(slab)
    assert (report.num_blocks, report.num_damaged, report.is_good) == (152, 1, False)
    assert scrub_slab(slab, drop=True).num_dropped == 1
    assert scrub_slab(slab).is_good
    assert restore(slab).tolist() == [slot for slot in SLOTS if slot != 9]


@pytest.mark.parametrize("use_direct_io", [True, False])
def test_a_data_file_that_was_cut_off_loses_what_lay_behind(slab: SlabName, use_direct_io: bool) -> None:
    os.truncate(slab.directory / "rank0.blocks", 148 * SLOT_NBYTES + 4800)  # 148 is whole, its padding is not
    report = scrub_slab(slab, use_direct_io=use_direct_io, num_threads=1)
    assert report.slots.tolist() == [149, 170, 180, 199]
    assert report.num_unreadable == 4
    assert "slot 149: the data file ends 8192 bytes early" in report.error
    assert inspect_slab(slab).missing_nbytes == 51 * SLOT_NBYTES + SLOT_NBYTES - 4800


class FailingOs(OsCalls):
    """Refuses reads that touch some bytes, and writes."""

    def __init__(self, *, bad: range = range(0), refuses_writes: bool = False) -> None:
        self.bad, self.refuses_writes = bad, refuses_writes

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if nbytes >= SLOT_NBYTES and offset < self.bad.stop and self.bad.start < offset + nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self.refuses_writes and offset >= HEADER_NBYTES:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        if self.refuses_writes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


def test_a_block_that_cannot_be_read_is_bad_and_its_neighbours_are_not(slab: SlabName, backend: Backend) -> None:
    calls = FailingOs(bad=range(100 * SLOT_NBYTES, 102 * SLOT_NBYTES))
    with SlabScrub(slab, os_calls=calls) as scrub:
        report = scrub.run(backend=backend)
    assert report.slots.tolist() == [100, 101]
    assert report.outcomes.tolist() == [UNREADABLE] * 2
    assert report.error == "slot 100: input/output error"


def test_records_that_cannot_be_voided_are_an_error(slab: SlabName) -> None:
    flip(slab.directory / "rank0.blocks", 0)
    with (
        SlabScrub(slab, os_calls=FailingOs(refuses_writes=True)) as scrub,
        pytest.raises(StorageError, match="0 of 1 records voided, then: read-only file system") as caught,
    ):
        scrub.run(drop=True)
    assert caught.value.errno == errno.EROFS
    with (
        SlabScrub(slab, os_calls=FailingOs(refuses_writes=True)) as scrub,
        pytest.raises(StorageError, match="could not be forgotten: input/output error"),
    ):
        scrub.clear()


def test_what_was_dropped_is_on_the_medium(slab: SlabName) -> None:
    done: list[str] = []

    class Noting(OsCalls):
        def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            if offset >= RECORDS_AT:  # not the lock file's
                done.append("write")
            return super().pwritev(fd, buffers, offset)

        def fdatasync(self, fd: int) -> None:
            super().fdatasync(fd)
            done.append("sync")

    for slot in (0, 63, 64):  # records of two pages
        flip(slab.directory / "rank0.blocks", slot * SLOT_NBYTES)
    with SlabScrub(slab, os_calls=Noting()) as scrub:
        assert scrub.run(drop=True).num_dropped == 3
    assert done == ["write", "write", "sync"]


def test_who_interrupts_leaves_everything_as_it_was(slab: SlabName) -> None:
    flip(slab.directory / "rank0.blocks", 0)
    before = contents(slab)

    def interrupt(num_blocks: int, nbytes: int) -> None:
        raise KeyboardInterrupt

    with SlabScrub(slab) as scrub, pytest.raises(KeyboardInterrupt):
        scrub.run(drop=True, on_progress=interrupt)
    assert scrub.num_dropped == 0
    assert contents(slab) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-scrub"]
    assert scrub_slab(slab).num_mismatches == 1  # the lock is free again


def test_a_thread_that_fails_ends_the_scrub(slab: SlabName, backend: Backend) -> None:
    class Surprised(OsCalls):
        def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("a surprise")
            return super().preadv(fd, buffers, offset)

    with SlabScrub(slab, os_calls=Surprised()) as scrub, pytest.raises(RuntimeError, match="a surprise"):
        scrub.run(backend=backend)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-scrub"]
    with SlabScrub(slab) as scrub, pytest.raises(ConfigError, match="num_threads"):
        scrub.run(num_threads=0)


def test_a_cleared_slab_holds_nothing_and_goes_on(slab: SlabName, backend: Backend) -> None:
    assert clear_slab(slab) == 153
    report = scrub_slab(slab)
    assert (report.num_blocks, report.is_good) == (0, True)  # what was forgotten is no damage
    found = inspect_slab(slab)
    assert (found.num_blocks, found.num_damaged, found.generation, found.num_whole_headers) == (0, 0, 1, 2)
    assert not len(restore(slab))
    with DiskStorage(LAYOUT, slab.directory, fingerprint="model=tiny; layers=2") as storage:
        fill(storage, [3, 4], backend)
    assert restore(slab).tolist() == [3, 4]
