"""Runs the jobs of one group of layers in one worker: those that touch the engine's memory, and those below it.

The engine may take its memory away and give other memory later (sleep and wake). What lies below stays meanwhile, and
its jobs go on; those that touch the engine's memory are answered as failed.
"""

from __future__ import annotations

import threading
from typing import Protocol

from kvbm.engines.clearing import clear_lost
from kvbm.engines.stream_copies import StreamCopies
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Job, JobResult, Outcome
from kvbm.jobs.messages import answer_all
from kvbm.storage.base import Storage
from kvbm.types import Tier

_AWAY = "the engine's memory is away"


class JobRunner(Protocol):
    """What a worker needs of whoever runs the jobs of a group: an `Executor` or a `Runner`."""

    def execute(self, job: Job, deadline: float | None = None) -> JobResult:
        """Run a job; trouble is an answer, never an exception."""

    def is_bounded(self, job: Job) -> bool:
        """Whether a job is a copy between memories, which cannot hang."""


class Runner:
    """Runs jobs by two means: the tiers below by one executor, the engine's memory by another or by streams.

    Parameters
    ----------
    below : Executor
        Of the tiers below; stays the caller's.
    tier : Tier
        Of the engine's memory in jobs.

    Notes
    -----
    Safe from any thread. One lock guards what the engine's memory is and how many jobs touch it; never held while
    bytes move.
    """

    def __init__(self, below: Executor, *, tier: Tier = Tier.DEVICE) -> None:
        self._below = below
        self._tier = tier
        self._memory: Storage | None = None  # None: it is away
        self._copies: Executor | StreamCopies | None = None  # with it
        self._num_running = 0  # jobs that touch it
        self._changed = threading.Condition()

    @property
    def streams(self) -> StreamCopies | None:
        """What orders copies with an engine's stream; None on the CPU, and while its memory is away."""
        return self._copies if isinstance(self._copies, StreamCopies) else None

    def attach(self, memory: Storage, copies: Executor | StreamCopies) -> None:
        """Take the engine's memory and what copies there, which `detach` closes."""
        assert self._copies is None, "the memory that was there is let go of first"
        self._memory, self._copies = memory, copies

    def detach(self) -> None:
        """Let go of the engine's memory, once no byte moves there; may be called again.

        Notes
        -----
        Blocks while copies run; jobs that have not begun are answered as failed.
        """
        with self._changed:
            copies, self._copies, self._memory = self._copies, None, None
            self._changed.wait_for(lambda: not self._num_running)
        if copies is not None:
            copies.close()

    def execute(self, job: Job, deadline: float | None = None) -> JobResult:
        """Run a job; parameters as for `Executor.execute`.

        Notes
        -----
        Trouble is an answer, never an exception.
        """
        if not (isinstance(job, CopyJob) and self._tier in (job.source, job.destination)):
            return self._below.execute(job, deadline)
        with self._changed:
            copies, memory = self._copies, self._memory
            if copies is None or memory is None:
                return answer_all(job, Outcome.FAILED, _AWAY)
            self._num_running += 1
        try:
            result = copies.execute(job, deadline)
            if job.destination is self._tier:
                clear_lost(memory, job, result)
            return result
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def is_bounded(self, job: Job) -> bool:
        """Whether a job is a copy between memories, which cannot hang."""
        if isinstance(job, CopyJob) and self._tier in (job.source, job.destination):
            return True
        return self._below.is_bounded(job)


def streams_of(runner: JobRunner) -> StreamCopies | None:
    """Give what orders a runner's copies with an engine's stream; None where there is nothing to order."""
    return runner.streams if isinstance(runner, Runner) else None
