"""What either end of a pipe knows: which jobs are open, and which routes may run two at once."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvbm.jobs import CopyJob, Job
from kvbm.jobs.pipe import PipeChannel, serve
from kvbm.types import Tier

PATIENCE_S = 60.0
DOWN, TO_DISK = (Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK)
MakeJob = Callable[..., CopyJob]


def is_bounded(job: Job) -> bool:
    """Tell disks from memory, as an executor does."""
    return isinstance(job, CopyJob) and Tier.DISK not in (job.source, job.destination)


class Pair:
    """A channel, and what serves it in a thread of this process."""

    def __init__(self, execute: Any, box: Any, **predicates: Any) -> None:
        ours, self.theirs = multiprocessing.Pipe()
        self.channel = PipeChannel(ours)
        self.server = threading.Thread(target=serve, args=(self.theirs, execute), kwargs=predicates, name="server")
        self.channel.open(box.receive, box.lose)
        self.server.start()

    def close(self) -> None:
        assert self.channel.close(PATIENCE_S)
        self.server.join(PATIENCE_S)
        assert not self.server.is_alive()


@pytest.fixture
def pair(gated: Any, box: Any) -> Iterator[Pair]:
    pair = Pair(gated, box, is_small=lambda job: job.job_id >= 100, is_bounded=is_bounded)
    yield pair
    gated.let_all()
    pair.close()


def test_a_job_behind_a_pipe_is_known_from_its_sending_to_its_answer(
    copy_job: MakeJob, box: Any, gated: Any, pair: Pair
) -> None:
    channel = pair.channel
    assert not channel.knows(1)
    channel.send(copy_job(1, TO_DISK))
    channel.send(copy_job(2, TO_DISK))
    assert [channel.knows(job_id) for job_id in (1, 2, 3)] == [True, True, False]
    gated.let(1)
    box.wait_for(lambda box: 1 in box.ids)
    channel.send(copy_job(3, TO_DISK))
    gated.let(3)
    box.wait_for(lambda box: 3 in box.ids)  # the reader is done with the first by then
    assert [channel.knows(job_id) for job_id in (1, 2)] == [False, True]


def test_a_lost_executor_has_no_jobs(copy_job: MakeJob, box: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    channel = PipeChannel(ours)
    channel.open(box.receive, box.lose)
    channel.send(copy_job(1))
    assert channel.knows(1)
    theirs.recv_bytes()
    theirs.close()
    box.wait_for(lambda box: bool(box.lost))
    assert channel.close(PATIENCE_S)
    assert not channel.knows(1)


def test_a_job_that_was_refused_is_not_known(copy_job: MakeJob, box: Any, pair: Pair) -> None:
    class NoJob:
        job_id = 9

    with pytest.raises(NotImplementedError):
        pair.channel.send(NoJob())  # type: ignore[arg-type]
    assert not pair.channel.knows(9)


def test_served_routes_to_disk_run_two_jobs_at_once_and_memory_one(
    copy_job: MakeJob, box: Any, gated: Any, pair: Pair
) -> None:
    for job_id in range(3):
        pair.channel.send(copy_job(job_id, TO_DISK))
        pair.channel.send(copy_job(job_id + 10, DOWN))
    gated.wait_until_started(0, 1, 10)
    assert sorted(gated.started) == [0, 1, 10]
    gated.let_all()
    box.wait_for(lambda box: len(box.ids) == 6)


def test_served_small_jobs_run_in_the_thread_that_reads(copy_job: MakeJob, box: Any, gated: Any, pair: Pair) -> None:
    gated.let_all()
    pair.channel.send(copy_job(100, DOWN, is_urgent=True, is_alone=True))
    pair.channel.send(copy_job(1, DOWN, is_urgent=True))
    box.wait_for(lambda box: len(box.ids) == 2)
    assert gated.threads == {100: "server", 1: "kvbm-device-host"}
