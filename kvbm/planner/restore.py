"""What outlived the process is registered when a manager starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from kvbm.errors import KvbmError
from kvbm.planner.offload import OffloadRoute
from kvbm.planner.presence import Presence
from kvbm.planner.records import RecordKeeper
from kvbm.pool import BlockPool

_log = logging.getLogger("kvbm.manager")


def restore_pools(pools: Iterable[BlockPool], records: RecordKeeper) -> int:
    """Register what the tiers that outlive the process hold already; give how many blocks.

    A tier that cannot say in time, or says nonsense, starts empty; that is logged.
    """
    num_blocks = 0
    for pool in pools:
        if pool.tier not in records.tiers - records.keyed_tiers:
            continue
        began = time.monotonic()
        try:
            num_found = records.restore(pool).result()
        except (KvbmError, ValueError) as error:
            _log.warning("tier starts empty tier=%s error=%s", pool.tier.value, error)
            continue
        _log.info(
            "tier restored tier=%s num_blocks=%d seconds=%.3f", pool.tier.value, num_found, time.monotonic() - began
        )
        num_blocks += num_found
    return num_blocks


def restore_tiers(
    pools: Iterable[BlockPool],
    records: RecordKeeper,
    routes: Iterable[OffloadRoute],
    presences: Iterable[Presence],
    *,
    locked: Callable[[], AbstractContextManager[object]],
) -> None:
    """Restore pools, and ask what keyed tiers hold; nobody waits for those.

    What is restored was offered to the tiers below in its first life, and is not offered again.
    """
    restore_pools(pools, records)
    with locked():
        for route in routes:
            route.skip()
    for presence in presences:
        presence.list()
