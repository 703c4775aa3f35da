"""When a load is given up, and whether it was worth it.

A load is judged by the clock of whoever waits. But an engine hears of it with its steps: what comes with the first
report that could bring it was as fast as any, however long that step took.
"""

from __future__ import annotations

from collections.abc import Callable

from kvbm.engines.requests import Request
from kvbm.engines.speed import PrefillSpeed, TierGuard
from kvbm.types import Tier

_SHORTEST_S = 0.25  # that a load may take; a shorter one would end for a pause of the machine


class LoadJudge:
    """Watches the loads of an engine.

    Parameters
    ----------
    top : Tier
        The highest tier below the engine's memory.
    timeout_s : float
        Of a load at most.
    loads_always : bool
        Give none up because computing is sooner.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    speed : PrefillSpeed
    guard : TierGuard
    """

    def __init__(self, *, top: Tier, timeout_s: float, loads_always: bool, clock: Callable[[], float]) -> None:
        self.speed = PrefillSpeed()
        self.guard = TierGuard(clock)
        self._top = top
        self._timeout_s = timeout_s
        self._loads_always = loads_always
        self._clock = clock
        self._num_begun = self._num_ended = 0  # steps

    def timeout_of(self, num_tokens: int) -> float:
        """Give the seconds after which a load is given up: those that computing its tokens takes."""
        computing_s = None if self._loads_always else self.speed.seconds(num_tokens)
        if computing_s is None:
            return self._timeout_s
        return min(self._timeout_s, max(_SHORTEST_S, computing_s))

    def begin_step(self) -> None:
        """Note that orders are given."""
        self._num_begun += 1

    def end_step(self) -> None:
        """Note that the reports of a step have come."""
        self._num_ended += 1

    def begin(self, request: Request) -> None:
        """Note that a load is ordered with the next step, or its first part is."""
        num_under_way = self._num_begun - self._num_ended
        request.earliest_step = self._num_begun + 1
        if request.lowest not in (None, self._top):  # to the top tier first, and on with a later step
            request.earliest_step += 1 + num_under_way

    def end(self, request: Request) -> None:
        """Judge a load that was reported."""
        computing_s = self.speed.seconds(request.num_loading)
        if request.lowest is None or computing_s is None:
            return
        seconds = self._clock() - request.began_at
        is_early = self._num_ended <= request.earliest_step
        self.guard.observe(request.lowest, min(seconds, computing_s) if is_early else seconds, computing_s)
