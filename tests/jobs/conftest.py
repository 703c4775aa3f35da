"""What the tests of channels share: jobs, a box that collects answers, and executors that wait at a gate."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.jobs import CopyJob, Job, JobResult, Outcome
from kvbm.jobs.messages import num_blocks_of
from kvbm.types import Tier

PATIENCE_S = 60.0


def make_copy_job(
    job_id: int, route: tuple[Tier, Tier] = (Tier.DEVICE, Tier.HOST), *, num_blocks: int = 2, **fields: Any
) -> CopyJob:
    ids = np.arange(num_blocks, dtype=np.int32)
    names = np.arange(2 * num_blocks, dtype=np.uint64).reshape(-1, 2)
    return CopyJob(
        job_id=job_id,
        source=route[0],
        destination=route[1],
        source_ids=ids,
        destination_ids=ids[::-1].copy(),
        hashes=names,
        **fields,
    )


def answer(job: Job, outcome: Outcome = Outcome.OK) -> JobResult:
    return JobResult(job_id=job.job_id, outcomes=np.full(num_blocks_of(job), outcome, dtype=np.uint8))


class Box:
    """Collects what a channel answers; both methods may be called from any thread."""

    def __init__(self) -> None:
        self.results: list[JobResult] = []
        self.threads: list[str] = []
        self.lost: list[str] = []
        self._changed = threading.Condition()

    def receive(self, result: JobResult) -> None:
        with self._changed:
            self.results.append(result)
            self.threads.append(threading.current_thread().name)
            self._changed.notify_all()

    def lose(self, reason: str) -> None:
        with self._changed:
            self.lost.append(reason)
            self._changed.notify_all()

    @property
    def ids(self) -> list[int]:
        return [result.job_id for result in self.results]

    def wait_for(self, is_enough: Callable[[Box], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: is_enough(self), PATIENCE_S)


class Gated:
    """An executor whose jobs wait until they are let through, each by its id, and that notes in which order."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.deadlines: dict[int, float | None] = {}
        self.threads: dict[int, str] = {}
        self._open: set[int] = set()
        self._is_open = False
        self._changed = threading.Condition()

    def __call__(self, job: Job, deadline: float | None) -> JobResult:
        with self._changed:
            self.started.append(job.job_id)
            self.deadlines[job.job_id] = deadline
            self.threads[job.job_id] = threading.current_thread().name
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_open or job.job_id in self._open, PATIENCE_S)
        return answer(job)

    def let(self, *job_ids: int) -> None:
        with self._changed:
            self._open.update(job_ids)
            self._changed.notify_all()

    def let_all(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wait_until_started(self, *job_ids: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(job_ids) <= set(self.started), PATIENCE_S)


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def copy_job() -> Callable[..., CopyJob]:
    return make_copy_job
