"""The disk tier on real file systems: in memory, on an overlay, full, and read-only in the middle of it all."""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_systems import Mounts
from tier_site import PATIENCE_S, Site, Tiers, disk_layout, names, open_files

from kvbm._backend import Backend
from kvbm.errors import StorageError
from kvbm.storage.disk import DiskStorage
from kvbm.types import Tier


class Place:
    """Managers whose disk tier lies on a file system of its own."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self.mounts = Mounts(folder)
        self.backend = backend
        self.site = Site(folder, backend)
        self.storage: Any = None

    def open(self, path: Path, *, num_blocks: int = 32, **arguments: Any) -> Tiers:
        self.storage = DiskStorage(disk_layout(num_blocks), path / "slab", backend=self.backend, **arguments)
        return self.site(device=32, storages={Tier.DISK: self.storage})


@pytest.fixture
def place(tmp_path: Path, backend: Backend) -> Iterator[Place]:
    before = set(threading.enumerate())
    place = Place(tmp_path, backend)
    try:
        yield place
        for manager in place.site.managers:
            manager.close()
            manager.check()
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"{thread.name} is left"
        assert open_files(tmp_path) == []
    finally:
        for manager in place.site.managers:
            manager.close(PATIENCE_S)
        gc.collect()
        place.mounts.close()


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_blocks_go_down_come_back_and_outlive_the_manager(place: Place, kind: str) -> None:
    path = place.mounts.tmpfs(1 << 20) if kind == "tmpfs" else place.mounts.overlay()
    tiers = place.open(path)
    assert place.storage.io_mode in ("direct", "buffered")
    assert place.storage.io_mode_reason
    hashes = names(8)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 8
    tiers.manager.reset_blocks("disk", hashes[6:])
    tiers.see_idle()
    tiers.manager.close()
    tiers = place.open(path)
    assert tiers.num_hit(hashes) == 6, "warm, but for what was forgotten"
    tiers.see_idle()


def test_a_slab_that_does_not_fit_into_memory_is_refused_and_leaves_nothing(place: Place) -> None:
    path = place.mounts.tmpfs(256 << 10)
    with pytest.raises(StorageError, match=r"need \d+ bytes, have \d+ free: give fewer blocks") as refusal:
        place.open(path, num_blocks=1 << 10)
    assert refusal.value.errno == errno.ENOSPC
    assert list(path.iterdir()) == []
    place.open(path, num_blocks=8)


def test_a_file_system_that_turns_read_only_costs_offloads_and_never_a_wrong_byte(place: Place) -> None:
    path, trigger = place.mounts.ext4(16 << 20)
    tiers = place.open(path)
    before, lost = names(6), names(6)
    tiers.put(before)
    tiers.see_idle()
    trigger.write_text("1")
    with pytest.raises(OSError, match="Read-only") as refusal:
        (path / "another").touch()
    assert refusal.value.errno == errno.EROFS
    tiers.put(lost)
    tiers.see_idle()
    tiers.evict("device")
    assert tiers.num_hit(before) == 6, "what can be read is"
    route, num_below = tiers.route("device-disk"), sum(tiers.lies("disk", lost))
    assert route.dropped["failed"] == 6 - num_below
    assert tiers.num_hit(lost) in range(num_below + 1)
    with pytest.raises(StorageError, match="a restart may find them"):
        tiers.manager.reset_blocks("disk", before)
    assert tiers.lies("disk", before) == [False] * 6, "it is forgotten here, whatever the disk says"
    fresh = names(4)
    tiers.put(fresh)
    tiers.see_idle()
    assert tiers.num_hit(fresh) == 4, "the tiers above work as ever"
    with pytest.raises(StorageError):
        place.open(path, lock_timeout_s=0.0)


def test_a_slab_on_a_read_only_file_system_is_refused_with_what_to_do(place: Place) -> None:
    path, trigger = place.mounts.ext4(16 << 20)
    tiers = place.open(path)
    tiers.put(names(4))
    tiers.see_idle()
    tiers.manager.close()
    trigger.write_text("1")
    with pytest.raises(StorageError, match=r"this user cannot write here \(read-only file system\)") as refusal:
        place.open(path)
    assert refusal.value.errno == errno.EROFS
