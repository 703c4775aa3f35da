"""Bytes written in a day, and the estimate of what the device writes for them."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from kvbm.errors import ConfigError
from kvbm.storage.disk.wear import BytesPerDay, estimate_device_nbytes

HOUR_S = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 12345.678

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("written", "slot", "page", "expected"),
    [
        (0, 4096, 16384, 0),
        (4096, 4096, 16384, 16384),
        (10 * 16384, 16384, 16384, 10 * 16384),
        (10 * 20480, 20480, 16384, 10 * 32768),
        (10 * 20480, 20480, 4096, 10 * 20480),
        (1 << 50, 1 << 20, 16384, 1 << 50),
        (5000, 4096, 4096, 5000),
    ],
)
def test_device_writes_whole_pages_for_each_slot(written: int, slot: int, page: int, expected: int) -> None:
    assert estimate_device_nbytes(written, slot, page_nbytes=page) == expected


@pytest.mark.parametrize(("written", "slot", "page"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_sizes_are_refused(written: int, slot: int, page: int) -> None:
    with pytest.raises(ConfigError, match=f"written_nbytes is {written}, slot_nbytes {slot}, page_nbytes {page}: give"):
        estimate_device_nbytes(written, slot, page)


def test_window_forgets_after_a_day_and_the_total_does_not() -> None:
    clock = Clock()
    written = BytesPerDay(clock=clock)
    assert (written.nbytes, written.total_nbytes) == (0, 0)
    written.add(5)
    clock.now += 23 * HOUR_S
    written.add(7)
    assert written.nbytes == 12
    clock.now += HOUR_S - 0.001
    assert written.nbytes == 12
    clock.now += 0.001
    assert written.nbytes == 7
    clock.now += 100 * HOUR_S
    assert (written.nbytes, written.total_nbytes) == (0, 12)


def test_window_is_never_longer_than_a_day_nor_shorter_than_23_hours() -> None:
    clock = Clock()
    written = BytesPerDay(clock=clock)
    rng = np.random.default_rng(0)
    life: deque[tuple[float, int]] = deque()
    for _ in range(3000):
        clock.now += float(rng.exponential(900))
        nbytes = int(rng.integers(1, 1000))
        written.add(nbytes)
        life.append((clock.now, nbytes))
        least = sum(n for moment, n in life if moment > clock.now - 23 * HOUR_S)
        most = sum(n for moment, n in life if moment > clock.now - 24 * HOUR_S)
        assert least <= written.nbytes <= most
        while life[0][0] < clock.now - 25 * HOUR_S:
            life.popleft()
    assert len(written._hours) <= 24


def test_clock_that_goes_back_loses_nothing() -> None:
    clock = Clock()
    written = BytesPerDay(clock=clock)
    clock.now += 5 * HOUR_S
    written.add(3)
    clock.now -= 2 * HOUR_S
    written.add(4)
    assert (written.nbytes, written.total_nbytes) == (7, 7)
