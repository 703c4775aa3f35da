"""The directory of a disk storage: made, shared with nobody, refused, and what its file is."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.errors import ConfigError, StorageError
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage, OsCalls

DIMS: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": 4, "dtype": "uint8"}
SMALL = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=12, **DIMS)  # 192 bytes in a slot of 4096
EVEN = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=256, **DIMS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def test_directory_and_files_are_the_owners_alone(directory: Path) -> None:
    with DiskStorage(SMALL, directory) as storage:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {path.name for path in directory.iterdir()} == {"rank0.blocks", "rank0.index", "rank0.lock"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
        assert storage.path.stat().st_size == 8 * 4096
        assert storage.is_sparse or storage.path.stat().st_blocks * 512 >= 8 * 4096


def test_existing_file_of_any_size_is_taken_over_and_made_private(directory: Path) -> None:
    directory.mkdir()
    for size in (0, 5, 8 * 4096, 100_000):
        path = directory / "rank0.blocks"
        path.write_bytes(b"x" * size)
        path.chmod(0o644)
        with DiskStorage(SMALL, directory) as storage:
            assert not storage.has_checksum.any()
            assert (path.stat().st_size, stat.S_IMODE(path.stat().st_mode)) == (8 * 4096, 0o600)
        assert path.exists()


def test_io_mode_is_announced_in_one_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvbm"), DiskStorage(SMALL, directory, use_direct_io=False) as storage:
        assert (storage.io_mode, storage.io_mode_reason) == ("buffered", "use_direct_io is off")
    assert [record.getMessage() for record in caplog.records if "io_mode=" in record.getMessage()] == [
        f"disk storage opened path={storage.path} nbytes=32768 io_mode=buffered reason='use_direct_io is off' "
        "is_sparse=False"
    ]


def test_second_storage_on_a_directory_is_refused_and_named(directory: Path) -> None:
    with DiskStorage(SMALL, directory):
        with pytest.raises(
            StorageError, match=f"in use by another storage of process {os.getpid()} .this one."
        ) as info:
            DiskStorage(EVEN, directory, lock_timeout_s=0)
        assert (info.value.errno, info.value.filename) == (errno.EBUSY, str(directory))
        assert not (directory / "other").exists()
    with DiskStorage(SMALL, directory):
        pass


def test_second_process_on_a_directory_is_refused_until_the_first_is_dead(directory: Path) -> None:
    code = (
        "import sys; from kvbm.layout import BlockLayout; from kvbm.storage.disk import DiskStorage\n"
        "layout = BlockLayout.fully_contiguous(num_blocks=2, num_layers=1, outer_dim=1, block_size=1, inner_dim=1,"
        " dtype='uint8')\n"
        "storage = DiskStorage(layout, sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            with pytest.raises(StorageError, match=f"another storage of process {child.pid}: give each"):
                DiskStorage(SMALL, directory, lock_timeout_s=0)
        finally:
            child.kill()
    DiskStorage(SMALL, directory, on_mismatch="replace").close()


def test_lock_file_that_was_replaced_is_taken_anew(directory: Path) -> None:
    class Replaced(OsCalls):
        num_locks = 0

        def lock(self, fd: int) -> None:
            super().lock(fd)
            self.num_locks += 1
            if self.num_locks == 1:
                (directory / "rank0.lock").unlink()

    calls = Replaced()
    with DiskStorage(SMALL, directory, os_calls=calls):
        assert calls.num_locks == 2
        with pytest.raises(StorageError, match="in use"):
            DiskStorage(SMALL, directory, lock_timeout_s=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # 3.12 warns of forking with threads
def test_forked_child_is_refused_and_gives_nothing_free(directory: Path) -> None:
    with DiskStorage(SMALL, directory) as storage:
        storage.write(ids(0), np.zeros((1, 192), dtype=np.uint8))
        child = os.fork()
        if child == 0:
            try:
                storage.read(ids(0))
            except StorageError as error:
                storage.close()
                os._exit(7 if "a forked process must open its own directory" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with pytest.raises(StorageError, match="in use"):
            DiskStorage(SMALL, directory, lock_timeout_s=0)
        storage.read(ids(0))


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the parent of the directory does not exist: make it first") as info:
        DiskStorage(SMALL, tmp_path / "no" / "disk")
    assert info.value.errno == errno.ENOENT
    assert not list(tmp_path.iterdir())


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("mine")
    with pytest.raises(StorageError, match=r"not a directory\): give a real directory"):
        DiskStorage(SMALL, tmp_path / "disk")
    assert (tmp_path / "disk").read_text() == "mine"


@pytest.mark.parametrize("slash", ["", "/"])
def test_symbolic_link_to_a_directory_is_not_followed(tmp_path: Path, slash: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StorageError, match="a symbolic link, and links are not followed"):
        DiskStorage(SMALL, f"{tmp_path / 'link'}{slash}")
    assert not list((tmp_path / "real").iterdir())


@pytest.mark.parametrize("name", ["rank0.blocks", "rank0.index", "rank0.lock"])
def test_symbolic_link_as_file_is_not_followed(tmp_path: Path, directory: Path, name: str) -> None:
    directory.mkdir()
    (tmp_path / "precious").write_text("mine")
    (directory / name).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="a symbolic link, and links are not followed"):
        DiskStorage(SMALL, directory)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (directory / name).is_symlink()


def test_something_else_in_place_of_the_file_is_refused(directory: Path) -> None:
    directory.mkdir()
    os.mkfifo(directory / "rank0.blocks")
    with pytest.raises(StorageError, match="this is no regular file"):
        DiskStorage(SMALL, directory)
    (directory / "rank0.blocks").unlink()
    (directory / "rank0.blocks").mkdir()
    with pytest.raises(StorageError, match="is a directory"):
        DiskStorage(SMALL, directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o500)
    with pytest.raises(StorageError, match="this user cannot write here"):
        DiskStorage(SMALL, directory)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_refusal_to_make_a_file_is_explained(directory: Path, code: int) -> None:
    class ReadOnly(OsCalls):
        def open(self, path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                raise OSError(code, os.strerror(code))
            return super().open(path, flags, mode, dir_fd=dir_fd)

    with pytest.raises(
        StorageError, match=r"this user cannot write here \(.*\): give a directory it can write"
    ) as info:
        DiskStorage(SMALL, directory, os_calls=ReadOnly())
    assert info.value.errno == code
    assert not directory.exists()


def test_directory_that_others_can_write_is_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    DiskStorage(SMALL, directory).close()
    assert "writable by other users" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"num_threads": 0}, {"max_queued_nbytes": 0}] + [{"name": name} for name in ("", ".", "..", "a/b", "/a", "a\0b")],
)
def test_impossible_settings_are_refused_and_nothing_is_made(directory: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DiskStorage(SMALL, directory, **wrong)
    assert not directory.exists()


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_impossible_directory_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="give the path of a directory"):
        DiskStorage(SMALL, path)


def test_relative_directory_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with DiskStorage(SMALL, "disk") as storage:
        assert storage.path == tmp_path / "disk" / "rank0.blocks"
