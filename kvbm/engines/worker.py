"""The worker's half of a connector: it runs the jobs of each step's orders and says what came of them.

An engine calls `begin` before a forward pass, `after_forward` behind it, and `take` to learn what it may report. Loads
begin at once; saves begin behind the pass that fills their blocks. Jobs run on the lanes of a `LocalChannel`. Loads
that the pass itself reads (synchronous ones) run in the engine's thread, between `begin_sync_loads` and
`finish_sync_loads`. Calls are the engine's, from one thread; results come from any.

On a GPU nothing of the engine's waits on the host: copies and its stream wait for each other on the device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

from kvbm.engines.messages import NO_ORDERS, LoadOrder, StepReport, decode_orders, encode_report
from kvbm.engines.runner import JobRunner, streams_of
from kvbm.engines.step_loads import StepLoads
from kvbm.errors import TransferTimeout
from kvbm.jobs import CopyJob, Job, JobResult, LocalChannel, Outcome, encode
from kvbm.jobs.messages import answer_all, decode_job
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
        Slots that do not hold what they should: of received requests, and of synchronous loads of this step.
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
    runners : sequence of Executor or Runner
        Of this rank, one for each group of layers.
    rank : int
    tier : Tier
        Of the engine's memory in jobs.
    following : collection of int
        Groups whose tiers below are rank 0's: this rank loads from there and saves nothing.
    """

    def __init__(
        self,
        runners: Sequence[JobRunner],
        *,
        rank: int = 0,
        tier: Tier = Tier.DEVICE,
        following: Collection[int] = (),
    ) -> None:
        self._rank = rank
        self._following = frozenset(following)
        self._tier = tier
        self._runners = list(runners)
        self._channels = [LocalChannel(one.execute, is_bounded=one.is_bounded) for one in runners]
        for group, channel in enumerate(self._channels):
            channel.open(partial(self._receive, group), lambda reason: None)
        self._lock = threading.Lock()  # guards what follows; never held while a job runs
        self._has_ended = threading.Condition(self._lock)
        self._open: dict[tuple[int, int], Job] = {}  # by group and number
        self._results: list[list[bytes]] = [[] for _ in runners]
        self._bad_slots: dict[tuple[int, int], list[int]] = {}  # of load jobs that have ended, until reported
        self._loads: dict[str, LoadOrder] = {}
        self._holds: dict[str, list[tuple[int, int]]] = {}
        self._empty_report = encode_report(StepReport(rank=rank, results=self._results))
        # Of this step, and of the engine's thread alone.
        self._saves: list[tuple[int, CopyJob]] = []  # to begin behind its forward pass
        self._held_loads: list[tuple[int, CopyJob]] = []  # to begin once the engine has done what it does to new blocks
        self._step_loads = StepLoads(self._runners, receive=self._receive, wait_for_end=self._wait_for_end)
        self._sync_lost: set[int] = set()  # slots, until they are told
        self._is_spoilt = False  # this step's pass has read some of them

    # -- a step ------------------------------------------------------------------------------------------------

    def begin(self, orders: bytes, *, stream: Any = None, holds_loads: bool = False) -> None:
        """Take a step's orders, before its forward pass.

        Parameters
        ----------
        orders : bytes
        stream : object, optional
            On a GPU the engine's, as for `kvbm.gpu.stream_handle`; None is the legacy default stream.
        holds_loads : bool
            Loads into the engine's memory wait for `begin_loads`.

        Raises
        ------
        MessageError
            They are none; nothing was begun.

        Notes
        -----
        With a fence in the orders it waits until no block of the engine's is being read, as long as that takes: copies
        between memories end. On a GPU the stream waits for that instead. Synchronous loads wait for `begin_sync_loads`.
        """
        if orders == NO_ORDERS and not self.has_step_work:  # a step of decoding, as a rule
            self._is_spoilt = False
            return
        step = decode_orders(orders)
        jobs = [
            (group, job)
            for group, part in enumerate(step.jobs)
            for job in map(decode_job, part)
            if group not in self._following or self._touches_engine(job)
        ]
        self._end_step(stream)
        self._is_spoilt = False
        if step.has_fence:
            self._hold_back_engine(stream)
        self._step_loads.add_orders(order for order in step.loads if order.is_sync)
        is_sync = self._step_loads.job_ids
        with self._lock:
            self._loads.update((order.request_id, order) for order in step.loads if not order.is_sync)
            self._holds.update((order.request_id, order.job_ids) for order in step.holds)
            self._open.update(((group, job.job_id), job) for group, job in jobs)
        for group, job in jobs:
            if not self._touches_engine(job):
                self._channels[group].send(job)
            elif job.source is self._tier:
                self._saves.append((group, job))
            elif (group, job.job_id) in is_sync:
                self._step_loads.add_job(group, job)
            else:
                self._held_loads.append((group, job))
        if not holds_loads:
            self.begin_loads(stream)

    def begin_loads(self, stream: Any = None) -> None:
        """Begin the loads that were held; may be called again.

        Parameters
        ----------
        stream : object, optional
            As for `begin`: loads wait, on the device, for what is queued there by now.
        """
        loads, self._held_loads = self._held_loads, []
        self._send(loads, stream)

    def begin_sync_loads(self, stream: Any = None, *, by_layer: bool = False) -> None:
        """Begin the loads that this step's pass reads; may be called again.

        Parameters
        ----------
        stream : object, optional
            As for `begin_loads`, and the pass is queued there.
        by_layer : bool
            `wait_for_layer` will be called for each layer before it is read. Otherwise the stream waits for all of
            them here.

        Notes
        -----
        On the CPU it returns when the bytes are there and were compared with their checksums. On a GPU it does not wait
        for them: the stream does.
        """
        self._step_loads.begin(stream, by_layer=by_layer)

    def wait_for_layer(self, layer: int, *, group: int = 0, stream: Any = None) -> None:
        """Let what is queued on a stream from now on wait until a layer of the synchronous loads is there.

        Parameters
        ----------
        layer : int
            Of the group, as its shard has them.
        group : int
        stream : object, optional
            As for `begin`.

        Notes
        -----
        The caller does not wait. On the CPU, and without a synchronous load, it does nothing.
        """
        self._step_loads.wait(layer, group=group, stream=stream)

    def finish_sync_loads(self) -> None:
        """Wait until the synchronous loads were compared with their checksums; may be called again.

        Notes
        -----
        What they have lost is in the next `take`. Blocks until the bytes are there, not until the pass has ended.
        """
        orders = self._step_loads.finish()
        with self._lock:
            for order in orders:
                self._sync_lost |= self._lost_slots(order)
        self._is_spoilt |= bool(self._sync_lost)

    def after_forward(self, stream: Any = None) -> None:
        """Begin the saves of this step: its forward pass has filled their blocks.

        Parameters
        ----------
        stream : object, optional
            As for `begin`: the pass is queued there.

        Notes
        -----
        After a synchronous load that lost a block, the pass has read bytes that nobody vouches for: none of the step's
        saves is begun, all are answered as failed. A follower answers saves too, for that alone: what one rank has read
        is in what all ranks compute.
        """
        self.finish_sync_loads()
        saves, self._saves = self._saves, []
        if self._is_spoilt and saves:
            _log.warning("saves dropped num_jobs=%d: the step read blocks that could not be loaded", len(saves))
            for group, job in saves:
                self._receive(group, answer_all(job, Outcome.FAILED, "the step read blocks that could not be loaded"))
            return
        for group, job in saves:
            if group in self._following:
                self._receive(group, answer_all(job, Outcome.OK, ""))
        self._send([(group, job) for group, job in saves if group not in self._following], stream)

    def take(self) -> StepNews:
        """Give what has ended since the last call."""
        has_news = self._loads or self._holds or self._sync_lost or any(self._results)  # what comes now can wait
        if not has_news:
            return StepNews(report=self._empty_report)
        news = StepNews()
        with self._lock:
            results, self._results = self._results, [[] for _ in self._channels]
            for request_id, order in list(self._loads.items()):
                if not any(job_id in self._open for job_id in order.job_ids):
                    del self._loads[request_id]
                    news.received.add(request_id)
                    lost = self._lost_slots(order)
                    if lost:
                        news.failed.add(request_id)
                        news.lost_slots |= lost
            for request_id, job_ids in list(self._holds.items()):
                if not any(job_id in self._open for job_id in job_ids):
                    del self._holds[request_id]
                    news.sent.add(request_id)
        news.lost_slots |= self._sync_lost
        self._sync_lost = set()
        news.report = encode_report(StepReport(rank=self._rank, results=results))
        return news

    # -- waiting -----------------------------------------------------------------------------------------------

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

    def wait_for_results(self, timeout_s: float) -> bool:
        """Wait until there is something to report, or nothing open; return whether it is so.

        For a step that computes nothing: its engine would only ask again.
        """
        with self._lock:
            return self._has_ended.wait_for(lambda: any(self._results) or not self._open, timeout_s)

    @property
    def has_step_work(self) -> bool:
        """Whether something of this step's has yet to begin or to end: where not, its calls but `take` do nothing."""
        return bool(self._saves or self._held_loads or self._step_loads.has_work)

    @property
    def has_layers(self) -> bool:
        """Whether layers of a synchronous load may still be on their way: `wait_for_layer` does something."""
        return self._step_loads.has_layers

    @property
    def num_open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    def close(self, timeout_s: float | None = None) -> bool:
        """Begin nothing more and wait for what runs; return whether it ended in time."""
        self._end_step(None)
        are_ended = [channel.close(timeout_s) for channel in self._channels]
        return all(are_ended)

    # -- private -----------------------------------------------------------------------------------------------

    def _send(self, jobs: Sequence[tuple[int, CopyJob]], stream: Any) -> None:
        """Hand copies of the engine's memory over, each behind what the engine has queued by now."""
        groups = {group for group, _ in jobs}
        of_groups = {group: streams_of(self._runners[group]) for group in groups}
        marks = {group: streams.mark(stream) for group, streams in of_groups.items() if streams is not None}
        for group, job in jobs:
            streams = of_groups[group]
            if streams is not None:
                streams.announce(job, marks[group])
            self._channels[group].send(job)

    def _end_step(self, stream: Any) -> None:
        """Begin what an engine without a pass has left of the last step."""
        self.begin_loads(stream)
        self.after_forward(stream)

    def _hold_back_engine(self, stream: Any) -> None:
        """Let the engine, or on a GPU its stream, wait until no block is being read."""
        streams = [streams_of(runner) for runner in self._runners]
        if any(one is None for one in streams):
            self.fence()
        for one in streams:
            if one is not None:
                one.hold_back(stream)

    def _wait_for_end(self, job_ids: set[tuple[int, int]]) -> None:
        with self._lock:
            self._has_ended.wait_for(lambda: not any(job_id in self._open for job_id in job_ids))

    def _lost_slots(self, order: LoadOrder) -> set[int]:
        """Give the slots of an order that do not hold what they should, under the lock, once its jobs have ended."""
        return set(order.lost_slots).union(*(self._bad_slots.pop(job, ()) for job in order.job_ids))

    def _touches_engine(self, job: Job) -> TypeGuard[CopyJob]:
        return isinstance(job, CopyJob) and self._tier in (job.source, job.destination)

    def _is_save(self, job: Job) -> bool:
        return isinstance(job, CopyJob) and job.source is self._tier

    def _receive(self, group: int, result: JobResult) -> None:
        data = encode(result)
        streams = streams_of(self._runners[group])
        if streams is not None:
            streams.forget(result.job_id)
        with self._lock:
            job = self._open.pop((group, result.job_id))
            self._results[group].append(data)
            if isinstance(job, CopyJob) and job.destination is self._tier and (result.outcomes != Outcome.OK).any():
                self._bad_slots[group, result.job_id] = job.destination_ids[result.outcomes != Outcome.OK].tolist()
            self._has_ended.notify_all()
