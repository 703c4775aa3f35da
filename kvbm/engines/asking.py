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

_LONGEST_S = 0.25  # that a request waits, and that a store may take to answer before nobody waits for it any more
_SHARE = 0.03  # of the time of computing what it misses


class StoreQuestions:
    """Asks once for each request.

    Parameters
    ----------
    groups : sequence of Group
    pumps : sequence of PlannerSteps
        Of their planners.
    waits_always : bool
        As long as may be, however short computing is.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        pumps: Sequence[PlannerSteps],
        *,
        waits_always: bool = False,
        clock: Callable[[], float],
    ) -> None:
        self._stores = [
            (presence, pump) for group, pump in zip(groups, pumps, strict=True) for presence in group.planner.presences
        ]
        self._waits_always = waits_always
        self._clock = clock

    def ask(
        self, request: Request, names: HashArray, num_there: int, *, computing_s: float | None, step_s: float
    ) -> None:
        """Ask, the first time.

        Parameters
        ----------
        request : Request
        names : (num_blocks, 2) uint64
            Of all blocks that the request can use.
        num_there : int
            Leading ones that the engine has, or that lie in some tier.
        computing_s : float, optional
            Seconds that computing the others takes; None while that is not known, and then nobody waits.
        step_s : float
            Seconds until the engine asks again.
        """
        if not self._stores or request.asks_until is not None or num_there >= len(names):
            return
        wait_s = _LONGEST_S if self._waits_always else min(_LONGEST_S, _SHARE * (computing_s or 0.0))
        request.asks_until = self._clock() + (wait_s if step_s <= wait_s else 0.0)
        for presence, pump in self._stores:
            if presence.has_unknown(names[num_there:]):
                request.wishes.append((presence, presence.want(names, num_there)))
                pump.wake()

    def is_waiting(self, request: Request) -> bool:
        """Tell whether the answer to what was asked for a request is worth waiting for, still."""
        now = self._clock()
        if request.asks_until is None or now >= request.asks_until:
            return False
        return any(
            wish.is_open
            and not presence.is_away
            and (presence.asked_at is None or now - presence.asked_at < _LONGEST_S)  # whoever asked: it may hang
            for presence, wish in request.wishes
        )
