"""Several ranks that the planner sees as one: who answers for what, and what their answers make together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from worker_site import ids, names_of

from kvbm.engines.step_channel import StepChannels
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, Job, JobResult, Outcome
from kvbm.types import Tier

OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT


def copy(job_id: int, source: Tier, destination: Tier, *seeds: int) -> CopyJob:
    slots = ids(*range(len(seeds)))
    return CopyJob(
        job_id=job_id, source=source, destination=destination, source_ids=slots, destination_ids=slots,
        hashes=names_of(*seeds),
    )  # fmt: skip


def channels(num_ranks: int) -> tuple[StepChannels, list[JobResult]]:
    group = StepChannels(num_ranks, is_shared=True)
    heard: list[JobResult] = []
    (channel,) = group.channels
    channel.open(heard.append, lambda reason: None)
    return group, heard


def result(job_id: int, *outcomes: Outcome, **more: Any) -> JobResult:
    return JobResult(job_id=job_id, outcomes=np.array(outcomes, dtype=np.uint8), **more)


@pytest.mark.parametrize("ends", [(Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)])
def test_what_touches_the_engines_memory_is_open_until_the_last_rank_and_the_worst_counts(ends: Any) -> None:
    group, heard = channels(3)
    group.channels[0].send(copy(5, *ends, 1, 2, 3))
    assert [job.job_id for job in group.take_jobs()] == [5]
    group.receive(1, [result(5, OK, CORRUPT, OK, nbytes=10, seconds=0.5, reason="checksum mismatch")])
    group.receive(1, [result(5, OK, OK, OK)])  # said twice
    group.receive(0, [result(5, OK, OK, LATE, nbytes=20, seconds=0.25, is_away=True)])
    assert not heard
    assert group.has_open_jobs
    assert group.channels[0].knows(5)
    group.receive(2, [result(5, OK, OK, FAILED, nbytes=30, reason="read error")])
    (whole,) = heard
    assert whole.outcomes.tolist() == [OK, CORRUPT, FAILED]
    assert (whole.nbytes, whole.seconds, whole.reason, whole.is_away) == (60, 0.5, "checksum mismatch", True)
    assert not group.has_open_jobs
    assert not group.channels[0].knows(5)
    assert not group._parts


@pytest.mark.parametrize(
    "job",
    [
        copy(5, Tier.HOST, Tier.DISK, 1),
        copy(5, Tier.DISK, Tier.HOST, 1),
        ForgetJob(job_id=5, tier=Tier.DISK, hashes=names_of(1)),
        InventoryJob(job_id=5, tier=Tier.DISK),
    ],
)
def test_what_lies_below_is_answered_by_rank_0_alone(job: Job) -> None:
    group, heard = channels(2)
    group.channels[0].send(job)
    group.receive(1, [result(5, FAILED)])
    assert not heard
    group.receive(0, [result(5, OK)])
    assert [one.outcomes.tolist() for one in heard] == [[OK]]
    assert not group.has_open_jobs


def test_ranks_that_answer_for_different_blocks_are_not_believed() -> None:
    group, heard = channels(2)
    group.channels[0].send(copy(5, Tier.HOST, Tier.DEVICE, 1, 2))
    group.receive(0, [result(5, OK, OK)])
    group.receive(1, [result(5, OK)])
    assert heard[0].outcomes.tolist() == [FAILED, FAILED]
    assert "answered for [2, 1] blocks" in heard[0].reason
