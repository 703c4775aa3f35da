"""The index of a slab: what a restart finds, in which order, and what it refuses."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slab_site import HEADER, IndexFile, found, ids, names, put

from kvbm.errors import SlabFormatError
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.format import HEADER_NBYTES, RECORD_NBYTES, RECORDS_AT, decode_header, encode_header


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IndexFile]:
    file = IndexFile(tmp_path / "rank0.index")
    yield file
    file.close()


def test_a_tail_is_older_than_its_head_and_a_touch_makes_young(file: IndexFile) -> None:
    index = file.open()
    put(index, [5, 6, 7], [1, 2, 3])
    put(index, [1, 2], [4, 5])
    assert [number for _, number in found(index)] == [3, 2, 1, 5, 4]
    index.touch(ids(7, 5), names(3, 1), np.array([50, 50], dtype=np.uint8))
    assert [number for _, number in found(index)] == [2, 5, 4, 3, 1]
    index.sync()
    assert [number for _, number in found(file.open())] == [2, 5, 4, 3, 1]


def test_order_holds_when_a_restart_takes_less_than_a_second_or_the_clock_is_set_back(file: IndexFile) -> None:
    for number, seconds in enumerate([0, 0, -3600, 0, 0.25, 7200]):
        file.clock.now += seconds
        put(file.open(), [100 - number], [number])
    assert [number for _, number in found(file.open())] == [0, 1, 2, 3, 4, 5]


def test_order_holds_when_one_second_has_more_uses_than_a_record_can_count(file: IndexFile) -> None:
    num_slots = 3 * 2**15  # one and a half times as many
    index = file.open(replace(HEADER, num_slots=num_slots))
    numbers = np.random.default_rng(1).permutation(num_slots)
    put(index, list(range(num_slots)), numbers.tolist())
    assert [number for _, number in found(index)] == numbers[::-1].tolist()


def test_priorities_survive(file: IndexFile) -> None:
    index = file.open()
    put(index, [1], [1], priority=100)
    put(index, [2], [2], priority=0)
    index.touch(ids(1), names(1), np.array([7], dtype=np.uint8))
    index.sync()
    _, records = file.open().live()
    assert records["priority"].tolist() == [0, 7]


def test_of_a_name_in_two_slots_the_younger_is_found_and_forget_takes_both(file: IndexFile) -> None:
    index = file.open()
    put(index, [9], [1])
    put(index, [3], [2])
    put(index, [140], [1])
    for _ in range(2):
        assert found(index) == [(3, 2), (140, 1)]
        assert index.holds(ids(9, 140, 3), names(1, 1, 1)).tolist() == [True, True, False]
        index = file.open()
    index.void(ids(140))  # overwritten: the other one is good still
    assert found(file.open()) == [(9, 1), (3, 2)]
    put(index, [140], [1])
    index.forget(names(1))
    for _ in range(2):
        assert found(index) == [(3, 2)]
        index = file.open()


def test_grown_and_shrunk_it_keeps_what_fits(file: IndexFile) -> None:
    index = file.open()
    put(index, [0, 63, 64, 149], [1, 2, 3, 4])
    index = file.open(replace(HEADER, num_slots=1000))
    assert [slot for slot, _ in found(index)] == [149, 64, 63, 0]
    put(index, [999], [5])
    index = file.open(replace(HEADER, num_slots=64))
    assert [slot for slot, _ in found(index)] == [63, 0]
    assert [slot for slot, _ in found(file.open(replace(HEADER, num_slots=1000)))] == [63, 0], (
        "what was cut off is gone"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "other"}, "it has fingerprint 'a model', expected 'other'"),
        ({"block_nbytes": 289}, "it has block_nbytes 288, expected 289"),
        ({"slot_nbytes": 8192}, "it has slot_nbytes 4096, expected 8192"),
    ],
)
def test_a_slab_of_something_else_is_refused_as_it_is_or_replaced(
    file: IndexFile, change: dict[str, Any], said: str
) -> None:
    put(file.open(), [1, 100], [1, 2])
    before = file.path.read_bytes()
    other = replace(HEADER, **change)
    with pytest.raises(SlabFormatError, match=said):
        file.open(other)
    assert file.path.read_bytes() == before
    assert found(file.open()) == [(100, 2), (1, 1)]
    for _ in range(2):  # the second time it is continued
        assert found(file.open(other, on_mismatch="replace")) == []
    with pytest.raises(SlabFormatError, match="of another model"):
        file.open()
    for _ in range(2):
        assert found(file.open(on_mismatch="replace")) == [], "what was replaced does not come back"


def test_a_slab_that_is_replaced_forgets_before_it_has_the_new_name(file: IndexFile) -> None:
    """Else a kill between the two would leave the old blocks under the new name."""
    put(file.open(), [1], [1])

    class Killed(OsCalls):
        def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            if offset < RECORDS_AT:
                raise OSError(errno.EIO, "killed here")
            return super().pwritev(fd, buffers, offset)

    with pytest.raises(OSError, match="killed here"):
        file.open(replace(HEADER, fingerprint="other"), on_mismatch="replace", os_calls=Killed())
    assert found(file.open()) == []


def test_another_version_is_refused_or_replaced(file: IndexFile) -> None:
    put(file.open(), [1], [1])
    data = bytearray(encode_header(HEADER))
    data[8] = 9
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    os.pwrite(file.fd, bytes(data), 0)
    with pytest.raises(SlabFormatError, match=r"rank0\.index: the slab is of version 9 .* package reads version 1"):
        file.open()
    for _ in range(2):
        assert found(file.open(on_mismatch="replace")) == []


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("damage", [b"\0" * HEADER_NBYTES, b"\xa5" * HEADER_NBYTES, b"KVBMSLAB", b"\1" * 700])
def test_one_damaged_header_costs_nothing(file: IndexFile, copy: int, damage: bytes) -> None:
    put(file.open(), [1, 100], [1, 2])
    at = copy * HEADER_NBYTES + (8 if damage == b"KVBMSLAB" else 0)
    os.pwrite(file.fd, damage, at)
    assert found(file.open()) == [(100, 2), (1, 1)]
    for i in range(2):  # and is mended
        assert decode_header(os.pread(file.fd, HEADER_NBYTES, i * HEADER_NBYTES)).fingerprint == "a model"


@pytest.mark.parametrize("on_mismatch", ["refuse", "replace"])
def test_without_a_header_nothing_is_believed(
    file: IndexFile, caplog: pytest.LogCaptureFixture, on_mismatch: str
) -> None:
    put(file.open(), [1, 100], [1, 2])
    for copy in range(2):
        os.pwrite(file.fd, b"x", copy * HEADER_NBYTES + 200)
    for _ in range(2):
        assert found(file.open(on_mismatch=on_mismatch)) == []
    assert "disk slab starts empty" in caplog.text
    assert "its CRC does not hold" in caplog.text


def test_damaged_records_are_counted_and_those_of_before_a_clear_are_not(file: IndexFile) -> None:
    index = file.open()
    put(index, range(64), range(64))
    index.clear()
    put(index, [100, 101], [1, 2])
    os.pwrite(file.fd, b"\xff", RECORDS_AT + 101 * RECORD_NBYTES + 3)
    index = file.open()
    assert (found(index), index.num_damaged) == ([(100, 1)], 1)


def test_an_index_cut_short_is_empty_where_it_ends(file: IndexFile) -> None:
    put(file.open(), [1, 100], [1, 2])
    for nbytes, expected in [(RECORDS_AT + 50 * RECORD_NBYTES + 7, [(1, 1)]), (RECORDS_AT, []), (5000, []), (0, [])]:
        os.ftruncate(file.fd, nbytes)
        assert found(file.open()) == expected
