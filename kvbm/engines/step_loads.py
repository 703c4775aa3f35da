"""Loads that a step's own pass reads: they run in the engine's thread, or on a GPU are queued there, layer by layer.

All calls come from that thread, in the order of a step: `add`, `begin`, `wait` for each layer, `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvbm.engines.messages import LoadOrder
from kvbm.engines.runner import JobRunner, streams_of
from kvbm.engines.stream_copies import LayerLoad
from kvbm.jobs import CopyJob, JobResult

JobIds = set[tuple[int, int]]  # group and number


class StepLoads:
    """The synchronous loads of one step after the other.

    Parameters
    ----------
    runners : sequence of JobRunner
        One for each group of layers.
    receive : callable
        Takes a group and a result.
    wait_for_end : callable
        Waits until jobs that were sent elsewhere have ended.
    """

    def __init__(
        self,
        runners: Sequence[JobRunner],
        *,
        receive: Callable[[int, JobResult], None],
        wait_for_end: Callable[[JobIds], None],
    ) -> None:
        self._runners = runners
        self._receive = receive
        self._wait_for_end = wait_for_end
        self._orders: list[LoadOrder] = []
        self._jobs: list[tuple[int, CopyJob]] = []  # not begun
        self._begun: JobIds = set()
        self._layers: dict[int, LayerLoad] = {}  # by group

    @property
    def job_ids(self) -> JobIds:
        """The jobs that the orders of this step name."""
        return {job_id for order in self._orders for job_id in order.job_ids}

    @property
    def has_work(self) -> bool:
        """Whether `finish` has yet to be called for loads of this step."""
        return bool(self._orders or self._jobs or self._layers)

    @property
    def has_layers(self) -> bool:
        """Whether layers may still be on their way: `wait` does something."""
        return bool(self._layers)

    def add_orders(self, orders: Iterable[LoadOrder]) -> None:
        """Take orders of this step."""
        self._orders.extend(orders)

    def add_job(self, group: int, job: CopyJob) -> None:
        """Take a job that an order names."""
        self._jobs.append((group, job))

    def begin(self, stream: Any = None, *, by_layer: bool = False) -> None:
        """Begin the loads; arguments and notes as for `WorkerCore.begin_sync_loads`."""
        jobs, self._jobs = self._jobs, []
        for group, runner in enumerate(self._runners):
            mine = [job for number, job in jobs if number == group]
            streams = streams_of(runner)
            if streams is None:
                for job in mine:
                    self._receive(group, runner.execute(job))
            elif mine:
                load = self._layers[group] = streams.begin_layers(mine, streams.mark(stream))
                if not by_layer:
                    load.wait_all(stream)
        self._begun.update((group, job.job_id) for group, job in jobs)
        self._wait_for_end(self.job_ids - self._begun)  # they were sent with earlier orders

    def wait(self, layer: int, *, group: int = 0, stream: Any = None) -> None:
        """Let a stream wait for a layer; as `WorkerCore.wait_for_layer`."""
        load = self._layers.get(group)
        if load is not None:
            load.wait(layer, stream)

    def finish(self) -> list[LoadOrder]:
        """Wait until the bytes were compared with their checksums; give the orders of this step, once."""
        self.begin()
        layers, self._layers = self._layers, {}
        for group, load in layers.items():
            for result in load.finish():
                self._receive(group, result)
        orders, self._orders = self._orders, []
        self._begun.clear()
        return orders
