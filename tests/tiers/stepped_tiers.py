"""A planner without bytes, whose jobs run when they are told to and whose time passes when somebody says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvbm._backend import Backend
from kvbm.jobs import CopyJob, Job, JobResult
from kvbm.jobs.messages import num_blocks_of
from kvbm.planner import Limits, Planner
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedChannel, SteppedClock
from kvbm.types import HashArray, Tier

BLOCK_NBYTES = 1 << 20
TTL_S = 100.0


def chain(num_blocks: int, family: int = 1) -> HashArray:
    """Name the blocks of one sequence: (num_blocks, 2) uint64."""
    return np.array([[family, 1 + i] for i in range(num_blocks)], dtype=np.uint64).reshape(-1, 2)


class SteppedTiers:
    """Pools, a planner, and an executor that only says how long it took.

    ``seconds`` gives the time of a copy by (source, number of blocks); it passes on the clock too.
    """

    def __init__(
        self,
        backend: Backend,
        sizes: Mapping[str, int],
        *,
        limits: Limits | None = None,
        ttls_s: Mapping[Tier, float] | None = None,
        recording: tuple[Tier, ...] = (),
    ) -> None:
        self.clock = SteppedClock()
        self.seconds: Callable[[str, int], float] = lambda source, num_blocks: 0.001
        self.jobs: list[Job] = []
        self.channel = SteppedChannel(self._execute)
        self.pools = {
            name: BlockPool(num_blocks, name=name, tier=Tier(name), backend=backend)
            for name, num_blocks in sizes.items()
        }
        self.planner = Planner(
            list(self.pools.values()),
            [self.channel],
            limits=limits or Limits(),
            ttls_s=ttls_s,
            recording_tiers=recording,
            clock=self.clock,
        )
        self.top = next(iter(self.pools.values()))

    def _execute(self, job: Job, deadline: float | None) -> JobResult:
        self.jobs.append(job)
        num_blocks, seconds, nbytes = num_blocks_of(job), 0.0, 0
        if isinstance(job, CopyJob):
            seconds, nbytes = self.seconds(job.source.value, num_blocks), num_blocks * BLOCK_NBYTES
            self.clock.advance(seconds)
        outcomes = np.zeros(num_blocks, dtype=np.uint8)
        return JobResult(job_id=job.job_id, outcomes=outcomes, nbytes=nbytes, seconds=seconds)

    def put(self, name: str, hashes: HashArray) -> None:
        """Register blocks in one tier; nobody holds them."""
        pool = self.pools[name]
        pool.register_blocks(pool.allocate_blocks(len(hashes)).complete(hashes)).release()

    def lies(self, name: str, hashes: HashArray) -> list[bool]:
        return (self.pools[name].lookup(hashes) >= 0).tolist()  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Let everything that waits be done."""
        while self.planner.pump() or self.channel.step_all():
            pass

    def advance(self, seconds: float) -> None:
        """Let time pass, and let the planner look at it."""
        self.clock.advance(seconds)
        self.settle()

    def close(self) -> None:
        """Close, and see that nothing is left."""
        self.planner.close(0)
        self.channel.step_all()
        for pool in self.pools.values():
            pool.check()
            status = pool.status()
            assert (status.mutable, status.complete, status.active) == (0, 0, 0), status

    def copies(self, route: str) -> list[Any]:
        """Give the copies of e.g. "disk-host" that were run."""
        return [
            job
            for job in self.jobs
            if isinstance(job, CopyJob) and f"{job.source.value}-{job.destination.value}" == route
        ]
