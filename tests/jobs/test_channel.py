"""The channel within one process: lanes, order, small jobs, defects of executors, closing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.errors import PoolClosed
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, Job, JobResult, LocalChannel, Outcome, ProbeJob, TouchedJob
from kvbm.types import Tier

PATIENCE_S = 60.0
DOWN, TO_DISK, UP = (Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK), (Tier.DISK, Tier.DEVICE)
MakeJob = Callable[..., CopyJob]


def all_ok(job: Job, deadline: float | None) -> JobResult:
    num_blocks = 0 if isinstance(job, InventoryJob) else len(job.hashes)
    return JobResult(job_id=job.job_id, outcomes=np.zeros(num_blocks, dtype=np.uint8))


def opened(execute: Any, box: Any, **settings: Any) -> LocalChannel:
    channel = LocalChannel(execute, **settings)
    channel.open(box.receive, box.lose)
    return channel


def kvbm_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("kvbm-"))


def test_each_route_has_a_thread_so_a_slow_one_holds_up_no_other(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box)
    for job_id, route in enumerate((DOWN, TO_DISK, UP)):
        channel.send(copy_job(job_id, route))
    gated.wait_until_started(0, 1, 2)
    assert sorted(gated.threads.values()) == ["kvbm-device-host", "kvbm-disk-device", "kvbm-host-disk"]
    gated.let(2)
    box.wait_for(lambda box: box.ids == [2])
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 2]
    assert box.lost == []


def test_books_of_a_tier_have_a_thread_of_their_own(box: Any, gated: Any) -> None:
    ids, names = np.arange(1, dtype=np.int32), np.zeros((1, 2), dtype=np.uint64)
    fields: dict[str, Any] = {"tier": Tier.DISK, "hashes": names}
    gated.let_all()
    channel = opened(gated, box)
    channel.send(ForgetJob(job_id=0, **fields))
    channel.send(TouchedJob(job_id=1, ids=ids, priorities=np.zeros(1, dtype=np.uint8), **fields))
    channel.send(ProbeJob(job_id=2, ids=ids, **fields))
    assert channel.close(PATIENCE_S)
    assert gated.started == [0, 1, 2], "in the order they were sent"
    assert set(gated.threads.values()) == {"kvbm-disk-index"}


def test_urgent_jobs_go_before_those_that_wait(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box)
    channel.send(copy_job(0))
    gated.wait_until_started(0)
    for job_id in (1, 2):
        channel.send(copy_job(job_id))
    for job_id in (3, 4):
        channel.send(copy_job(job_id, is_urgent=True))
    gated.wait_until_started(0, 3)
    assert gated.started == [0, 3], "it has a thread of its own, and one job of a route runs at a time"
    gated.let_all()
    assert channel.close(PATIENCE_S)
    assert [job_id for job_id in gated.started if job_id < 3] == [0, 1, 2]
    assert [job_id for job_id in gated.started if job_id >= 3] == [3, 4]


def test_small_urgent_jobs_run_in_the_callers_thread_before_send_returns(copy_job: MakeJob, box: Any) -> None:
    channel = opened(all_ok, box, is_small=lambda job: len(job.hashes) <= 2)
    channel.send(copy_job(0, is_urgent=True, is_alone=True))
    assert (box.ids, box.threads) == ([0], [threading.current_thread().name])
    channel.send(copy_job(1, is_urgent=True, is_alone=True, num_blocks=3))
    channel.send(copy_job(2))
    box.wait_for(lambda box: len(box.ids) == 3)
    assert set(box.threads[1:]) == {"kvbm-device-host"}, "large ones and those that nobody waits for do not"
    assert channel.close(PATIENCE_S)


def test_time_that_remains_becomes_a_moment_of_the_channels_clock(copy_job: MakeJob, box: Any, gated: Any) -> None:
    gated.let_all()
    channel = opened(gated, box, clock=lambda: 100.0)
    channel.send(copy_job(0, timeout_s=2.5))
    channel.send(copy_job(1))
    channel.send(InventoryJob(job_id=2, tier=Tier.HOST))
    assert channel.close(PATIENCE_S)
    assert gated.deadlines == {0: 102.5, 1: None, 2: None}


@pytest.mark.parametrize("is_small", [True, False])
def test_executor_that_raises_is_answered_as_failed_and_logged(
    copy_job: MakeJob, box: Any, caplog: pytest.LogCaptureFixture, is_small: bool
) -> None:
    def execute(job: Job, deadline: float | None) -> JobResult:
        if job.job_id == 0:
            raise ZeroDivisionError("no blocks to share")
        return all_ok(job, deadline)

    channel = opened(execute, box, is_small=lambda job: is_small)
    channel.send(copy_job(0, num_blocks=3, is_urgent=True, is_alone=True))
    channel.send(copy_job(1, is_urgent=True, is_alone=True))
    assert channel.close(PATIENCE_S)
    first, second = box.results
    assert first.outcomes.tolist() == [Outcome.FAILED] * 3
    assert first.reason == "ZeroDivisionError('no blocks to share')"
    assert second.outcomes.tolist() == [Outcome.OK] * 2
    (record,) = caplog.records
    assert record.getMessage() == "job failed job_id=0 kind=CopyJob"
    assert record.exc_info is not None


def test_interrupt_in_the_callers_thread_is_answered_and_goes_on(copy_job: MakeJob, box: Any) -> None:
    def execute(job: Job, deadline: float | None) -> JobResult:
        raise KeyboardInterrupt

    channel = opened(execute, box, is_small=lambda job: True)
    with pytest.raises(KeyboardInterrupt):
        channel.send(copy_job(0, is_urgent=True, is_alone=True))
    assert [result.outcomes.tolist() for result in box.results] == [[Outcome.LATE] * 2], (
        "its sources are as good as ever"
    )
    assert channel.close(0)


def test_executor_that_wants_its_thread_to_exit_does_not_end_the_lane(
    copy_job: MakeJob, box: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def execute(job: Job, deadline: float | None) -> JobResult:
        if job.job_id == 0:
            raise SystemExit(3)
        return all_ok(job, deadline)

    channel = opened(execute, box)
    channel.send(copy_job(0))
    channel.send(copy_job(1))
    assert channel.close(PATIENCE_S)
    assert [result.outcomes.tolist() for result in box.results] == [[Outcome.LATE] * 2, [Outcome.OK] * 2]
    assert "job failed job_id=0" in caplog.text


def test_receiver_that_raises_is_logged_and_the_lane_goes_on(
    copy_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[int] = []

    def receive(result: JobResult) -> None:
        taken.append(result.job_id)
        raise ValueError("books are full")

    channel = LocalChannel(all_ok)
    channel.open(receive, lambda reason: None)
    channel.send(copy_job(0))
    channel.send(copy_job(1))
    assert channel.close(PATIENCE_S)
    assert taken == [0, 1]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert messages == [f"a result could not be taken job_id={i}" for i in (0, 1)]


def test_close_runs_what_was_sent_and_ends_the_threads(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box)
    for job_id in range(6):
        channel.send(copy_job(job_id, (DOWN, TO_DISK)[job_id % 2]))
    gated.wait_until_started(0, 1)
    assert not channel.close(0.0), "it gives up in time"
    assert not channel.close(0.001)
    assert kvbm_threads() == ["kvbm-device-host", "kvbm-host-disk"]
    gated.let_all()
    assert channel.close(float("inf")), "waiting longer than a lock can is waiting for ever"
    assert sorted(box.ids) == list(range(6))
    assert kvbm_threads() == []
    assert channel.close()


@pytest.mark.parametrize("is_small", [True, False])
def test_send_after_close_is_refused_and_runs_nothing(copy_job: MakeJob, box: Any, gated: Any, is_small: bool) -> None:
    channel = opened(gated, box, is_small=lambda job: is_small)
    assert channel.close()
    with pytest.raises(PoolClosed, match="the channel to the executor is closed"):
        channel.send(copy_job(0, is_urgent=True, is_alone=True))
    assert gated.started == []
    assert kvbm_threads() == []


def test_close_waits_for_small_jobs_in_other_threads(copy_job: MakeJob, box: Any, gated: Any) -> None:
    channel = opened(gated, box, is_small=lambda job: True)
    caller = threading.Thread(target=channel.send, args=(copy_job(0, is_urgent=True, is_alone=True),))
    caller.start()
    gated.wait_until_started(0)
    assert not channel.close(0.0), "bytes still move"
    gated.let_all()
    assert channel.close(PATIENCE_S)
    caller.join(PATIENCE_S)
    assert box.ids == [0]


@pytest.mark.parametrize("is_small", [True, False])
def test_callback_may_close_the_channel(copy_job: MakeJob, is_small: bool) -> None:
    closed: list[bool] = []
    has_ended = threading.Event()
    channel = LocalChannel(all_ok, is_small=lambda job: is_small)

    def receive(result: JobResult) -> None:
        closed.append(channel.close())
        has_ended.set()

    channel.open(receive, lambda reason: None)
    channel.send(copy_job(0, is_urgent=True, is_alone=True))
    assert has_ended.wait(PATIENCE_S)
    assert closed == [True]
    assert channel.close(PATIENCE_S)
    assert kvbm_threads() == []


def test_every_job_that_was_taken_is_answered_also_when_it_races_with_close(copy_job: MakeJob) -> None:
    for _ in range(300):
        answered: list[int] = []
        channel = LocalChannel(all_ok)
        channel.open(lambda result, answered=answered: answered.append(result.job_id), lambda reason: None)  # type: ignore[misc]
        channel.send(copy_job(0))
        start = threading.Barrier(2)
        taken = [0]

        def send(start: Any = start, channel: Any = channel, taken: Any = taken) -> None:
            start.wait()
            for job_id in range(1, 30):
                try:
                    channel.send(copy_job(job_id))
                except PoolClosed:
                    return
                taken.append(job_id)

        sender = threading.Thread(target=send)
        sender.start()
        start.wait()
        assert channel.close(PATIENCE_S)
        sender.join(PATIENCE_S)
        assert answered == taken


def test_job_that_was_put_away_while_closing_began_is_still_answered(
    copy_job: MakeJob, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbm.jobs import channel as module

    channel = opened(all_ok, box)
    channel.send(copy_job(0))
    box.wait_for(lambda box: box.ids == [0])
    is_putting, may_put, was_asked = threading.Event(), threading.Event(), threading.Event()
    put = module._Lane.put

    def slow_put(self: Any, job: Job, deadline: float | None) -> None:
        is_putting.set()
        assert may_put.wait(PATIENCE_S)
        put(self, job, deadline)

    monkeypatch.setattr(module._Lane, "put", slow_put)
    sender = threading.Thread(target=channel.send, args=(copy_job(1),))
    sender.start()
    assert is_putting.wait(PATIENCE_S)
    answers: list[bool] = []

    def close() -> None:
        was_asked.set()
        answers.append(channel.close(PATIENCE_S))

    closer = threading.Thread(target=close)
    closer.start()
    assert was_asked.wait(PATIENCE_S)
    closer.join(0.05)  # where a lane is told to finish without regard for what is on its way, it ends here
    may_put.set()
    sender.join(PATIENCE_S)
    closer.join(PATIENCE_S)
    assert answers == [True]
    assert box.ids == [0, 1]


def test_a_job_that_waits_is_revoked_and_one_that_was_begun_is_not(copy_job: MakeJob, box: Any) -> None:
    gate = threading.Event()
    begun = threading.Event()

    def execute(job: Job, deadline: float | None) -> JobResult:
        begun.set()
        assert gate.wait(PATIENCE_S)
        return all_ok(job, deadline)

    channel = opened(execute, box)
    for job_id in range(3):
        channel.send(copy_job(job_id))
    assert begun.wait(PATIENCE_S)
    assert [channel.revoke(job_id) for job_id in (0, 1, 7)] == [False, True, False]
    assert [(result.job_id, result.outcomes.tolist()) for result in box.results] == [(1, [Outcome.LATE] * 2)]
    gate.set()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 2]


def test_an_abandoned_channel_ends_what_was_begun_and_nothing_else(copy_job: MakeJob, box: Any) -> None:
    gate = threading.Event()
    begun = threading.Event()
    executed: list[int] = []

    def execute(job: Job, deadline: float | None) -> JobResult:
        executed.append(job.job_id)
        begun.set()
        assert gate.wait(PATIENCE_S)
        return all_ok(job, deadline)

    channel = opened(execute, box)
    for job_id in range(3):
        channel.send(copy_job(job_id))
    assert begun.wait(PATIENCE_S)
    channel.abandon()
    with pytest.raises(PoolClosed):
        channel.send(copy_job(9))
    gate.set()
    assert channel.close(PATIENCE_S)
    assert executed == [0]
    assert sorted(box.ids) == [0, 1, 2]


def test_whoever_waits_runs_a_bounded_job_that_no_thread_has_begun(copy_job: MakeJob, box: Any) -> None:
    gate = threading.Event()
    begun = threading.Event()
    threads: dict[int, str] = {}

    def execute(job: Job, deadline: float | None) -> JobResult:
        threads[job.job_id] = threading.current_thread().name
        if job.job_id == 0:
            begun.set()
            assert gate.wait(PATIENCE_S)
        return all_ok(job, deadline)

    channel = opened(execute, box, is_bounded=lambda job: job.job_id != 2)
    for job_id in range(4):
        channel.send(copy_job(job_id))
    assert begun.wait(PATIENCE_S)
    assert [channel.run_here(job_id) for job_id in (0, 1, 2, 9)] == [False, True, False, False]
    assert box.ids == [1]
    assert threads[1] == threading.current_thread().name
    gate.set()
    assert channel.close(PATIENCE_S)
    assert sorted(box.ids) == [0, 1, 2, 3]
    assert threads[2].startswith("kvbm-")
