"""Sending what routes offload: job by job, so that a request that waits for the lock or the interpreter gets it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.dispatch import Dispatcher, Unsent
from kvbm.planner.offload import OffloadRoute
from kvbm.planner.presence import Presence

_PAUSE_S = 2e-5  # after each job


class Emitter:
    """Sends the jobs of offload routes.

    Parameters
    ----------
    dispatcher : Dispatcher
    statistics : PlannerStatistics
    presences : sequence of Presence
        Of tiers that may be out of reach: what was to go there is dropped.
    timeout_s : float
        Until a job counts as draining.
    is_closed : callable
    pauses : bool
        After each job, for threads that wait for the lock; needless where the caller is the only one.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        statistics: PlannerStatistics,
        presences: Sequence[Presence],
        timeout_s: float,
        is_closed: Callable[[], bool],
        pauses: bool = True,
    ) -> None:
        self._dispatcher = dispatcher
        self._statistics = statistics
        self._presences = presences
        self._timeout_s = timeout_s
        self._is_closed = is_closed
        self._pauses = pauses

    def send(self, route: OffloadRoute) -> int:
        """Send what a route may send now; give the number of jobs."""
        num_jobs = 0
        while True:
            unsent: Unsent = deque()
            try:
                with self._dispatcher.locked():
                    if self._is_closed():
                        return num_jobs
                    if self._statistics.lost_executors:
                        route.drop_queue("executor_lost")
                    if any(presence.is_away and presence.pool is route.destination for presence in self._presences):
                        route.drop_queue("away")
                    job = route.emit()
                    if job is None:
                        return num_jobs
                    self._dispatcher.open(job, route.settle, self._timeout_s, unsent)
            except BaseException:
                self._dispatcher.give_up(unsent)
                raise
            self._dispatcher.send(unsent)
            num_jobs += 1
            if self._pauses:
                time.sleep(_PAUSE_S)
