"""What direct I/O is aligned to: the kernel is asked, and where it wants more than a slot's padding we go buffered."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage, OsCalls

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=4, num_layers=2, outer_dim=2, block_size=4, inner_dim=12, dtype="uint8"
)
IDS = np.arange(4, dtype=np.int32)

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT")


class Says(OsCalls):
    """A kernel that says what direct I/O needs, and counts the files that are opened for it."""

    def __init__(self, alignment: int | None) -> None:
        self.alignment = alignment
        self.num_direct = 0

    def direct_alignment(self, fd: int) -> int | None:
        return self.alignment

    def open(self, path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        self.num_direct += bool(flags & os.O_DIRECT)
        return super().open(path, flags & ~os.O_DIRECT, mode, dir_fd=dir_fd)  # any file system will do


@pytest.mark.parametrize("alignment", [None, 1, 512, 4096])
def test_what_divides_a_page_or_is_not_said_is_tried(tmp_path: Path, alignment: int | None) -> None:
    calls = Says(alignment)
    with DiskStorage(LAYOUT, tmp_path / "d", os_calls=calls) as storage:
        assert storage.io_mode == "direct"
    assert calls.num_direct == 2, "the probe, and the data file"


@pytest.mark.parametrize(
    ("alignment", "reason"),
    [
        (0, "the file system has no direct I/O for this file"),
        (8192, "direct I/O needs multiples of 8192 bytes here, slots have 4096"),
        (65536, "direct I/O needs multiples of 65536 bytes here, slots have 4096"),
        (3000, "direct I/O needs multiples of 3000 bytes here, slots have 4096"),
    ],
)
def test_what_a_slot_cannot_keep_to_is_announced_and_goes_buffered(
    tmp_path: Path, alignment: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Says(alignment)
    with caplog.at_level(logging.INFO, "kvbm"), DiskStorage(LAYOUT, tmp_path / "d", os_calls=calls) as storage:
        assert (storage.io_mode, storage.io_mode_reason) == ("buffered", reason)
        assert calls.num_direct == 0
        data = np.arange(4 * LAYOUT.block_nbytes, dtype=np.uint64).astype(np.uint8).reshape(4, -1)
        storage.write(IDS, data)
        assert np.array_equal(storage.read(IDS), data)
    assert [record for record in caplog.records if f"io_mode=buffered reason='{reason}'" in record.getMessage()]


def test_the_kernel_is_asked_and_its_answer_holds(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        alignment = OsCalls().direct_alignment(fd)
    finally:
        os.close(fd)
    if not alignment:
        pytest.skip(f"nothing to hold: the kernel says {alignment}")
    raw = np.zeros(3 * alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwritev(fd, [raw[start : start + alignment]], alignment) == alignment
    finally:
        os.close(fd)


def test_a_descriptor_that_is_none_says_nothing() -> None:
    assert OsCalls().direct_alignment(-1) is None
