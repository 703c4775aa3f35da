"""A planner that is pumped in somebody else's steps: never too late, and not where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.planner import PlannerSteps
from kvbm.testing.tier_schedules import OPERATIONS, Schedule, TierSchedules


class FakePlanner:
    """Counts how often it is pumped."""

    def __init__(self) -> None:
        self.num_pumps = 0
        self.num_open_jobs = 0
        self.forgetter = SimpleNamespace(is_forgetting=False)
        self.remaining_s: float | None = None
        self.has_more = False
        self.while_pumping: Callable[[], None] = lambda: None

    def set_wake(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def seconds_to_deadline(self) -> float | None:
        return self.remaining_s

    def pump(self) -> bool:
        self.num_pumps += 1
        self.while_pumping()
        return self.has_more


@pytest.fixture
def planner() -> Any:
    return FakePlanner()


@pytest.fixture
def steps(planner: Any) -> PlannerSteps:
    steps = PlannerSteps(planner, clock=lambda: 0.0)
    assert steps.step(), "what came before is not known"
    assert not steps.step()
    return steps


def test_pumps_once_for_what_it_was_woken_for(planner: Any, steps: PlannerSteps) -> None:
    planner.wake()
    planner.wake()
    assert steps.step()
    assert not steps.step()
    assert planner.num_pumps == 2


def test_what_comes_during_a_pump_is_for_the_next_step(planner: Any, steps: PlannerSteps) -> None:
    planner.wake()
    planner.while_pumping = planner.wake
    assert steps.step()
    planner.while_pumping = lambda: None
    assert steps.step()
    assert not steps.step()


def test_pumps_again_where_a_pump_left_more(planner: Any, steps: PlannerSteps) -> None:
    planner.wake()
    planner.has_more = True
    assert steps.step()
    planner.has_more = False
    assert steps.step()
    assert not steps.step()


@pytest.mark.parametrize("what", ["jobs", "forgetting"])
def test_pumps_in_every_step_while_something_is_open(planner: Any, steps: PlannerSteps, what: str) -> None:
    planner.num_open_jobs = int(what == "jobs")
    planner.forgetter.is_forgetting = what == "forgetting"
    assert steps.step()
    assert steps.step()
    planner.num_open_jobs, planner.forgetter.is_forgetting = 0, False
    assert not steps.step()


def test_pumps_at_the_deadline_without_being_woken(planner: Any) -> None:
    now = 100.0
    planner.remaining_s = 5.0
    steps = PlannerSteps(planner, clock=lambda: now)
    assert steps.step()
    now = 104.9
    assert not steps.step()
    now = 105.0
    planner.remaining_s = None
    assert steps.step()
    now = 1e9
    assert not steps.step()


class SteppedSchedules(TierSchedules):
    """Pumps by steps; where one has nothing to do, a pump has not either."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.num_quiet = 0
        self._pump = self.planner.pump
        self._steps = PlannerSteps(self.planner, clock=self.clock)
        self.planner.pump = self._step  # type: ignore[method-assign]
        self._is_inside = False

    def _step(self) -> bool:
        if self._is_inside:
            return self._pump()
        num_before = self.planner.num_open_jobs
        self._is_inside = True
        try:
            if self._steps.step():
                return self._steps._has_news
        finally:
            self._is_inside = False
        assert not self._pump(), "there was something to do"
        assert self.planner.num_open_jobs == num_before
        self.num_quiet += 1
        return False


def test_a_step_without_a_pump_misses_nothing(backend: Backend) -> None:
    num_quiet = 0

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([*OPERATIONS, "pump", "pump"]), st.integers(0, 255)), max_size=60))
    def run(schedule: Schedule) -> None:
        nonlocal num_quiet
        schedules = SteppedSchedules(backend)
        schedules.run(schedule)
        num_quiet += schedules.num_quiet

    run()
    assert num_quiet > 20
