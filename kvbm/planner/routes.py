"""The routes of offloading between neighbouring pools, and which of them want to hear of uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from kvbm.planner.complaints import Complaints
from kvbm.planner.counters import PlannerStatistics
from kvbm.planner.limits import Limits
from kvbm.planner.lineage import Lineages
from kvbm.planner.offload import Moved, OffloadRoute
from kvbm.planner.policies import AlwaysPolicy, OffloadPolicy
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool


def make_routes(
    pools: Sequence[BlockPool],
    policies: Sequence[OffloadPolicy] | None,
    *,
    limits: Limits,
    statistics: PlannerStatistics,
    lineages: Lineages,
    next_id: Callable[[], int],
    moved: Moved,
    complaints: Complaints,
    records: RecordKeeper,
) -> tuple[list[OffloadRoute], list[OffloadRoute]]:
    """Make a route for each pair of neighbours; give them, and those whose policy counts uses.

    Parameters
    ----------
    pools : sequence of BlockPool
        From the top tier down.
    policies : sequence of OffloadPolicy, optional
        One for each pair; default: write-through.
    limits, statistics, lineages, next_id, moved, complaints, records
        As for `OffloadRoute`.
    """
    pairs = list(itertools.pairwise(pools))
    chosen = policies if policies is not None else [AlwaysPolicy() for _ in pairs]
    routes = [
        OffloadRoute(
            source,
            destination,
            policy,
            limits=limits,
            counters=statistics.route(source.tier, destination.tier),
            lineages=lineages,
            next_id=next_id,
            moved=moved,
            complaints=complaints,
            records=records,
        )
        for (source, destination), policy in zip(pairs, chosen, strict=True)
    ]
    counting = [route for route, policy in zip(routes, chosen, strict=True) if policy.counts_uses]
    return routes, counting
