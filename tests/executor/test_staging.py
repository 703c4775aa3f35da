"""The staging ring: bounded, aligned, shared by threads, and patient up to a deadline."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.layout import BlockLayout
from kvbm.storage.staging import StagingRing

PATIENCE_S = 60.0
LAYOUT = BlockLayout.layer_separate(
    block_first=True, num_blocks=100, num_layers=2, outer_dim=2, block_size=4, inner_dim=12, dtype="uint8"
)


def take_in_thread(ring: StagingRing, n: int, deadline: float | None) -> tuple[threading.Thread, list[Any]]:
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(ring.take(n, deadline)))
    thread.start()
    return thread, taken


def test_slots_are_aligned_rows_of_the_same_memory_as_the_storage(backend: Backend) -> None:
    ring = StagingRing(LAYOUT, 3, backend=backend)
    assert ring.memory.shape == (3, 4096)
    assert ring.memory.ctypes.data % 4096 == 0
    data = np.random.default_rng(0).integers(0, 256, (1, LAYOUT.block_nbytes), dtype=np.uint8)
    ring.storage.write(np.array([2], dtype=np.int32), data)
    assert np.array_equal(ring.memory[2, : LAYOUT.block_nbytes], data[0])
    assert ring.storage.layout.is_dense
    assert ring.storage.num_blocks == ring.num_slots == ring.num_free == 3


@pytest.mark.parametrize("num_slots", [0, -1])
def test_ring_without_slots_is_refused(num_slots: int) -> None:
    with pytest.raises(ConfigError, match=f"a staging ring needs 1 or more slots, got {num_slots}"):
        StagingRing(LAYOUT, num_slots)


def test_taking_gives_what_is_free_up_to_what_was_asked_for() -> None:
    ring = StagingRing(LAYOUT, 5)
    first, second = ring.take(2), ring.take(9)
    assert (len(first), len(second), ring.num_free) == (2, 3, 0)
    assert first.dtype == np.int32
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    ring.give(second[1:])
    assert ring.num_free == 2
    assert sorted(ring.take(2)) == sorted(second[1:])


def test_empty_ring_gives_nothing_once_the_deadline_is_reached() -> None:
    now = [10.0]
    ring = StagingRing(LAYOUT, 1, clock=lambda: now[0])
    ring.take(1)
    for deadline in (9.0, 10.0):
        assert ring.take(1, deadline).shape == (0,)
    ring.give(np.array([0], dtype=np.int32))
    assert len(ring.take(1, 9.0)) == 1, "what is free needs no time"


def test_taking_waits_for_real_no_longer_than_the_deadline() -> None:
    ring = StagingRing(LAYOUT, 1)
    ring.take(1)
    assert len(ring.take(1, time.monotonic() + 0.01)) == 0


@pytest.mark.parametrize("deadline", [None, 1e6, float("inf"), 1e300])
def test_taking_waits_until_slots_are_given_back(deadline: float | None) -> None:
    has_looked = threading.Event()

    def clock() -> float:
        has_looked.set()
        return 0.0

    ring = StagingRing(LAYOUT, 2, clock=clock)
    slots = ring.take(2)
    thread, taken = take_in_thread(ring, 2, deadline)
    if deadline is not None:
        assert has_looked.wait(PATIENCE_S)
    assert taken == []
    ring.give(slots[1:])
    thread.join(PATIENCE_S)
    assert [slots.tolist() for slots in taken] == [[1]]


def test_slots_given_back_wake_everybody_they_are_enough_for() -> None:
    ring = StagingRing(LAYOUT, 4)
    slots = ring.take(4)
    waiting = [take_in_thread(ring, 1, None) for _ in range(4)]
    ring.give(slots)
    for thread, _ in waiting:
        thread.join(PATIENCE_S)
    assert sorted(taken[0].item() for _, taken in waiting) == [0, 1, 2, 3]


def test_threads_never_hold_the_same_slot() -> None:
    ring = StagingRing(LAYOUT, 5)
    owners: list[int | None] = [None] * 5
    wrong: list[Any] = []

    def live(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for _ in range(400):
            slots = ring.take(int(rng.integers(1, 4)))
            for slot in slots.tolist():
                if owners[slot] is not None:
                    wrong.append((slot, owners[slot], thread))
                owners[slot] = thread
            for slot in slots.tolist():
                if owners[slot] != thread:
                    wrong.append((slot, owners[slot], thread))
                owners[slot] = None
            ring.give(slots)

    threads = [threading.Thread(target=live, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wrong == []
    assert ring.num_free == 5
