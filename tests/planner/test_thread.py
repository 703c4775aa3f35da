"""The thread that pumps: woken by news and deadlines, outlives failures, ends when told."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.layout import BlockLayout
from kvbm.manager import BlockManager
from kvbm.planner.thread import PlannerThread
from kvbm.storage import HostStorage
from kvbm.testing.faults import FaultMode, FaultPlan, FaultyStorage
from kvbm.types import Tier

PATIENCE_S = 60.0


class FakePlanner:
    """Counts how often it is pumped; has nothing to do."""

    def __init__(self, seconds_to_deadline: float | None) -> None:
        self.num_pumps = 0
        self.fails_with: Exception | None = None
        self.pumped = threading.Semaphore(0)
        self._seconds_to_deadline = seconds_to_deadline

    def set_wake(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def seconds_to_deadline(self) -> float | None:
        return self._seconds_to_deadline

    def pump(self) -> bool:
        self.num_pumps += 1
        self.pumped.release()
        if self.fails_with is not None:
            raise self.fails_with
        return False


def start(seconds_to_deadline: float | None) -> tuple[PlannerThread, FakePlanner]:
    planner: Any = FakePlanner(seconds_to_deadline)
    return PlannerThread(planner), planner


@pytest.mark.parametrize("seconds", [None, 1000.0, math.inf, 1e300])
def test_thread_pumps_when_it_is_woken_however_far_the_next_deadline_is(seconds: float | None) -> None:
    thread, planner = start(seconds)
    for _ in range(3):
        planner.wake()
        assert planner.pumped.acquire(timeout=PATIENCE_S)
    assert thread.stop(math.inf)
    assert thread.stop()
    thread.check()


def test_thread_pumps_at_the_deadline_without_being_woken() -> None:
    thread, planner = start(0.0)
    assert planner.pumped.acquire(timeout=PATIENCE_S)
    assert thread.stop(PATIENCE_S)


def test_failure_is_logged_and_raised_once_at_the_next_check_and_the_thread_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread, planner = start(None)
    planner.fails_with = ZeroDivisionError("policy")
    planner.wake()
    assert planner.pumped.acquire(timeout=PATIENCE_S)
    planner.fails_with = None
    planner.wake()
    assert planner.pumped.acquire(timeout=PATIENCE_S)
    with pytest.raises(ZeroDivisionError, match="policy"):
        thread.check()
    thread.check()
    assert "the planner failed" in caplog.text
    assert thread.stop(PATIENCE_S)


def test_times_without_end_are_taken_for_what_they_are() -> None:
    """A manager waits for ever where it is told to, and its thread survives it."""
    plan = FaultPlan()
    layout = BlockLayout.fully_contiguous(
        num_blocks=8, num_layers=1, outer_dim=2, block_size=4, inner_dim=8, dtype="uint8"
    )
    storage = FaultyStorage(HostStorage(layout), plan)
    names = np.array([[name, 0] for name in (1, 2, 3)], dtype=np.uint64)
    with BlockManager(
        num_layers=1, page_size=4, inner_dim=8, dtype="uint8", device_blocks=3, storages={Tier.HOST: storage}
    ) as manager:
        plan._modes = iter([FaultMode.DELAY])
        manager.register_blocks(manager.allocate_blocks(3).complete(names)).release()
        flusher = threading.Thread(target=manager.flush, args=(math.inf,))
        flusher.start()
        assert storage.wait_until_held(1, PATIENCE_S)
        storage.release()
        flusher.join(PATIENCE_S)
        assert not flusher.is_alive()
        manager.device.reset()
        plan._modes = iter([FaultMode.DELAY])
        transfer = manager.onboard(manager.match_sequence_hashes(names), timeout=math.inf)
        assert storage.wait_until_held(1, PATIENCE_S)
        storage.release()
        assert len(transfer.result(math.inf)) == 3
        assert "kvbm-planner" in [thread.name for thread in threading.enumerate()]
        manager.close(math.inf)
