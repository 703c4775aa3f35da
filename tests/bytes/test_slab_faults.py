"""The index of a slab on a file that refuses: who forgets hears of it, and what failed is made good."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from slab_site import IndexFile, found, ids, names, put

from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.format import RECORDS_AT


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IndexFile]:
    file = IndexFile(tmp_path / "rank0.index")
    yield file
    file.close()


class Refusing(OsCalls):
    """Refuses writes or syncs where `refuses(verb, offset)` says so, counting the calls."""

    def __init__(self) -> None:
        self.refuses: Callable[[str, int], bool] = lambda verb, offset: False
        self.code = errno.EIO

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._ask("write", offset)
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._ask("sync", -1)
        super().fdatasync(fd)

    def _ask(self, verb: str, offset: int) -> None:
        if self.refuses(verb, offset):
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("verb", ["write", "sync"])
def test_a_forget_that_fails_says_so_until_it_is_done(file: IndexFile, verb: str, code: int) -> None:
    calls = Refusing()
    calls.code = code
    index = file.open(os_calls=calls)
    put(index, [1, 2, 100], [1, 2, 3])
    calls.refuses = lambda what, offset: what == verb
    for hashes in (names(1), names(1), names(77)):  # also of others: the first is owed still
        with pytest.raises(OSError, match=os.strerror(code)) as info:
            index.forget(hashes)
        assert info.value.errno == code
    assert found(index) == [(100, 3), (2, 2)], "nobody here finds it any more"
    calls.refuses = lambda what, offset: False
    index.forget(names(1))
    assert found(file.open()) == [(100, 3), (2, 2)]


def test_what_a_failed_void_left_behind_is_forgotten_by_name(file: IndexFile) -> None:
    """The record of a block that was to be overwritten, but was not, names good bytes."""
    calls = Refusing()
    index = file.open(os_calls=calls)
    put(index, [1], [1])
    index.sync()
    calls.refuses = lambda verb, offset: True
    index.void(ids(1))
    with pytest.raises(OSError, match="Input/output error"):
        index.forget(names(1))
    calls.refuses = lambda verb, offset: False
    index.forget(names(1))
    assert found(file.open()) == []


def test_a_sync_that_failed_is_not_taken_for_done(file: IndexFile) -> None:
    """After a failed sync the system holds the pages for clean: they have to be written again."""
    calls = Refusing()
    index = file.open(os_calls=calls)
    put(index, [1, 100], [1, 2])
    calls.refuses = lambda verb, offset: verb == "sync"
    index.sync()
    assert index.needs_sync
    assert index.num_failures == 1
    offsets: list[int] = []
    calls.refuses = lambda verb, offset: bool(offsets.append(offset))
    index.sync()
    assert offsets == [RECORDS_AT, -1] or offsets == [RECORDS_AT, RECORDS_AT + 4096, -1]
    assert not index.needs_sync


@pytest.mark.parametrize("n", range(4))
def test_a_clear_that_fails_says_so_and_is_made_good(file: IndexFile, n: int) -> None:
    """Header, sync, header, sync: whichever fails, no forgotten block comes back, and none that came later is lost."""
    calls = Refusing()
    index = file.open(os_calls=calls)
    put(index, [1, 100], [1, 2])
    num_calls = iter(range(100))
    calls.refuses = lambda verb, offset: next(num_calls) == n
    with pytest.raises(OSError, match="Input/output error"):
        index.clear()
    assert found(index) == []
    calls.refuses = lambda verb, offset: False
    put(index, [5], [5])
    index.forget(names(2))
    assert found(file.open()) == [(5, 5)]


@pytest.mark.parametrize("n", range(4))
def test_a_clear_that_failed_may_be_tried_again(file: IndexFile, n: int) -> None:
    calls = Refusing()
    index = file.open(os_calls=calls)
    put(index, [1, 100], [1, 2])
    num_calls = iter(range(100))
    calls.refuses = lambda verb, offset: next(num_calls) == n
    with pytest.raises(OSError, match="Input/output error"):
        index.clear()
    calls.refuses = lambda verb, offset: False
    index.clear()
    put(index, [5], [5])
    assert found(file.open()) == [(5, 5)]


@pytest.mark.parametrize("n", range(4))
def test_after_a_clear_that_failed_the_next_sync_brings_what_came_later(file: IndexFile, n: int) -> None:
    calls = Refusing()
    index = file.open(os_calls=calls)
    put(index, [1, 100], [1, 2])
    num_calls = iter(range(100))
    calls.refuses = lambda verb, offset: next(num_calls) == n
    with pytest.raises(OSError, match="Input/output error"):
        index.clear()
    calls.refuses = lambda verb, offset: False
    put(index, [5], [5])
    index.sync()
    assert not index.needs_sync
    assert found(file.open()) == [(5, 5)]


def test_short_and_interrupted_writes_are_gone_on_with(file: IndexFile) -> None:
    class Stuttering(OsCalls):
        num_calls = 0

        def _turn(self) -> int:
            self.num_calls += 1
            if self.num_calls % 3 == 0:
                raise InterruptedError
            return 100 + self.num_calls

        def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            return super().pwritev(fd, [buffers[0][: self._turn()]], offset)

        def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            return super().preadv(fd, [buffers[0][: self._turn()]], offset)

        def fdatasync(self, fd: int) -> None:
            self._turn()
            super().fdatasync(fd)

    for _ in range(2):
        index = file.open(os_calls=Stuttering())
        put(index, [1, 100], [1, 2])
        index.forget(names(2))
        index.sync()
        assert (found(index), index.num_failures) == ([(1, 1)], 0)
    assert found(file.open()) == [(1, 1)]


def test_a_write_that_moves_nothing_is_a_failure_and_no_endless_loop(file: IndexFile) -> None:
    class Stuck(OsCalls):
        is_stuck = False

        def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            return 0 if self.is_stuck else super().pwritev(fd, buffers, offset)

    calls = Stuck()
    index = file.open(os_calls=calls)
    put(index, [1], [1])
    calls.is_stuck = True
    for call in (lambda: index.forget(names(1)), index.clear):
        with pytest.raises(OSError, match="moved nothing"):
            call()
