"""Pumps a planner in the steps of somebody else, an engine's as a rule; where there are none, see `PlannerThread`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvbm.planner.planner import Planner


class PlannerSteps:
    """Pumps a planner when there may be something to do: most steps of an engine that decodes have nothing.

    Parameters
    ----------
    planner : Planner
        Its wake is taken.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(self, planner: Planner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._planner = planner
        self._clock = clock
        self._has_news = True
        self._due_at = -math.inf
        planner.set_wake(self.wake)

    def step(self) -> bool:
        """Pump once, if anything was registered, answered or is overdue, or jobs are open; return whether it did."""
        planner = self._planner
        is_busy = planner.num_open_jobs or planner.forgetter.is_forgetting
        if not (self._has_news or is_busy or self._clock() >= self._due_at):
            return False
        self._has_news = False  # before the pump: what comes meanwhile is for the next step
        if planner.pump():
            self._has_news = True
        remaining_s = planner.seconds_to_deadline()
        self._due_at = math.inf if remaining_s is None else self._clock() + remaining_s
        return True

    def wake(self) -> None:
        """Say that there is something to do; any thread."""
        self._has_news = True
