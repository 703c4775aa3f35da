"""Native disk queues on an operating system that fails: an errno and what had moved, never a wrong byte, no hang."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_native import KINDS, NUM_PAGES, PAGE, UNTOUCHED, aligned, content, disk_io, pages, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(disk_io is None, reason="the native twin has no disk queues here")


def test_interrupted_calls_and_short_ones_are_continued(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(depth=1), aligned(4, PAGE)
    memory[:] = [[1], [2], [3], [4]]
    arrays = np.array([0]), np.array([4]), (memory.ctypes.data + np.arange(4) * PAGE).astype(np.uint64)
    queue.inject([-errno.EINTR] * 20 + [-errno.EAGAIN] * 8 + [PAGE, -errno.EAGAIN, 2 * PAGE, 0, UNTOUCHED])
    queue.submit(1, False, *arrays, np.full(4, PAGE, np.uint64), memory)
    ((_, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist(), num_calls) == ([0], [4 * PAGE], 33)
    assert content(fd)[:5, 0].tolist() == [1, 2, 3, 4, 0]


def test_direct_calls_go_on_from_a_whole_page(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(depth=1), aligned(4, PAGE)
    memory[:] = [[1], [2], [3], [4]]
    whole = np.array([0]), np.array([1]), np.array([memory.ctypes.data], np.uint64), np.array([4 * PAGE], np.uint64)
    # Without direct I/O what is claimed counts: only there does a test know that it has not moved.
    extra = 100 if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else 0
    queue.inject([PAGE + extra, 2 * PAGE + extra, UNTOUCHED])
    queue.submit(1, False, *whole, memory)
    ((_, errnos, moved, _),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist()) == ([0], [4 * PAGE])
    assert content(fd)[:4, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("answer", [0, -errno.EAGAIN])
def test_write_that_gets_no_further_fails(make_queue: Any, answer: int) -> None:
    queue, memory = make_queue(depth=1), aligned(1, PAGE)
    queue.inject([answer] * 9)
    queue.submit(1, False, *pages(memory, [0, 1], [0, 0]))
    ((_, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist(), num_calls) == ([errno.EIO, 0], [0, PAGE], 10)


def test_errors_end_one_operation_with_what_it_had_moved(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(depth=1), aligned(4, PAGE)
    whole = np.array([0, 8]) * PAGE, np.array([1, 1]), np.full(2, memory.ctypes.data, np.uint64)
    queue.inject([2 * PAGE, -errno.ENOSPC, UNTOUCHED])
    queue.submit(1, False, *whole, np.full(2, 4 * PAGE, np.uint64), memory)
    ((_, errnos, moved, _),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist()) == ([errno.ENOSPC, 0], [2 * PAGE, 4 * PAGE])


def test_end_of_the_file_is_an_error(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(), aligned(4, PAGE)
    os.ftruncate(fd, 2 * PAGE)
    whole = np.array([0, 1, 2]) * PAGE, np.array([1, 1, 1]), np.full(3, memory.ctypes.data, np.uint64)
    queue.submit(1, True, *whole, np.full(3, 2 * PAGE, np.uint64), memory)
    ((_, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist()) == ([0, errno.EIO, errno.EIO], [2 * PAGE, PAGE, 0])
    assert num_calls == 4, "at the end of the file nobody tries again"


def test_descriptor_that_cannot_be_written_is_an_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    queue, memory = disk_io.DiskQueue(fd, kind=kind), aligned(1, PAGE)
    queue.submit(1, False, *pages(memory, [0], [0]))
    assert wait_for(queue, 1)[0][1].tolist() == [errno.EBADF]
    queue.submit(2, True, *pages(memory, [0], [0]))
    assert wait_for(queue, 1)[0][1].tolist() == [0]
    os.close(fd)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory to try")
def test_descriptor_that_does_not_wait_works_as_any_other(kind: str) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.set_blocking(file.fileno(), False)
        queue, memory = disk_io.DiskQueue(file.fileno(), kind=kind), aligned(NUM_PAGES, PAGE)
        memory[:] = 4
        queue.submit(1, False, *pages(memory, range(NUM_PAGES), range(NUM_PAGES)))
        assert not wait_for(queue, 1)[0][1].any()
        assert (content(file.fileno()) == 4).all()
        assert kind == "threads" or os.get_blocking(file.fileno()), "some file systems make a ring give up otherwise"


# -- any of it together ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS or ["threads"]),
    is_direct=st.booleans(),
    depth=st.integers(1, 8),
    faults=st.lists(
        st.sampled_from([-errno.EINTR, -errno.EAGAIN, -errno.EIO, 0, PAGE, 3 * PAGE, UNTOUCHED]), max_size=9
    ),
    batches=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 15), unique=True), st.sampled_from([100, PAGE, 2 * PAGE])),
        min_size=1,
        max_size=6,
    ),
)
def test_random_batches_agree_with_an_array(
    kind: str, is_direct: bool, depth: int, faults: list[int], batches: list[tuple[bool, list[int], int]]
) -> None:
    """Slots of two pages; blocks of less go through a bounce buffer. What claims to have moved is in the model."""
    slot, rng = 2 * PAGE, np.random.default_rng(4)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(16 * slot)
        fd = os.open(file.name, os.O_RDWR | (os.O_DIRECT if is_direct else 0))
        queue = disk_io.DiskQueue(fd, kind=kind, depth=depth, num_threads=2)
        model = np.zeros((16, slot), dtype=np.uint8)
        is_known = np.ones(16, dtype=np.bool_)
        queue.inject(faults)
        for token, (is_read, slots, nbytes) in enumerate(batches, start=1):
            memory = aligned(16, slot)
            memory[:] = rng.integers(0, 256, memory.shape, dtype=np.uint8)
            before, places = memory.copy(), np.array(slots, dtype=np.int64)
            rows = rng.permutation(16)[: len(slots)]
            addresses = (memory.ctypes.data + rows * slot).astype(np.uint64)
            options = {"block_nbytes": nbytes, "slot_nbytes": slot} if nbytes < slot else {}
            queue.submit(
                token, is_read, places * slot, np.ones(len(slots), np.int64), addresses,
                np.full(len(slots), nbytes, np.uint64), memory, **options,
            )  # fmt: skip
            ((_, errnos, moved, _),) = wait_for(queue, 1)
            assert ((moved == slot) == (errnos == 0)).all()
            is_good = errnos == 0
            if is_read:
                is_sure = is_good & is_known[places]
                assert np.array_equal(memory[rows[is_sure], :nbytes], model[places[is_sure], :nbytes])
                untouched = np.setdiff1d(np.arange(16), rows)
                assert np.array_equal(memory[untouched], before[untouched])
                if nbytes < slot:
                    assert np.array_equal(memory[:, nbytes:], before[:, nbytes:])
            else:
                assert np.array_equal(memory, before)
                is_known[places] = is_good
                model[places] = 0
                model[places, :nbytes] = memory[rows, :nbytes]
        os.close(fd)
