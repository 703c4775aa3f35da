"""The disk storage on an operating system that fails: a False in the mask or an error, never wrong bytes, no hang."""

from __future__ import annotations

import errno
import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import StorageError
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage, OsCalls

DIMS: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": 4, "dtype": "uint8"}
EVEN = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=512, **DIMS)  # 8192 bytes, two pages
ODD = BlockLayout.fully_contiguous(num_blocks=8, inner_dim=300, **DIMS)  # 4800 bytes in a slot of 8192
PATIENCE_S = 60
SLOT_NBYTES = 8192

Move = Callable[[], int]


class FaultyOs(OsCalls):
    """Asks `fault(verb, offset, nbytes)` before each positional call: an error to raise, or how many bytes to move."""

    def __init__(self) -> None:
        self.fault: Callable[[str, int, int], BaseException | int | None] = lambda verb, offset, nbytes: None

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return self._move("read", super().preadv, fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return self._move("write", super().pwritev, fd, buffers, offset)

    def _move(self, verb: str, call: Callable[..., int], fd: int, buffers: Sequence[Any], offset: int) -> int:
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        answer = self.fault(verb, offset, nbytes)
        if isinstance(answer, BaseException):
            raise answer
        if answer is None or answer >= nbytes:
            return call(fd, buffers, offset)
        whole = answer // 4096 * 4096  # as far as direct I/O can really go; the rest is only claimed
        if whole:
            call(fd, [np.frombuffer(memoryview(buffers[0]).cast("B"), np.uint8)[:whole]], offset)
            return min(answer, memoryview(buffers[0]).nbytes)
        return answer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def calls() -> FaultyOs:
    return FaultyOs()


@pytest.fixture(params=["direct", "buffered"])
def storage(request: pytest.FixtureRequest, directory: Path, calls: FaultyOs) -> Any:
    with DiskStorage(EVEN, directory, os_calls=calls, use_direct_io=request.param == "direct") as storage:
        yield storage


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


ALL = np.arange(8, dtype=np.int32)


def content(seed: int, num_blocks: int = 8, nbytes: int = 8192) -> npt.NDArray[np.uint8]:
    raw = np.empty(num_blocks * nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    data = raw[start : start + num_blocks * nbytes].reshape(num_blocks, nbytes)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.shape, dtype=np.uint8)
    return data


def touches(block: int, offset: int, nbytes: int) -> bool:
    return offset < (block + 1) * SLOT_NBYTES and offset + nbytes > block * SLOT_NBYTES


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_error_spoils_only_the_block_that_has_it(
    storage: DiskStorage, calls: FaultyOs, caplog: pytest.LogCaptureFixture, code: int, verb: str
) -> None:
    data, back = content(1), content(2)
    storage.write(ALL, content(3))
    if verb == "read":
        storage.write(ALL, data)

    def fault(kind: str, offset: int, nbytes: int) -> BaseException | None:
        return OSError(code, os.strerror(code)) if kind == verb and touches(5, offset, nbytes) else None

    calls.fault = fault
    submit, memory = (storage.submit_read, back) if verb == "read" else (storage.submit_write, data)
    for _ in range(2):
        transfer = submit(ALL, memory, ALL)
        assert transfer.result(PATIENCE_S).tolist() == [True] * 5 + [False] + [True] * 2
        assert not transfer.is_draining
    with pytest.raises(StorageError, match=f"could not {verb} 1 of 2 blocks .5.") as info:
        storage.read(ids(5, 6)) if verb == "read" else storage.write(ids(5, 6), data[5:7])
    assert (info.value.errno, info.value.filename) == (code, str(storage.path))
    calls.fault = lambda verb, offset, nbytes: None
    good = ALL != 5
    assert np.array_equal(storage.read(ALL[good]), data[good])
    if verb == "read":
        assert np.array_equal(back[good], data[good])
    assert storage.counters.num_failures == 3
    assert f"could not {verb} block 5 of {storage.path}" in storage.counters.last_error
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, "each errno is announced once"


def test_interrupted_calls_are_made_again(storage: DiskStorage, calls: FaultyOs) -> None:
    rng = random.Random(1)
    calls.fault = lambda verb, offset, nbytes: InterruptedError() if rng.random() < 0.7 else None
    data = content(1)
    storage.write(ALL, data)
    assert np.array_equal(storage.read(ALL), data)
    assert storage.counters.num_failures == 0


@pytest.mark.parametrize("num_moved", [4096, 4097, 8192, 8193, 12288, 20000, 65535])
def test_short_transfers_are_completed(storage: DiskStorage, calls: FaultyOs, num_moved: int) -> None:
    calls.fault = lambda verb, offset, nbytes: num_moved
    data = content(1)
    if storage.io_mode == "buffered":
        num_moved = num_moved // 4096 * 4096  # what is claimed here has moved
    storage.write(ALL, data)
    assert np.array_equal(storage.read(ALL), data)
    storage.write(ALL[::-1].copy(), data)
    assert np.array_equal(storage.read(ALL[::-1].copy()), data)


@pytest.mark.parametrize("num_moved", [0, 1, 4095])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_transfer_that_gets_no_further_fails(directory: Path, calls: FaultyOs, verb: str, num_moved: int) -> None:
    with DiskStorage(EVEN, directory, os_calls=calls) as storage:
        if storage.io_mode != "direct" and num_moved:
            pytest.skip("without direct I/O a single byte is a step")
        calls.fault = lambda kind, offset, nbytes: num_moved if kind == verb and offset >= 3 * SLOT_NBYTES else None
        submit = storage.submit_read if verb == "read" else storage.submit_write
        memory = content(1)
        assert submit(ids(1, 2, 4), memory, ids(0, 1, 2)).result(PATIENCE_S).tolist() == [True, True, False]
        assert "ended 8192 of 8192 bytes short" in storage.counters.last_error


def test_file_that_somebody_cut_short_fails_and_never_hangs(storage: DiskStorage) -> None:
    storage.write(ALL, content(1))
    os.truncate(storage.path, 3 * SLOT_NBYTES)
    good = storage.submit_read(ALL, content(2), ALL).result(PATIENCE_S)
    assert good.tolist() == [True] * 3 + [False] * 5


def test_surprise_in_a_worker_is_a_failure_and_the_storage_goes_on(
    storage: DiskStorage, calls: FaultyOs, caplog: pytest.LogCaptureFixture
) -> None:
    calls.fault = lambda verb, offset, nbytes: RuntimeError("a bug")
    assert not storage.submit_write(ALL, content(1), ALL).result(PATIENCE_S).any()
    assert "RuntimeError: a bug" in storage.counters.last_error
    assert "a bug" in caplog.text
    calls.fault = lambda verb, offset, nbytes: None
    storage.write(ALL, content(1))
    assert np.array_equal(storage.read(ALL), content(1))


# -- opening ---------------------------------------------------------------------------------------------------


class NoDirect(OsCalls):
    def open(self, path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().open(path, flags, mode, dir_fd=dir_fd)


class DirectOnlyInName(OsCalls):
    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if memoryview(buffers[0]).nbytes == 4096:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().preadv(fd, buffers, offset)


class LyingProbe(OsCalls):
    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        nbytes = memoryview(buffers[0]).nbytes
        return nbytes if nbytes == 4096 else super().pwritev(fd, buffers, offset)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoDirect, "Invalid argument"),
        (DirectOnlyInName, "Invalid argument"),
        (LyingProbe, "the probe did not come back as written"),
    ],
)
def test_without_direct_io_it_falls_back_and_says_why(
    directory: Path, caplog: pytest.LogCaptureFixture, kind: type[OsCalls], reason: str
) -> None:
    caplog.set_level(logging.INFO, "kvbm")
    with DiskStorage(EVEN, directory, os_calls=kind()) as storage:
        assert (storage.io_mode, storage.io_mode_reason) == ("buffered", f"direct I/O failed in a probe: {reason}")
        assert f"io_mode=buffered reason='direct I/O failed in a probe: {reason}'" in caplog.text
        storage.write(ALL, content(1))
        assert np.array_equal(storage.read(ALL), content(1))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_preallocation_the_file_is_sparse_and_said_so(
    directory: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    class NoFallocate(OsCalls):
        def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
            raise OSError(code, os.strerror(code))

    caplog.set_level(logging.INFO, "kvbm")
    with DiskStorage(EVEN, directory, os_calls=NoFallocate()) as storage:
        assert storage.is_sparse
        assert "no preallocation, the file is sparse" in caplog.text
        assert storage.path.stat().st_size == 8 * SLOT_NBYTES
        storage.write(ALL, content(1))
        assert np.array_equal(storage.read(ALL), content(1))


class Full(OsCalls):
    """A disk that is full, or that learns it only while it allocates."""

    def __init__(self, free: int | None, code: int = errno.ENOSPC) -> None:
        self.free, self.code = free, code

    def free_nbytes(self, fd: int) -> int | None:
        return self.free

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes // 2)
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("full", "text"),
    [
        (Full(1000), "need 74240 bytes, have 1000 free: give fewer blocks or another directory"),
        (Full(1 << 40), f"need 74240 bytes, have {1 << 40} free"),
        (Full(1 << 40, errno.EDQUOT), f"need 74240 bytes, have {1 << 40} free"),
        (Full(None), "need 74240 bytes, the file system is full"),
    ],
)
def test_full_disk_at_creation_names_both_sizes_and_leaves_nothing(directory: Path, full: Full, text: str) -> None:
    with pytest.raises(StorageError, match=text) as info:
        DiskStorage(EVEN, directory, os_calls=full)
    assert info.value.errno == full.code
    assert not directory.exists()
    directory.mkdir()
    (directory / "other").touch()
    with pytest.raises(StorageError, match=text):
        DiskStorage(EVEN, directory, os_calls=full)
    assert [path.name for path in directory.iterdir()] == ["other"]
    (directory / "rank0.blocks").write_bytes(b"x" * 5000)
    with pytest.raises(StorageError, match=text):
        DiskStorage(EVEN, directory, os_calls=full)
    assert (directory / "rank0.blocks").read_bytes() == b"x" * 5000


def test_interrupted_preallocation_is_made_again(directory: Path) -> None:
    class Interrupted(OsCalls):
        num_calls = 0

        def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
            self.num_calls += 1
            if self.num_calls < 4:
                raise InterruptedError
            super().posix_fallocate(fd, offset, nbytes)

    with DiskStorage(EVEN, directory, os_calls=Interrupted()) as storage:
        assert not storage.is_sparse


class NthFails(OsCalls):
    """Fails its n-th call, whatever it is."""

    def __init__(self, n: int) -> None:
        self.left, self.failed = n, ""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not callable(value) or name in ("close", "unlink", "rmdir"):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(errno.EIO, "Input/output error")
            return value(*arguments, **options)

        return call


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else []


def test_failure_at_any_step_of_opening_leaves_nothing_behind(directory: Path) -> None:
    before = open_files()
    failed = set()
    for n in range(1, 40):
        calls = NthFails(n)
        error = None
        try:
            DiskStorage(EVEN, directory, os_calls=calls).close()
        except StorageError as caught:
            error = caught
        if error is None:  # it could do without that call, or had fewer
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
        assert error is None or error.errno == errno.EIO
        assert not directory.exists()
        assert open_files() == before
        if not calls.failed:
            break
        failed.add(calls.failed)
    assert failed >= {
        "mkdir",
        "open",
        "lock",
        "stat",
        "fstat",
        "ftruncate",
        "pwritev",
        "free_nbytes",
        "posix_fallocate",
    }


# -- any of it together ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([EVEN, ODD]),
    use_direct_io=st.booleans(),
    is_wide=st.booleans(),
    rate=st.sampled_from([0.05, 0.3, 0.6]),
)
def test_blocks_that_claim_to_be_good_are(
    seed: int, layout: BlockLayout, use_direct_io: bool, is_wide: bool, rate: float
) -> None:
    rng, calls = random.Random(seed), FaultyOs()

    def fault(verb: str, offset: int, nbytes: int) -> BaseException | int | None:
        if rng.random() > rate:
            return None
        kind = rng.randrange(4)
        if kind == 0:
            return InterruptedError()
        if kind == 1:
            code = rng.choice([errno.EIO, errno.ENOSPC, errno.EAGAIN])
            return OSError(code, os.strerror(code))
        return nbytes // 4096 * 4096 // 2 // 4096 * 4096 if kind == 2 else 0

    nbytes = layout.block_nbytes
    model: dict[int, npt.NDArray[np.uint8]] = {}
    with tempfile.TemporaryDirectory() as parent:
        with DiskStorage(
            layout, f"{parent}/disk", use_direct_io=use_direct_io, os_calls=calls, num_threads=2
        ) as storage:
            calls.fault = fault
            for turn in range(8):
                memory = content(seed + turn, 8, SLOT_NBYTES if is_wide else nbytes)
                blocks = ids(*rng.sample(range(8), rng.randrange(1, 9)))
                rows = ids(*rng.sample(range(8), len(blocks)))
                if turn % 2:
                    good = storage.submit_read(blocks, memory, rows).result(PATIENCE_S).tolist()
                    for block, row, is_good in zip(blocks.tolist(), rows.tolist(), good, strict=True):
                        if is_good and block in model:
                            assert np.array_equal(memory[row, :nbytes], model[block])
                else:
                    good = storage.submit_write(blocks, memory, rows).result(PATIENCE_S).tolist()
                    for block, row, is_good in zip(blocks.tolist(), rows.tolist(), good, strict=True):
                        model.pop(block, None)
                        if is_good:
                            model[block] = memory[row, :nbytes].copy()
