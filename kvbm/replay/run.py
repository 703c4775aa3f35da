"""Sends the requests of a trace through a manager one after the other, in their order.

Each one waits for everything that it caused in lower tiers, so that figures do not depend on how fast the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kvbm.manager import BlockManager
from kvbm.replay.report import Baseline, ReplayReport, Served
from kvbm.replay.request import hashes_of, serve
from kvbm.replay.traces import TraceRequest
from kvbm.types import HashArray

OnServed = Callable[[int, HashArray, Served], None]

ROOM_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 120.0


def replay(
    manager: BlockManager,
    requests: Iterable[TraceRequest],
    *,
    report: ReplayReport | None = None,
    on_progress: Callable[[ReplayReport], None] | None = None,
    on_served: OnServed | None = None,
) -> ReplayReport:
    """Replay requests one after the other, each until its blocks are offloaded.

    Parameters
    ----------
    manager : BlockManager
    requests : iterable of TraceRequest
        Making or reading them is not counted in the report's `seconds`.
    report : ReplayReport, optional
        Filled as the replay goes, so that it is there when the replay is interrupted.
    on_progress : callable, optional
        Called with the report after each request.
    on_served : callable, optional
        Told of each request that has ended: which of those given, its hashes, and what came of it.

    Returns
    -------
    ReplayReport
        `wrong_bytes` is 0 when every hit held what had been written.

    Raises
    ------
    TransferTimeout
        Offloads of one request do not end within two minutes.
    """
    report = ReplayReport() if report is None else report
    baseline = Baseline(manager)
    try:
        for index, request in enumerate(requests):
            began = time.perf_counter()
            hashes = hashes_of(manager, request)
            served = serve(manager, hashes, timeout_s=ROOM_TIMEOUT_S, flush_timeout_s=FLUSH_TIMEOUT_S)
            if report.add(served, seconds=time.perf_counter() - began):
                report.take_point(manager)
            if on_served is not None:
                on_served(index, hashes, served)
            if on_progress is not None:
                on_progress(report)
    except BaseException:
        report.is_partial = True
        raise
    finally:
        report.take_point(manager)
        baseline.conclude(report)
    return report
