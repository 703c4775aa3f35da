"""A view of a keyed tier whose questions are answered when told, for the tests of what is known of such a tier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.jobs import Job, JobResult, Outcome, ProbeJob
from kvbm.planner import Limits
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.presence import Presence
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedClock
from kvbm.types import HashArray, Tier

PATIENCE_S = 60.0
NONE = np.empty(0, dtype=np.uint8)


def chain(num_blocks: int, first: int = 1) -> HashArray:
    return np.array([[first + i, 7] for i in range(num_blocks)], dtype=np.uint64).reshape(-1, 2)


def numbers(hashes: HashArray) -> list[int]:
    return [int(low) for low, _ in hashes]


class View:
    """The view of a tier that holds some blocks; its questions are answered when told."""

    def __init__(self, backend: Backend, *, rows: int = 64, **limits: Any) -> None:
        self.clock = SteppedClock()
        self.pool = BlockPool(rows, tier=Tier.REMOTE, backend=backend)
        self.there: set[int] = set()
        self.jobs: list[tuple[Job, Callable[[OpenJob], Iterable[After]]]] = []
        self.asked: list[list[int]] = []
        self.errors: list[BaseException] = []
        self.limits = Limits(**limits)
        ids = iter(range(1, 1000))
        self.presence = Presence(
            self.pool, limits=self.limits, next_id=lambda: next(ids), submit=self.submit, clock=self.clock
        )

    def ask(self, hashes: HashArray, then: Callable[[HashArray], object], **settings: Any) -> tuple[list[int], int]:
        """Ask as a prefetch does; give the sizes of the parts, and how many blocks were left out."""
        settings = {"is_wanted": lambda: True, "until": math.inf, **settings}
        parts, num_left = self.presence.ask(hashes, lambda _, found: then(found), **settings)
        return [len(part) for part in parts], num_left

    def submit(self, jobs: Sequence[tuple[Job, Callable[[OpenJob], Iterable[After]]]]) -> None:
        if self.errors:
            raise self.errors.pop()
        ((job, settle),) = jobs
        if isinstance(job, ProbeJob):
            self.asked.append(numbers(job.hashes))
        self.jobs.append((job, settle))

    def answer(self, *results: JobResult, reason: str = "", is_too_late: bool = False, is_away: bool = False) -> None:
        """Answer the open question, by what is there unless told otherwise."""
        job, settle = self.jobs.pop(0)
        outcomes = NONE
        if isinstance(job, ProbeJob):
            outcomes = np.array(
                [Outcome.OK if number in self.there else Outcome.FAILED for number in numbers(job.hashes)],
                dtype=np.uint8,
            )
            results = (JobResult(job_id=job.job_id, outcomes=outcomes, reason=reason, is_away=is_away),)
        entry = OpenJob(job, settle, set(), outcomes, 0.0, 30.0, is_too_late=is_too_late)
        entry.results = dict(enumerate(results))
        entry.reasons = {reason: None} if reason else {}
        self.presence.answered(results)
        for end in settle(entry):
            end()

    def known(self, hashes: HashArray) -> list[int]:
        return numbers(hashes[self.pool.lookup(hashes) >= 0])

    def parents(self, hashes: HashArray) -> list[int]:
        _, parents, _ = self.pool.describe_blocks(self.pool.lookup(hashes))
        return numbers(parents)


MakeView = Callable[..., View]
