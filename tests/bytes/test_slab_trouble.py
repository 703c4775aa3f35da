"""A manager whose disk tier goes bad while it runs: dropped or shortened and counted, and it lives on."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tier_site import PATIENCE_S, GatedExecutor, Site, Tiers, disk_layout, names, open_files

from kvbm._backend import Backend
from kvbm.errors import StorageError
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.calls import OsCalls
from kvbm.types import Tier


class FaultyOs(OsCalls):
    """Asks `fault(verb, fd)` before each call that moves bytes or syncs: an error to raise, or None."""

    def __init__(self) -> None:
        self.fault: Callable[[str, int], OSError | None] = lambda verb, fd: None
        self.step = 0  # of a short transfer, bytes; 0: all

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._ask("read", fd)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._ask("write", fd)
        if self.step and memoryview(buffers[0]).nbytes > self.step:
            buffers = [memoryview(buffers[0]).cast("B")[: self.step]]
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._ask("sync", fd)
        super().fdatasync(fd)

    def _ask(self, verb: str, fd: int) -> None:
        error = self.fault(verb, fd)
        if error is not None:
            raise error


class Trouble:
    """A manager over a disk tier whose system may fail."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self.folder, self.backend = folder, backend
        self.path = folder / "slab"
        self.site = Site(folder, backend)
        self.calls = FaultyOs()
        self.storage: Any = None

    def open(self, *, num_blocks: int = 64, **arguments: Any) -> Tiers:
        self.calls = FaultyOs()
        self.storage = DiskStorage(disk_layout(num_blocks), self.path, os_calls=self.calls, **arguments)
        return self.site(device=32, storages={Tier.DISK: self.storage})

    def fail(self, code: int, *verbs: str, is_index: bool | None = None) -> None:
        """Answer these calls with an error from now on, on one of the files or both."""

        def fault(verb: str, fd: int) -> OSError | None:
            is_hit = verb in verbs and is_index in (None, fd == self.storage._slab.files.index_fd)
            return OSError(code, os.strerror(code)) if is_hit else None

        self.calls.fault = fault

    def heal(self) -> None:
        self.calls.fault = lambda verb, fd: None


@pytest.fixture
def trouble(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    monkeypatch.setattr("kvbm.assembly.Executor", GatedExecutor)
    before = set(threading.enumerate())
    trouble = Trouble(tmp_path, backend)
    yield trouble
    trouble.heal()
    for manager in trouble.site.managers:
        manager.close()
        manager.check()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} is left"
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_writes_that_are_refused_are_dropped_and_later_ones_arrive(trouble: Trouble, code: int) -> None:
    tiers = trouble.open()
    before, lost, after = names(4), names(4), names(4)
    tiers.put(before)
    tiers.manager.flush(PATIENCE_S)
    trouble.fail(code, "write", "sync")
    tiers.put(lost)
    tiers.see_idle()
    assert tiers.lies("disk", lost) == [False] * 4
    assert tiers.route("device-disk").dropped["failed"] == 4
    tiers.evict("device")
    assert [tiers.num_hit(lost), tiers.num_hit(before)] == [0, 4]
    trouble.heal()
    tiers.put(after)
    tiers.see_idle()
    tiers.manager.close()
    tiers = trouble.open()
    assert [tiers.num_hit(hashes) for hashes in (before, lost, after)] == [4, 0, 4]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("verb", ["write", "sync"])
def test_an_index_that_is_refused_costs_the_warm_start_and_nothing_now(trouble: Trouble, verb: str, code: int) -> None:
    tiers = trouble.open(sync_interval_s=3600)
    trouble.fail(code, verb, is_index=True)
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 4
    trouble.storage.sync()
    assert trouble.storage._slab.index.num_failures > 0
    trouble.heal()
    trouble.storage.sync()
    tiers.manager.close()
    assert trouble.open().num_hit(hashes) == 4, "written once it could be"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("verb", ["write", "sync"])
@pytest.mark.parametrize("how", ["reset_blocks", "reset_pool"])
def test_a_reset_that_cannot_be_written_raises_until_it_can(trouble: Trouble, how: str, verb: str, code: int) -> None:
    tiers = trouble.open(sync_interval_s=3600)
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    reset = {
        "reset_blocks": lambda: tiers.manager.reset_blocks("disk", hashes),
        "reset_pool": lambda: tiers.manager.reset_pool("disk"),
    }[how]
    trouble.fail(code, verb, is_index=True)
    for _ in range(2):
        with pytest.raises(StorageError, match=f"a restart may find them: .*{os.strerror(code)}"):
            reset()
        assert tiers.lies("disk", hashes) == [False] * 4
    trouble.heal()
    reset()
    tiers.see_idle()
    tiers.manager.close()
    assert trouble.open().lies("disk", hashes) == [False] * 4


def test_short_and_interrupted_calls_change_nothing(trouble: Trouble) -> None:
    tiers = trouble.open(use_direct_io=False)
    trouble.calls.step = 97
    turns = iter(range(10**9))
    trouble.calls.fault = lambda verb, fd: InterruptedError() if next(turns) % 3 else None
    hashes = names(6)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.reset_blocks("disk", hashes[4:])
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 4
    trouble.calls.step = 0
    tiers.see_idle()
    tiers.manager.close()
    assert trouble.open().num_hit(hashes) == 4


def test_a_directory_that_is_removed_is_missed_only_by_the_next_start(trouble: Trouble) -> None:
    tiers = trouble.open()
    hashes, more = names(4), names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    shutil.rmtree(trouble.path)
    tiers.put(more)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert [tiers.num_hit(hashes), tiers.num_hit(more)] == [4, 4]
    tiers.manager.reset_blocks("disk", more)
    tiers.see_idle()
    tiers.manager.close()
    assert trouble.open().lies("disk", hashes) == [False] * 4


@pytest.mark.parametrize("direct_io", [True, False])
def test_files_cut_short_under_us_shorten_hits_and_work_again(trouble: Trouble, direct_io: bool) -> None:
    tiers = trouble.open(use_direct_io=direct_io)
    hashes, more = names(8), names(8)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    slots = tiers.pool("disk").lookup(hashes).tolist()
    assert slots == sorted(slots)
    os.truncate(trouble.path / "rank0.blocks", (slots[3] * 4096) + 100)
    os.truncate(trouble.path / "rank0.index", 5000)
    assert tiers.num_hit(hashes) == 3
    tiers.settle()
    assert tiers.num_hit(hashes) == 3
    tiers.put(more)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("device")
    assert tiers.num_hit(more) >= 7, "without direct I/O the last slot of the file may lack its padding"
    tiers.see_idle()
    tiers.manager.close()
    tiers = trouble.open(use_direct_io=direct_io)
    assert tiers.num_hit(more) in range(9)
    assert tiers.num_hit(hashes) in range(4)
    tiers.see_idle()
