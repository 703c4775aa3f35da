"""Asking stores that others fill for what a request misses: what was stored after the engine's start is found so.

A request waits for the answer no longer than a small part of the time that computing the missing blocks takes. An
answer that comes later is known to the requests behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbm.engines.groups import Group
from kvbm.engines.requests import Request
from kvbm.planner import PlannerSteps
from kvbm.types import HashArray

_LONGEST_S = 0.25  # that a request waits
_SHARE = 0.03  # of the time of computing what it misses


class StoreQuestions:
    """Asks once for each request.

    Parameters
    ----------
    groups : sequence of Group
    pumps : sequence of PlannerSteps
        Of their planners.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(self, groups: Sequence[Group], pumps: Sequence[PlannerSteps], *, clock: Callable[[], float]) -> None:
        self._stores = [
            (presence, pump) for group, pump in zip(groups, pumps, strict=True) for presence in group.planner.presences
        ]
        self._clock = clock

    def is_waiting(
        self, request: Request, names: HashArray, num_there: int, *, computing_s: float | None, step_s: float
    ) -> bool:
        """Ask, the first time; tell whether the answer is worth waiting for, still.

        Parameters
        ----------
        request : Request
        names : (num_blocks, 2) uint64
            Of all blocks that the request can use.
        num_there : int
            Leading ones that the engine has, or that lie in some tier.
        computing_s : float, optional
            Seconds that computing the others takes; None while that is not known.
        step_s : float
            Seconds until the engine asks again.
        """
        if not self._stores or num_there >= len(names):
            return False
        now = self._clock()
        if request.asks_until is None:
            wait_s = _LONGEST_S if computing_s is None else min(_LONGEST_S, _SHARE * computing_s)
            request.asks_until = now + wait_s if step_s <= wait_s else now
            for presence, pump in self._stores:
                if presence.has_unknown(names[num_there:]):
                    presence.want(names, num_there)
                    pump.wake()
        return now < request.asks_until and any(presence.is_asking for presence, _ in self._stores)
