"""Lanes of the channel within one process: two threads for routes to and from storages without addresses."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.jobs import CopyJob, Job, JobResult, LocalChannel, Outcome
from kvbm.types import Tier

PATIENCE_S = 60.0
DOWN, TO_DISK, UP = (Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK), (Tier.DISK, Tier.DEVICE)
MakeJob = Callable[..., CopyJob]


def opened(execute: Any, box: Any, **settings: Any) -> LocalChannel:
    channel = LocalChannel(execute, **settings)
    channel.open(box.receive, box.lose)
    return channel


def kvbm_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("kvbm-"))


def is_bounded(job: Job) -> bool:
    """Tell disks from memory, as an executor does."""
    return isinstance(job, CopyJob) and Tier.DISK not in (job.source, job.destination)


@pytest.mark.parametrize("route", [TO_DISK, UP])
def test_two_jobs_of_a_route_to_or_from_disk_run_at_once_and_a_third_waits(
    copy_job: MakeJob, box: Any, gated: Any, route: Any
) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    for job_id in range(3):
        channel.send(copy_job(job_id, route))
    gated.wait_until_started(0, 1)
    assert len(kvbm_threads()) == 2
    assert channel.revoke(2), "no thread has begun it"
    channel.send(copy_job(3, route))
    gated.let(1)
    gated.wait_until_started(3)
    assert 0 not in box.ids, "one that takes long holds up no other"
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 2, 3]
    assert kvbm_threads() == []


def test_copies_between_memories_keep_one_thread(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    for job_id in range(3):
        channel.send(copy_job(job_id, DOWN))
    channel.send(copy_job(3, TO_DISK))
    gated.wait_until_started(0, 3)
    assert kvbm_threads() == ["kvbm-device-host", "kvbm-host-disk"]
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert [job_id for job_id in gated.started if job_id != 3] == [0, 1, 2]


def test_second_thread_starts_only_where_the_first_is_busy(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    gated.let_all()
    channel.send(copy_job(0, UP))
    box.wait_for(lambda box: box.ids == [0])
    (lane,) = channel._lanes.values()
    for job_id in range(1, 4):
        give_up = time.monotonic() + PATIENCE_S
        while not lane._num_idle:
            assert time.monotonic() < give_up
        channel.send(copy_job(job_id, UP))
        box.wait_for(lambda box, job_id=job_id: job_id in box.ids)
    assert kvbm_threads() == ["kvbm-disk-device"]
    assert channel.close(PATIENCE_S)


def test_thread_that_has_yet_to_begin_is_not_taken_for_a_busy_one(
    copy_job: MakeJob, box: Any, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_begin = threading.Event()
    monkeypatch.setattr("kvbm.jobs.channel._let_others_go_first", lambda: may_begin.wait(PATIENCE_S))
    channel = opened(gated, box, is_bounded=is_bounded)
    gated.let_all()
    channel.send(copy_job(0, UP))
    assert kvbm_threads() == ["kvbm-disk-device"]
    channel.send(copy_job(1, UP))
    assert kvbm_threads() == 2 * ["kvbm-disk-device"]
    may_begin.set()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1]


def test_close_waits_for_both_threads_of_a_route(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    for job_id in range(4):
        channel.send(copy_job(job_id, UP))
    gated.wait_until_started(0, 1)
    for first, second in ((0, 2), (2, 3)):
        gated.let(first)
        gated.wait_until_started(second)
    assert not channel.close(0.001), "two are still under way"
    gated.let(3)
    box.wait_for(lambda box: 3 in box.ids)
    assert not channel.close(0.001), "one is, on the other thread"
    assert kvbm_threads() == ["kvbm-disk-device"]
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 2, 3]


def test_callback_on_one_thread_of_a_route_that_closes_waits_for_the_other(copy_job: MakeJob, gated: Any) -> None:
    channel = LocalChannel(gated, is_bounded=is_bounded)
    closed: dict[int, bool] = {}
    was_tried, has_ended = threading.Event(), threading.Event()

    def receive(result: JobResult) -> None:
        if result.job_id == 1:
            closed[0] = channel.close(0.001)
            was_tried.set()
            closed[1] = channel.close(PATIENCE_S)
            has_ended.set()

    channel.open(receive, lambda reason: None)
    for job_id in (0, 1):
        channel.send(copy_job(job_id, UP))
    gated.wait_until_started(0, 1)
    gated.let(1)
    assert was_tried.wait(PATIENCE_S)
    assert not has_ended.is_set(), "the other thread still works"
    gated.let_all()
    assert has_ended.wait(PATIENCE_S)
    assert closed == {0: False, 1: True}
    assert channel.close(PATIENCE_S)
    assert kvbm_threads() == []


def test_callback_may_wait_for_another_job_of_its_route(copy_job: MakeJob, box: Any, gated: Any) -> None:
    """As where it onboards from the disk that its own blocks came from."""
    gated.let_all()
    channel = LocalChannel(gated, is_bounded=is_bounded)
    has_come = threading.Event()
    waited: list[bool] = []

    def receive(result: JobResult) -> None:
        if result.job_id == 0:
            channel.send(copy_job(1, UP))
            waited.append(has_come.wait(PATIENCE_S))
        else:
            has_come.set()
        box.receive(result)

    channel.open(receive, box.lose)
    channel.send(copy_job(0, UP))
    box.wait_for(lambda box: len(box.ids) == 2)
    assert waited == [True]
    assert box.ids == [1, 0]
    assert channel.close(PATIENCE_S)


def test_a_job_is_known_until_it_is_answered(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    assert not channel.knows(0)
    for job_id in range(4):
        channel.send(copy_job(job_id, TO_DISK))
    gated.wait_until_started(0, 1)
    assert [channel.knows(job_id) for job_id in range(5)] == [True] * 4 + [False], "two run, two wait"
    assert channel.revoke(2)
    assert not channel.knows(2)
    gated.let(0, 3)
    box.wait_for(lambda box: 3 in box.ids)
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert [channel.knows(job_id) for job_id in range(4)] == [False] * 4
    assert sorted(box.ids) == [0, 1, 2, 3]


def test_a_job_to_disk_is_never_run_by_whoever_waits_for_it(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    for job_id in range(3):
        channel.send(copy_job(job_id, TO_DISK))
    gated.wait_until_started(0, 1)
    assert [channel.run_here(job_id) for job_id in range(3)] == [False] * 3, "it could hang"
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert set(gated.threads.values()) == {"kvbm-host-disk"}


def test_abandoned_route_answers_what_neither_thread_has_begun(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    for job_id in range(5):
        channel.send(copy_job(job_id, UP))
    gated.wait_until_started(0, 1)
    channel.abandon()
    assert [(result.job_id, result.outcomes.tolist()) for result in box.results] == [
        (job_id, [Outcome.LATE] * 2) for job_id in (2, 3, 4)
    ]
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert gated.started == [0, 1]


def test_route_whose_second_thread_cannot_start_goes_on_with_one(
    copy_job: MakeJob, box: Any, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = opened(gated, box, is_bounded=is_bounded)
    channel.send(copy_job(0, TO_DISK))
    gated.wait_until_started(0)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        channel.send(copy_job(1, TO_DISK))
        with pytest.raises(RuntimeError):
            channel.send(copy_job(2, DOWN))
    assert gated.started == [0]
    channel.send(copy_job(3, TO_DISK))
    gated.wait_until_started(1)
    assert len(kvbm_threads()) == 2, "it tries again with the next job"
    gated.let_all()
    channel.send(copy_job(4, DOWN))
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 3, 4], "what was refused is not answered, what was taken is"


@pytest.mark.skipif(sys.platform != "linux", reason="no niceness of one thread")
def test_an_urgent_job_is_not_slowed_by_the_prefetch_before_it(copy_job: MakeJob, box: Any) -> None:
    seen: dict[int, int] = {}

    def execute(job: Job, deadline: float | None) -> JobResult:
        seen[job.job_id] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return JobResult(job_id=job.job_id, outcomes=np.zeros(2, dtype=np.uint8))

    channel = opened(execute, box, is_bounded=is_bounded)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    if mine >= 10:
        pytest.skip(f"everything here has niceness {mine}")
    for job_id, is_urgent in enumerate([False, True, False]):
        channel.send(copy_job(job_id, UP, is_urgent=is_urgent))
        box.wait_for(lambda box, job_id=job_id: job_id in box.ids)
    assert channel.close(PATIENCE_S)
    assert seen[1] == mine
    assert seen[0] == seen[2] > mine, "and those that nobody waits for are"
