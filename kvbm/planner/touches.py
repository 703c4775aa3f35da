"""What requests have found, to be told to the tiers below the top, later and in batches.

Noting costs a request nothing; spreading is the planner thread's work and holds the planner's lock for one request at
a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvbm.planner.dispatch import Dispatcher
from kvbm.planner.lineage import Lineages
from kvbm.planner.offload import OffloadRoute
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool
from kvbm.types import HashArray

_CALLS_AT_ONCE = 64


class Touches:
    """Hits that wait to be spread, the oldest forgotten first.

    Parameters
    ----------
    pools : sequence of BlockPool
        Those to be told.
    routes : sequence of OffloadRoute
        Those whose policy counts uses.
    lineages : Lineages
    dispatcher : Dispatcher
    max_calls : int
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        routes: Sequence[OffloadRoute],
        *,
        lineages: Lineages,
        dispatcher: Dispatcher,
        max_calls: int,
    ) -> None:
        self._pools = tuple(pools)
        self._routes = tuple(routes)
        self._lineages = lineages
        self._dispatcher = dispatcher
        self._waiting: deque[HashArray] = deque(maxlen=max_calls)

    def note(self, hashes: HashArray) -> bool:
        """Remember a hit; return whether it is time to spread, from any thread."""
        self._waiting.append(hashes)
        return bool(self._routes) or len(self._waiting) % _CALLS_AT_ONCE == 0

    def spread(self) -> list[HashArray]:
        """Tell the tiers, and policies that count uses, what waits; give it."""
        touched = take_all(self._waiting)
        for hashes in touched:
            for pool in self._pools:
                pool.touch_blocks(hashes)
            with self._dispatcher.locked():
                self._lineages.add(hashes)
                for route in self._routes:
                    route.used(hashes)
        return touched


def take_all(waiting: deque[HashArray]) -> list[HashArray]:
    """Empty a queue that others append to."""
    taken = []
    while waiting:
        taken.append(waiting.popleft())
    return taken


def tell(
    records: RecordKeeper, routes: Sequence[OffloadRoute], touched: Sequence[HashArray], *, is_last: bool = False
) -> None:
    """Tell the executors that keep records what was used in the tiers that routes lead to; see `RecordKeeper.touch`."""
    for route in routes:
        records.touch(route.destination, [*touched, *take_all(route.young)], is_last=is_last)
