"""A slab belongs to one storage, from the lock to the close: no other, no child and no late call changes its files."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_native import KINDS, PATIENCE_S

from kvbm._backend import load_backend
from kvbm.errors import ConfigError, StorageError
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage, OsCalls

IDS, NAME, SUM = np.array([1], dtype=np.int32), np.array([[7, 8]], dtype=np.uint64), np.array([9], dtype=np.uint64)
PRECIOUS = b"precious" * 4096

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # 3.12 warns of forking with threads
]


def layout(num_blocks: int = 4) -> BlockLayout:
    return BlockLayout.fully_contiguous(
        num_blocks=num_blocks, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    )


@pytest.fixture(params=["python", *KINDS])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Give each engine that works here."""
    return {"engine": request.param, "backend": load_backend("native" if request.param in KINDS else "pure")}


def keep(storage: DiskStorage, num_blocks: int = 1) -> None:
    """Write and record blocks."""
    ids = IDS if num_blocks == 1 else np.arange(num_blocks, dtype=np.int32)
    names = NAME if num_blocks == 1 else np.stack([ids + 1, ids + 1], axis=1).astype(np.uint64)
    memory = np.zeros((num_blocks, storage.layout.block_nbytes), dtype=np.uint8)
    rows = np.arange(num_blocks, dtype=np.int32)
    assert storage.submit_write(ids, memory, rows, hashes=names).result(PATIENCE_S).all()
    storage.record(ids, hashes=names, checksums=np.full(num_blocks, 9, dtype=np.uint64))


CHANGES: dict[str, Callable[[DiskStorage], object]] = {
    "record": lambda storage: storage.record(IDS, hashes=NAME, checksums=SUM),
    "forget": lambda storage: storage.forget(NAME),
    "clear": lambda storage: storage.clear(),
    "disown": lambda storage: storage.disown(IDS, NAME),
    "touch": lambda storage: (storage.touch(IDS, NAME, np.array([50], dtype=np.uint8)), storage.sync()),
}


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Callable[[], list[Any]]]:
    """Give what opens files of somebody else, which get the lowest free descriptors, and look at them at the end."""
    files: list[Any] = []

    def open_them() -> list[Any]:
        for i in range(8):
            files.append((tmp_path / f"victim{i}").open("w+b"))
            files[-1].write(PRECIOUS)
            files[-1].flush()
        return files

    yield open_them
    assert files, "there were some"
    for file in files:
        file.seek(0)
        assert file.read() == PRECIOUS
        file.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_closed_storage_writes_into_no_other_file(
    tmp_path: Path, victims: Callable[[], list[Any]], engine: dict[str, Any], change: str
) -> None:
    storage = DiskStorage(layout(), tmp_path / "d", **engine)
    keep(storage)
    storage.close()
    victims()
    is_refusal = change in ("forget", "clear")  # a restart could still find it
    with pytest.raises(OSError, match="Bad file descriptor") if is_refusal else contextlib.nullcontext():
        CHANGES[change](storage)


@pytest.mark.parametrize("change", CHANGES)
def test_a_forked_child_cannot_change_the_records_of_its_parent(
    tmp_path: Path, engine: dict[str, Any], change: str
) -> None:
    storage = DiskStorage(layout(), tmp_path / "d", sync_interval_s=3600.0, **engine)
    keep(storage)
    before = (tmp_path / "d" / "rank0.index").read_bytes()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            CHANGES[change](storage)
        except StorageError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "it is refused"
    assert (tmp_path / "d" / "rank0.index").read_bytes() == before
    storage.close()


def test_who_fails_to_lock_leaves_the_lock_of_its_owner(tmp_path: Path) -> None:
    owners: list[DiskStorage] = []

    class Late(OsCalls):
        def mkdir(self, path: Path, mode: int) -> None:
            super().mkdir(path, mode)
            owners.append(DiskStorage(layout(), path, engine="python"))  # another one is quicker

    with pytest.raises(StorageError, match="in use by"):
        DiskStorage(layout(), tmp_path / "d", os_calls=Late(), lock_timeout_s=0.0)
    assert (tmp_path / "d" / "rank0.lock").exists()
    with pytest.raises(StorageError, match="in use by"):
        DiskStorage(layout(), tmp_path / "d", engine="python", lock_timeout_s=0.0)
    owners[0].close()


def test_a_storage_may_be_collected_while_another_takes_its_lock(tmp_path: Path) -> None:
    """A finaliser runs in any thread at any moment, also where that thread looks after locks."""
    are_collected: list[int] = []

    class Collecting(OsCalls):
        def lock(self, fd: int) -> None:
            are_collected.append(gc.collect())
            super().lock(fd)

    def work() -> None:
        dropped = DiskStorage(layout(), tmp_path / "a", engine="python")
        dropped.me = dropped  # type: ignore[attr-defined]  # a cycle: only the collector finds it
        del dropped
        DiskStorage(layout(), tmp_path / "b", os_calls=Collecting()).close()

    gc.disable()
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
    finally:
        gc.enable()
    assert not thread.is_alive(), "it waits for itself"
    assert are_collected
    DiskStorage(layout(), tmp_path / "a", engine="python", lock_timeout_s=0.0).close()


@pytest.mark.parametrize("setting", ["threads", "uring", "nonsense"])
def test_an_engine_that_cannot_be_had_leaves_no_files(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError):
        DiskStorage(layout(), tmp_path / "d", engine=setting, backend=load_backend("pure"))
    assert not (tmp_path / "d").exists()


def test_an_opening_that_fails_keeps_every_block_of_a_longer_slab(tmp_path: Path) -> None:
    class NoSync(OsCalls):
        def fdatasync(self, fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with DiskStorage(layout(64), tmp_path / "d", engine="python") as storage:
        keep(storage, 64)
    with pytest.raises(StorageError):
        DiskStorage(layout(8), tmp_path / "d", os_calls=NoSync())
    with DiskStorage(layout(64), tmp_path / "d", engine="python") as storage:
        assert len(storage.inventory()[0]) == 64


def test_killed_between_the_new_name_and_the_cut_a_slab_serves_nothing_of_the_old(tmp_path: Path) -> None:
    class Killed(OsCalls):
        def ftruncate(self, fd: int, nbytes: int) -> None:
            if nbytes:
                os._exit(9)
            super().ftruncate(fd, nbytes)

    with DiskStorage(layout(64), tmp_path / "d", engine="python", fingerprint="old weights") as storage:
        keep(storage, 64)
    renamed: dict[str, Any] = {"fingerprint": "new weights", "on_mismatch": "replace"}
    pid = os.fork()
    if not pid:
        try:
            DiskStorage(layout(8), tmp_path / "d", os_calls=Killed(), **renamed)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with DiskStorage(layout(64), tmp_path / "d", engine="python", **renamed) as storage:
        assert len(storage.inventory()[0]) == 0
