"""Looking into a slab: what is there is counted, beside an owner too, and nothing changes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slab_maker import LAYOUT, SLOT_NBYTES, contents, fill, flip, hashes_of, make_slab

from kvbm._backend import Backend
from kvbm.errors import SlabFormatError, StorageError
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.storage.disk.format import HEADER_NBYTES, RECORD_NBYTES, RECORDS_AT
from kvbm.storage.disk.inspection import count_ages, inspect_slab
from kvbm.storage.disk.reader import SlabName, SlabReader, find_slabs
from kvbm.storage.disk.scrub import SlabScrub, scrub_slab

HELD = """
import sys
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage
layout = BlockLayout.fully_contiguous(
    num_blocks=200, num_layers=2, outer_dim=2, block_size=4, inner_dim=300, dtype="uint8"
)
with DiskStorage(layout, sys.argv[1], fingerprint="model=tiny; layers=2"):
    print("held", flush=True)
    sys.stdin.read()
"""
TAKEN = """
import sys
from kvbm.storage.disk.reader import find_slabs
from kvbm.storage.disk.scrub import SlabScrub
SlabScrub(find_slabs(sys.argv[1])[0], lock_timeout_s=0)
"""


@pytest.fixture
def slab(tmp_path: Path, backend: Backend) -> SlabName:
    """Make a slab that is closed."""
    return make_slab(tmp_path / "disk", backend)


def test_looking_leaves_nothing_behind(slab: SlabName) -> None:
    (slab.directory / "rank0.lock").unlink()
    assert inspect_slab(slab).num_blocks == 153
    assert sorted(path.name for path in slab.directory.iterdir()) == ["rank0.blocks", "rank0.index"]


def test_a_held_slab_is_refused_with_its_holder_and_looked_into_beside_it(slab: SlabName) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HELD, str(slab.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline() == "held\n"
        before = contents(slab)
        found = inspect_slab(slab)
        assert (found.is_held, found.holder, found.num_blocks) == (True, child.pid, 153)
        with pytest.raises(StorageError, match=f"held by process {child.pid}: stop it first") as caught:
            SlabScrub(slab, lock_timeout_s=0)
        assert caught.value.errno == errno.EBUSY
        assert contents(slab) == before
    finally:
        child.stdin.close()
        assert child.wait(60) == 0
        child.stdout.close()
    assert not inspect_slab(slab).is_held


def test_a_slab_of_this_process_stays_held_when_it_is_looked_into(slab: SlabName) -> None:
    with DiskStorage(LAYOUT, slab.directory, fingerprint="model=tiny; layers=2"):
        assert inspect_slab(slab).holder == os.getpid()
        with pytest.raises(StorageError, match=f"held by process {os.getpid()}"):
            SlabScrub(slab, lock_timeout_s=0)
        # Closing a lock file gives its lock up, so another process must still be refused.
        done = subprocess.run(
            [sys.executable, "-c", TAKEN, str(slab.directory)], capture_output=True, text=True, check=False, timeout=60
        )
        assert f"held by process {os.getpid()}" in done.stderr


def test_links_are_not_followed(slab: SlabName, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(slab.directory)
    for path in (link, link / "rank0.index"):
        with pytest.raises(StorageError, match="a symbolic link, and links are not followed"):
            inspect_slab(find_slabs(path)[0])
    for name in ("index", "blocks"):
        real, moved = slab.directory / f"rank0.{name}", tmp_path / name
        real.rename(moved)
        real.symlink_to(moved)
        with pytest.raises(StorageError, match="a symbolic link, and links are not followed"):
            scrub_slab(slab)
        real.unlink()
        moved.rename(real)
    assert scrub_slab(slab).is_good


def test_what_is_no_slab_says_so(slab: SlabName, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no slab is here, it has no file NAME\.index"):
        find_slabs(tmp_path)
    with pytest.raises(StorageError, match="no slab rank7 is here, it has rank0"):
        find_slabs(slab.directory, "rank7")
    with pytest.raises(StorageError, match=r"neither a directory nor the \.index file"):
        find_slabs(slab.directory / "rank0.blocks")
    with pytest.raises(StorageError, match="no such file or directory"):
        find_slabs(tmp_path / "absent")
    (slab.directory / "rank1.index").touch()
    os.mkfifo(slab.directory / "rank2.index")
    assert [name.name for name in find_slabs(slab.directory)] == ["rank0", "rank1", "rank2"]
    assert inspect_slab(SlabName(slab.directory, "rank1")).problem == "this slab has no header yet: it is empty"
    with pytest.raises(StorageError, match="no regular file"):
        inspect_slab(SlabName(slab.directory, "rank2"))
    with pytest.raises(StorageError, match="no such file"):
        SlabScrub(SlabName(slab.directory, "rank9"))
    assert not (slab.directory / "rank9.lock").exists()


@pytest.mark.parametrize("copy", [0, 1])
def test_one_copy_of_the_header_is_enough(slab: SlabName, copy: int) -> None:
    flip(slab.directory / "rank0.index", copy * HEADER_NBYTES + 100)
    found = inspect_slab(slab)
    assert (found.num_whole_headers, found.num_blocks) == (1, 153)
    assert scrub_slab(slab).is_good
    flip(slab.directory / "rank0.index", (1 - copy) * HEADER_NBYTES + 100)
    found = inspect_slab(slab)
    assert "header is damaged: its CRC does not hold" in found.problem
    with pytest.raises(SlabFormatError, match="CRC does not hold"):
        scrub_slab(slab)


def test_inspection_counts_what_is_there(tmp_path: Path, backend: Backend) -> None:
    hashes = hashes_of(200)
    with DiskStorage(LAYOUT, tmp_path / "disk", fingerprint="model=tiny; layers=2", name="r1") as storage:
        parents = np.zeros((20, 2), dtype=np.uint64)
        parents[1:9] = hashes[:8]  # a chain of 9, ten that stand alone, and one whose parent is elsewhere
        parents[19] = hashes[150]
        priorities = np.array([10] * 5 + [50] * 15, dtype=np.uint8)
        fill(storage, range(20), backend, parents=parents, priorities=priorities)
        (written,) = set(storage._slab.index.live()[1]["written_at"].tolist())
        storage.record(np.array([30]), hashes=hashes[:1], checksums=np.zeros(1, dtype=np.uint64))  # 0 once more
    flip(tmp_path / "disk" / "r1.index", RECORDS_AT + 19 * RECORD_NBYTES)
    found = inspect_slab(SlabName(tmp_path / "disk", "r1"), now=written + 700)
    assert (found.num_blocks, found.num_duplicates, found.num_damaged, found.num_headless) == (19, 1, 1, 0)
    assert found.occupancy == 0.1
    assert found.fingerprint == ("model=tiny", "layers=2")
    assert found.priorities == {10: 5, 50: 15}
    assert found.chains == {"1": 10, "8-15": 1}
    assert {name: n for name, n in found.written.items() if n} == {"under 1 hour": 20}
    assert (found.data_nbytes, found.index_nbytes) == (200 * SLOT_NBYTES, RECORDS_AT + 200 * RECORD_NBYTES)
    assert (found.missing_nbytes, found.num_slots, found.slot_nbytes) == (0, 200, SLOT_NBYTES)
    flip(tmp_path / "disk" / "r1.index", RECORDS_AT + 19 * RECORD_NBYTES)
    assert inspect_slab(SlabName(tmp_path / "disk", "r1")).num_headless == 1


def test_ages_are_counted_by_their_bounds() -> None:
    ages = np.array([-5.0, -0.5, 0, 59, 60, 3600, 86400 * 29, 86400 * 31])
    assert count_ages(ages) == {
        **{"under 1 minute": 3, "under 10 minutes": 1, "under 1 hour": 0, "under 6 hours": 1, "under 1 day": 0},
        **{"under 7 days": 0, "under 30 days": 1, "older": 1, "in the future": 1},
    }


def test_a_record_caught_half_written_is_read_again(slab: SlabName) -> None:
    class Torn(OsCalls):
        num_torn = 0

        def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            count = super().preadv(fd, buffers, offset)
            if offset == RECORDS_AT and not self.num_torn:
                self.num_torn += 1
                memoryview(buffers[0])[10] ^= 1
            return count

    with SlabReader(slab, os_calls=Torn()) as reader:
        _, is_live, is_damaged = reader.read_records()
    assert (np.count_nonzero(is_live), np.count_nonzero(is_damaged)) == (153, 0)
