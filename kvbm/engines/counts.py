"""What a connector counts, for an engine's own statistics: the metrics of `kvbm.metrics`, as changes since last time.

Engines carry statistics from process to process as plain data; so does this: names, labels, numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kvbm.engines.groups import Group
from kvbm.engines.shard import Shard
from kvbm.metrics.reading import Reading, SlabReading
from kvbm.metrics.table import METRICS
from kvbm.planner.counters import PlannerStatistics
from kvbm.types import Tier

Data = dict[str, dict[str, list[tuple[tuple[str, ...], float]]]]  # kind -> metric -> label values and number

_EVERY_S = 1.0
_KINDS = {"counter": "counters", "gauge": "gauges"}
_NAMES = {metric.name: metric.kind for metric in METRICS if metric.kind in _KINDS}


class Counts:
    """Gives what has changed, at most once a second.

    Parameters
    ----------
    read : callable
        Gives readings; their numbers are added up.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(self, read: Callable[[], Sequence[Reading]], *, clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._due_at = clock()
        self._given: dict[tuple[str, tuple[str, ...]], float] = {}

    def take(self) -> Data | None:
        """Give counters as what was added since the last call, and gauges; None while it is too early."""
        now = self._clock()
        if now < self._due_at:
            return None
        self._due_at = now + _EVERY_S
        sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        for reading in self._read():
            for metric in METRICS:
                if metric.name in _NAMES:
                    for labels, value in metric.read(reading):
                        sums[metric.name, labels] += value
        data: Data = {"counters": {}, "gauges": {}}
        for (name, labels), value in sums.items():
            kind = _NAMES[name]
            added = value - self._given.get((name, labels), 0) if kind == "counter" else value
            if added or kind == "gauge":
                data[_KINDS[kind]].setdefault(name, []).append((labels, added))
        self._given = sums
        return data


def add(one: Data, other: Data) -> Data:
    """Put two together: counters are added up, gauges are the later ones, `other`'s."""
    counters: dict[str, dict[tuple[str, ...], float]] = {}
    for data in (one, other):
        for name, rows in data.get("counters", {}).items():
            mine = counters.setdefault(name, defaultdict(float))
            for labels, value in rows:
                mine[tuple(labels)] += value  # a list, once it has been through an encoder
    gauges = one.get("gauges", {}) | other.get("gauges", {})
    return {"counters": {name: list(rows.items()) for name, rows in counters.items()}, "gauges": gauges}


def read_groups(groups: Sequence[Group]) -> list[Reading]:
    """Read what the scheduler's half counts."""
    readings = []
    for group in groups:
        pools = {pool.tier.value: pool for pool in group.planner.pools}
        readings.append(
            Reading(
                pools={tier: pool.status() for tier, pool in pools.items()},
                allocation_s={},
                planner=group.planner.statistics(),
                block_nbytes={},
                disk=None,
                is_direct=None,
                away={presence.tier.value: presence.is_away for presence in group.planner.presences},
            )
        )
    return readings


def read_shards(shards: Sequence[Shard]) -> list[Reading]:
    """Read what a worker's half counts: its disks and object stores."""
    readings = []
    for shard in shards:
        disk, remote = shard.storages.get(Tier.DISK), shard.storages.get(Tier.REMOTE)
        readings.append(
            Reading(
                pools={},
                allocation_s={},
                planner=PlannerStatistics(),
                block_nbytes={},
                disk=getattr(disk, "counters", None),
                is_direct=None if disk is None else getattr(disk, "io_mode", None) == "direct",
                slab=SlabReading.of(disk) if hasattr(disk, "slab") else None,
                remote=getattr(remote, "counters", None),
                is_available=getattr(remote, "is_available", None),
            )
        )
    return readings


def summary(data: Data) -> dict[str, Any]:
    """Give the few numbers that a line of a log has room for: what was loaded, saved, found, lost."""
    totals = {name: sum(value for _, value in rows) for name, rows in data.get("counters", {}).items()}
    names = {
        "hit blocks": "kvbm_hit_blocks",
        "saved blocks": "kvbm_offload_blocks",
        "loaded blocks": "kvbm_onboard_blocks",
        "dropped blocks": "kvbm_dropped_blocks",
        "checksum mismatches": "kvbm_checksum_mismatches",
    }
    return {text: int(totals[name]) for text, name in names.items() if totals.get(name)}
