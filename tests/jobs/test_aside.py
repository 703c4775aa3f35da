"""Callbacks that wait for further jobs of the route whose threads they run in: others work meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.jobs import CopyJob, Job, JobResult, LocalChannel, Transfer
from kvbm.landing import wait_until_landed
from kvbm.types import Tier

PATIENCE_S = 60.0
DOWN, UP = (Tier.DEVICE, Tier.HOST), (Tier.DISK, Tier.DEVICE)
MakeJob = Callable[..., CopyJob]

WAITS: dict[str, Callable[[Transfer[JobResult]], Any]] = {
    "for as long as it takes": lambda transfer: transfer.result(),
    "for a time": lambda transfer: transfer.result(PATIENCE_S),
    "until it has landed": wait_until_landed,
}


def is_bounded(job: Job) -> bool:
    """Tell disks from memory, as an executor does."""
    return isinstance(job, CopyJob) and Tier.DISK not in (job.source, job.destination)


def kvbm_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvbm-")]


class Site:
    """A channel whose jobs have a transfer each, and callbacks that run where a result is taken."""

    def __init__(self, execute: Any) -> None:
        self.transfers: dict[int, Transfer[JobResult]] = {}
        self.channel = LocalChannel(execute, is_bounded=is_bounded)
        self.channel.open(self._receive, lambda reason: None)

    def _receive(self, result: JobResult) -> None:
        self.transfers[result.job_id].set_result(result)

    def send(self, job: Job, callback: Callable[[Any], None] | None = None) -> Transfer[JobResult]:
        transfer = self.transfers[job.job_id] = Transfer()
        if callback is not None:
            transfer.add_done_callback(callback)
        self.channel.send(job)
        return transfer


@pytest.fixture
def site(gated: Any) -> Site:
    return Site(gated)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("route", [UP, DOWN])
def test_callbacks_in_all_threads_of_a_route_may_wait_for_jobs_of_that_route(
    copy_job: MakeJob, gated: Any, site: Site, route: Any, wait: str
) -> None:
    """As where they onboard from the disk that their own blocks came from."""
    are_in = threading.Barrier(2 if route == UP else 1)
    done: dict[int, JobResult] = {}
    are_done = threading.Semaphore(0)

    def load_more(job_id: int) -> Callable[[Any], None]:
        def callback(_: Any) -> None:
            are_in.wait(PATIENCE_S)  # no thread of the route is free
            transfer = site.send(copy_job(job_id + 10, route))
            WAITS[wait](transfer)
            done[job_id] = transfer.result(0)
            are_done.release()

        return callback

    outer = [site.send(copy_job(job_id, route), load_more(job_id)) for job_id in range(are_in.parties)]
    gated.let_all()
    assert all(are_done.acquire(timeout=PATIENCE_S) for _ in outer)
    assert site.channel.close(PATIENCE_S)
    assert sorted(done) == list(range(are_in.parties))
    assert all(transfer.done() for transfer in outer)
    assert not kvbm_threads()


def test_callback_may_wait_for_a_job_that_was_queued_before_it_ran(copy_job: MakeJob, gated: Any, site: Site) -> None:
    seen: list[int] = []
    later: list[Transfer[JobResult]] = []

    def wait(_: Any) -> None:
        seen.append(later[0].result(PATIENCE_S).job_id)

    site.send(copy_job(0, UP), wait)
    site.send(copy_job(1, UP))  # hangs
    gated.wait_until_started(0, 1)
    later.append(site.send(copy_job(2, UP)))
    gated.let(0, 2)
    assert later[0].result(PATIENCE_S).job_id == 2
    gated.let_all()
    assert site.channel.close(PATIENCE_S)
    assert seen == [2]


def test_waits_within_waits_end(copy_job: MakeJob, gated: Any, site: Site) -> None:
    depth = 12
    reached: list[int] = []
    are_back = threading.Semaphore(0)

    def go_down(level: int) -> Callable[[Any], None]:
        def callback(_: Any) -> None:
            if level < depth:
                site.send(copy_job(level + 1, UP), go_down(level + 1)).result(PATIENCE_S)
            reached.append(level)
            are_back.release()

        return callback

    gated.let_all()
    site.send(copy_job(0, UP), go_down(0))
    assert all(are_back.acquire(timeout=PATIENCE_S) for _ in range(depth + 1))
    assert site.channel.close(PATIENCE_S)
    assert sorted(reached) == list(range(depth + 1))


def test_thread_that_stood_in_leaves_when_the_other_is_back(copy_job: MakeJob, gated: Any, site: Site) -> None:
    inner: list[Transfer[JobResult]] = []

    def wait(_: Any) -> None:
        inner.append(site.send(copy_job(10, DOWN)))
        inner[0].result(PATIENCE_S)

    site.send(copy_job(0, DOWN), wait)
    gated.let(0)
    gated.wait_until_started(10)
    assert len(kvbm_threads()) == 2
    site.send(copy_job(1, DOWN))
    site.send(copy_job(2, DOWN))
    gated.let(10)
    gated.wait_until_started(1)
    assert 2 not in gated.started, "one job at a time, whatever stood in"
    gated.let(1)
    gated.wait_until_started(2)
    (lane,) = site.channel._lanes.values()
    assert lane._num_present == 1
    gated.let_all()
    assert site.channel.close(PATIENCE_S)
    assert not kvbm_threads()


def test_executor_that_waits_for_its_bytes_keeps_its_thread(copy_job: MakeJob) -> None:
    """It is at work: were it counted as gone, a queue of jobs would make a thread of each."""
    moving: Transfer[int] = Transfer()
    started: list[int] = []
    are_two = threading.Event()

    def execute(job: Job, deadline: float | None) -> JobResult:
        started.append(job.job_id)
        if len(started) == 2:
            are_two.set()
        moving.result(PATIENCE_S)
        return JobResult(job_id=job.job_id, outcomes=np.zeros(2, dtype=np.uint8))

    site = Site(execute)
    for job_id in range(6):
        site.send(copy_job(job_id, UP))
    assert are_two.wait(PATIENCE_S)
    assert len(kvbm_threads()) == 2
    (lane,) = site.channel._lanes.values()
    assert lane._num_present == 2
    moving.set_result(1)
    assert site.channel.close(PATIENCE_S)
    assert sorted(started) == list(range(6))
