"""The worker's half of a connector: it runs the jobs of each step's orders and says what came of them.

An engine calls `begin` before a forward pass, `after_forward` behind it, and `take` to learn what it may report. Loads
begin at once; saves begin behind the pass that fills their blocks. Jobs run on the lanes of a `LocalChannel`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kvbm.engines.messages import LoadOrder, StepReport, decode_orders, encode_report
from kvbm.errors import TransferTimeout
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Job, JobResult, LocalChannel, Outcome, encode
from kvbm.jobs.messages import decode_job
from kvbm.types import Tier

_log = logging.getLogger("kvbm.engines")


@dataclass
class StepNews:
    """What a worker may tell its engine after a step.

    Attributes
    ----------
    received : set of str
        Requests whose load has ended.
    failed : set of str
        Those of them with slots that do not hold what they should.
    sent : set of str
        Requests whose blocks are saved, or given up.
    lost_slots : set of int
        Slots of received requests that do not hold what they should.
    report : bytes
        For the scheduler's half.
    """

    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    lost_slots: set[int] = field(default_factory=set)
    report: bytes = b""


class WorkerCore:
    """What a connector does in one worker of an engine.

    Parameters
    ----------
    executors : sequence of Executor
        Of this rank, one for each group of layers.
    rank : int
    tier : Tier
        Of the engine's memory in jobs.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        *,
        rank: int = 0,
        tier: Tier = Tier.DEVICE,
    ) -> None:
        self._rank = rank
        self._tier = tier
        self._channels = [LocalChannel(one.execute, is_bounded=one.is_bounded) for one in executors]
        for group, channel in enumerate(self._channels):
            channel.open(partial(self._receive, group), lambda reason: None)
        self._lock = threading.Lock()  # guards what follows; never held while a job runs
        self._has_ended = threading.Condition(self._lock)
        self._open: dict[tuple[int, int], Job] = {}  # by group and number
        self._results: list[list[bytes]] = [[] for _ in executors]
        self._bad_slots: dict[tuple[int, int], list[int]] = {}  # of load jobs that have ended, until reported
        self._loads: dict[str, LoadOrder] = {}
        self._holds: dict[str, list[tuple[int, int]]] = {}
        self._saves: list[tuple[int, Job]] = []  # of this step, to begin behind its forward pass

    def begin(self, orders: bytes) -> None:
        """Take a step's orders, before its forward pass.

        Parameters
        ----------
        orders : bytes

        Raises
        ------
        MessageError
            They are none; nothing was begun.

        Notes
        -----
        With a fence in the orders it waits until no block of the engine's is being read, as long as that takes: copies
        between memories end.
        """
        step = decode_orders(orders)
        jobs = [(group, decode_job(data)) for group, part in enumerate(step.jobs) for data in part]
        if step.has_fence:
            self.fence()
        with self._lock:
            for order in step.loads:
                self._loads[order.request_id] = order
            self._holds.update((order.request_id, order.job_ids) for order in step.holds)
            self._open.update(((group, job.job_id), job) for group, job in jobs)
        for group, job in jobs:
            if self._is_save(job):
                self._saves.append((group, job))
            else:
                self._channels[group].send(job)

    def after_forward(self) -> None:
        """Begin the saves of this step: its forward pass has filled their blocks."""
        saves, self._saves = self._saves, []
        for group, job in saves:
            self._channels[group].send(job)

    def fence(self, timeout_s: float | None = None) -> None:
        """Wait until no block of the engine's is being read.

        Raises
        ------
        TransferTimeout
            Some still are after `timeout_s` seconds.
        """
        self.after_forward()  # of a step that made no pass
        with self._lock:
            is_quiet = self._has_ended.wait_for(
                lambda: not any(self._is_save(job) for job in self._open.values()), timeout_s
            )
        if not is_quiet:
            raise TransferTimeout(f"blocks of the engine are still being saved after {timeout_s} s")

    def take(self) -> StepNews:
        """Give what has ended since the last call."""
        news = StepNews()
        with self._lock:
            results, self._results = self._results, [[] for _ in self._channels]
            for request_id, order in list(self._loads.items()):
                if not any(job_id in self._open for job_id in order.job_ids):
                    del self._loads[request_id]
                    news.received.add(request_id)
                    lost = set(order.lost_slots).union(*(self._bad_slots.pop(job, ()) for job in order.job_ids))
                    if lost:
                        news.failed.add(request_id)
                        news.lost_slots |= lost
            for request_id, job_ids in list(self._holds.items()):
                if not any(job_id in self._open for job_id in job_ids):
                    del self._holds[request_id]
                    news.sent.add(request_id)
        news.report = encode_report(StepReport(rank=self._rank, results=results))
        return news

    @property
    def num_open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    def close(self, timeout_s: float | None = None) -> bool:
        """Begin nothing more and wait for what runs; return whether it ended in time."""
        self.after_forward()
        are_ended = [channel.close(timeout_s) for channel in self._channels]
        return all(are_ended)

    # -- private -----------------------------------------------------------------------------------------------

    def _is_save(self, job: Job) -> bool:
        return isinstance(job, CopyJob) and job.source is self._tier

    def _receive(self, group: int, result: JobResult) -> None:
        data = encode(result)
        with self._lock:
            job = self._open.pop((group, result.job_id))
            self._results[group].append(data)
            if isinstance(job, CopyJob) and job.destination is self._tier and (result.outcomes != Outcome.OK).any():
                self._bad_slots[group, result.job_id] = job.destination_ids[result.outcomes != Outcome.OK].tolist()
            self._has_ended.notify_all()
