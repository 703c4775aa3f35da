"""A scheduler's half over the books of tiers without bytes: jobs are answered by hand, on a clock of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from msgspec.structs import replace

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.step_channel import StepChannels
from kvbm.jobs import CopyJob, Job
from kvbm.jobs.messages import Outcome, answer_all, decode_job
from kvbm.planner import Planner
from kvbm.planner.estimates import _Route
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedClock
from kvbm.types import Tier

BLOCK_TOKENS, BLOCK_NBYTES, NUM_BLOCKS = 16, 1 << 20, 64
DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(NUM_BLOCKS)]
NUM_TOKENS = NUM_BLOCKS * BLOCK_TOKENS + 1


class BooksSite:
    """A scheduler's half over a host tier and a disk that holds a prompt."""

    def __init__(self, backend: Backend, *, tier: Tier = Tier.DISK) -> None:
        self.clock = SteppedClock()
        self.channels = StepChannels(1, clock=self.clock)
        pools = [BlockPool(NUM_BLOCKS, name=tier.value, tier=tier, backend=backend) for tier in (Tier.HOST, Tier.DISK)]
        self.planner = Planner(pools, self.channels.channels, foreign_tier=Tier.DEVICE, clock=self.clock)
        group = Group(self.planner, self.channels, block_nbytes=BLOCK_NBYTES)
        self.core = SchedulerCore([group], block_tokens=BLOCK_TOKENS, clock=self.clock)
        self.core.speed.tokens_per_s = 5000.0  # 3.2 ms for a block, as a tier of 328 MB/s
        names = Digests().extend(DIGESTS)
        pool = next(pool for pool in pools if pool.tier is tier)
        pool.register_blocks(pool.allocate_blocks(NUM_BLOCKS).complete(names)).release()

    def ask(self, request_id: str, num_blocks: int = NUM_BLOCKS) -> int:
        num_tokens, _ = self.core.matched_tokens(
            request_id, DIGESTS[:num_blocks], num_tokens=num_blocks * BLOCK_TOKENS + 1, num_computed_tokens=0
        )
        return num_tokens // BLOCK_TOKENS

    def serve(self, request_id: str) -> list[CopyJob]:
        """Compute a token of a request; give the jobs of that step that bring blocks up."""
        self.core.computed(request_id, DIGESTS, [[]], num_tokens=1)
        self.core.finished(request_id)
        jobs = [decode_job(data) for data in self.core.orders().jobs[0]]
        return [job for job in jobs if isinstance(job, CopyJob) and job.destination is Tier.HOST]

    def answer(self, jobs: Sequence[Job], bytes_per_s: float) -> None:
        """Let copies succeed."""
        for job in jobs:
            assert isinstance(job, CopyJob)
            nbytes = len(job.hashes) * BLOCK_NBYTES
            done = answer_all(job, Outcome.OK, "")
            self.channels.receive(0, [replace(done, nbytes=nbytes, seconds=nbytes / bytes_per_s)])

    def believe(self, source: Tier, destination: Tier, bytes_per_s: float) -> None:
        """Let copies be measured, as often as it takes to believe them."""
        for _ in range(6):
            self.clock.advance(0.01)
            key, default = self.planner.estimates._key_of(source, destination)
            route = self.planner.estimates._routes.setdefault(key, _Route(default))
            route.observe(NUM_BLOCKS * BLOCK_NBYTES, NUM_BLOCKS * BLOCK_NBYTES / bytes_per_s, self.clock())
