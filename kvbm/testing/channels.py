"""A channel that runs a job when it is told to, and a clock that stands still: schedules without threads."""

from __future__ import annotations

from collections.abc import Callable

from kvbm.errors import PoolClosed
from kvbm.jobs import Job, JobResult, Outcome
from kvbm.jobs.channel import Execute, Receive
from kvbm.jobs.messages import answer_all


class SteppedClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Give the moment."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class SteppedChannel:
    """A `JobChannel` that keeps the jobs sent until it is told what becomes of each.

    Parameters
    ----------
    execute : callable
        What an executor does with a job and its deadline, e.g. `Executor.execute`.

    Attributes
    ----------
    waiting : list of Job
        Sent and not answered, in order.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._receive: Receive | None = None
        self._lost: Callable[[str], None] | None = None
        self._is_closed = False
        self.waiting: list[Job] = []

    def open(self, receive: Receive, lost: Callable[[str], None]) -> None:
        """Note where results go."""
        self._receive, self._lost = receive, lost

    def send(self, job: Job) -> None:
        """Keep a job."""
        if self._is_closed:
            raise PoolClosed("the channel to the executor is closed")
        self.waiting.append(job)

    def step(self, index: int = 0) -> JobResult:
        """Execute a waiting job whose bytes are not stopped by any deadline, and answer it."""
        return self._answer(self._execute(self.waiting.pop(index), None))

    def step_all(self) -> int:
        """Execute what waits, and what that brings; give the number of jobs."""
        num_jobs = 0
        while self.waiting:
            self.step()
            num_jobs += 1
        return num_jobs

    def answer(self, index: int, outcome: Outcome, reason: str = "as told") -> JobResult:
        """Answer a waiting job for all its blocks without executing it."""
        return self._answer(answer_all(self.waiting.pop(index), outcome, reason))

    def revoke(self, job_id: int) -> bool:
        """Nothing: what is sent here counts as begun, so that its bytes may come late."""
        return False

    def knows(self, job_id: int) -> bool:
        """Whether a job waits."""
        return any(job.job_id == job_id for job in self.waiting)

    def run_here(self, job_id: int) -> bool:
        """Nothing: a job runs when it is told to."""
        return False

    def die(self, reason: str = "as told") -> None:
        """Lose the executor and what waits for it."""
        assert self._lost is not None, "a channel is opened before it is used"
        self._is_closed = True
        self.waiting.clear()
        self._lost(reason)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs; never waits; tell whether nothing was waiting."""
        self._is_closed = True
        return not self.waiting

    def _answer(self, result: JobResult) -> JobResult:
        assert self._receive is not None, "a channel is opened before it is used"
        self._receive(result)
        return result
