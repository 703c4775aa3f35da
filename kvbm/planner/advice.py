"""Load or compute again: how many leading blocks of a hit are worth bringing up.

The best cut is the one with the least predicted time in all: to load what is before it, and to compute what is behind
it. Routes are added up, as if one ran after the other, so that a prediction errs on the side of computing. A tier that
is not worth loading from is measured now and then by a few blocks in the background, so that no verdict lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.estimates import Estimates, RouteEstimate
from kvbm.planner.hit import Hit
from kvbm.planner.loading import Loader
from kvbm.types import HashArray, Tier

_PROBE_EVERY = 16  # plans that left blocks of a tier where they are
_PROBE_AFTER_S = 10.0  # since its last job
_PROBE_BLOCKS = 4
_FORGOTTEN_AFTER_S = 60.0  # since the last copy to an engine


@dataclass(frozen=True)
class LoadRun:
    """Neighbouring blocks of a hit that lie in one tier.

    Attributes
    ----------
    tier : Tier
    num_blocks : int
    load_s : float
        Predicted seconds to bring them up; 0 in the top tier.
    """

    tier: Tier
    num_blocks: int
    load_s: float


@dataclass(frozen=True)
class Advice:
    """What to do with a hit.

    Attributes
    ----------
    num_blocks : int
        Leading blocks that are worth loading, those in the top tier among them; the rest is computed sooner.
    hit_blocks : int
        Blocks of the hit.
    runs : tuple of LoadRun
        Where the leading blocks lie, in order.
    load_s : float
        Predicted seconds until they are in the top tier, what waits before them included.
    recompute_s : float
        Predicted seconds to compute all blocks of the hit.
    total_s : float
        Predicted seconds when the advice is followed: to load, and to compute the rest.
    queue_s : float
        Part of `load_s` that is spent behind other requests.
    reason : str
        Why, with the estimates it stands on.
    """

    num_blocks: int
    hit_blocks: int
    runs: tuple[LoadRun, ...]
    load_s: float
    recompute_s: float
    total_s: float
    queue_s: float
    reason: str

    def __str__(self) -> str:
        runs = ", ".join(f"{run.num_blocks} {run.tier.value} {_show(run.load_s)}" for run in self.runs) or "none"
        return (
            f"load={self.num_blocks}/{self.hit_blocks} runs=[{runs}] load_s={self.load_s:.6f} "
            f"queue_s={self.queue_s:.6f} recompute_s={self.recompute_s:.6f} total_s={self.total_s:.6f} "
            f"reason={self.reason!r}"
        )


@dataclass
class _Declined:
    """A tier from which loading was not worth it."""

    num_plans: int = 0
    probe: Callable[[], bool] = field(default=lambda: True)  # whether the last one has ended


class Advisor:
    """Compares loading with computing.

    Parameters
    ----------
    estimates : Estimates
    loader : Loader
        Says what waits, and probes.
    top : Tier
    job_blocks : int
        Blocks of one job.
    clock : callable
        Gives seconds; monotonic.
    foreign : Tier, optional
        An engine's memory above the top tier: every block is copied on to there.
    """

    def __init__(
        self,
        estimates: Estimates,
        loader: Loader,
        *,
        top: Tier,
        job_blocks: int,
        clock: Callable[[], float],
        foreign: Tier | None = None,
    ) -> None:
        self._estimates = estimates
        self._loader = loader
        self._top = top
        self._job_blocks = job_blocks
        self._clock = clock
        self._foreign = foreign
        self._declined: dict[Tier, _Declined] = {}

    def advise(self, hit: Hit, prefill_tokens_per_s: float, *, block_tokens: int, block_nbytes: int) -> Advice:
        """Tell how many leading blocks of a hit are worth loading; see `BlockManager.plan_onboard`.

        Parameters
        ----------
        hit : Hit
        prefill_tokens_per_s : float
        block_tokens : int
            Tokens of a block.
        block_nbytes : int
            Bytes of a block, on one rank.
        """
        tiers, where = hit.tier_of_blocks()
        advice = self.plan(tiers, where, prefill_tokens_per_s, block_tokens=block_tokens, block_nbytes=block_nbytes)
        self.note_left(tiers, where, hit.hashes, advice.num_blocks)
        return advice

    def note_left(
        self, tiers: Sequence[Tier], where: npt.NDArray[np.integer[Any]], hashes: HashArray, num_blocks: int
    ) -> None:
        """Note that a plan is followed; a tier that plans keep leaving is measured anew once in a while.

        Parameters
        ----------
        tiers, where
            As for `plan`.
        hashes : (num_blocks, 2) uint64
        num_blocks : int
            Leading blocks that are loaded; the others are left.
        """
        is_left = np.arange(len(where)) >= num_blocks
        for index, tier in enumerate(tiers):
            if tier is not self._top:  # nothing is fetched from there to there
                self._note(tier, hashes, (where == index) & is_left)

    def plan(
        self,
        tiers: Sequence[Tier],
        where: npt.NDArray[np.integer[Any]],
        prefill_tokens_per_s: float,
        *,
        block_tokens: int,
        block_nbytes: int,
        least_s: float = 0.0,
    ) -> Advice:
        """Tell how many leading blocks are worth loading, without holding or changing anything.

        Parameters
        ----------
        tiers : sequence of Tier
        where : (num_blocks,) int
            For each block which of the tiers it lies in.
        prefill_tokens_per_s, block_tokens, block_nbytes
            As for `advise`.
        least_s : float
            Seconds that loading takes whatever is loaded.
        """
        if not 0 < prefill_tokens_per_s < math.inf:
            raise ConfigError(f"prefill_tokens_per_s is {prefill_tokens_per_s}, give a number above 0")
        block_s = block_tokens / prefill_tokens_per_s
        num_blocks = len(where)
        queued = self._loader.queued()
        load_s = np.zeros(num_blocks + 1)  # of the first n blocks
        load_s[1:] = least_s
        queue_s = np.zeros(num_blocks + 1)
        for index, tier in enumerate(tiers):
            if tier is self._top:
                continue
            estimate = self._estimates.route(tier, self._top)
            counts = np.concatenate([[0], np.cumsum(where == index)])
            num_jobs = -(-counts // self._job_blocks)
            wait_s = self._wait_s(estimate, *queued.get(tier, (0, 0.0)), block_nbytes)
            queue_s += (counts > 0) * wait_s
            load_s += num_jobs * estimate.latency_s + counts * (block_nbytes / estimate.bytes_per_s)
        if self._foreign is not None:
            estimate, counts = self._estimates.route(self._top, self._foreign), np.arange(num_blocks + 1)
            if estimate.measured_at is not None and self._clock() - estimate.measured_at >= _FORGOTTEN_AFTER_S:
                estimate = self._estimates.default(self._top, self._foreign)  # nothing else measures it anew
            load_s += -(-counts // self._job_blocks) * estimate.latency_s
            load_s += counts * (block_nbytes / estimate.bytes_per_s)
        total_s = load_s + queue_s + (num_blocks - np.arange(num_blocks + 1)) * block_s
        best = num_blocks - int(np.argmin(total_s[::-1]))  # of equal cuts the one that loads most
        return Advice(
            num_blocks=best,
            hit_blocks=num_blocks,
            runs=_runs_of(tiers, where[:best], load_s),
            load_s=float(load_s[best] + queue_s[best]),
            recompute_s=num_blocks * block_s,
            total_s=float(total_s[best]),
            queue_s=float(queue_s[best]),
            reason=self._reason(best, num_blocks, tiers, prefill_tokens_per_s),
        )

    def _wait_s(self, estimate: RouteEstimate, num_blocks: int, since: float, block_nbytes: int) -> float:
        """Predict how long a job waits behind others; one that hangs is waited for as long as it has hung."""
        if not num_blocks:
            return 0.0
        expected = estimate.seconds(num_blocks * block_nbytes, -(-num_blocks // self._job_blocks))
        age = self._clock() - since
        return max(expected - age, age)

    def _note(self, tier: Tier, hashes: HashArray, is_left: npt.NDArray[np.bool_]) -> None:
        """Count that blocks of a tier were left; measure it again when that was long ago."""
        if not is_left.any():
            self._declined.pop(tier, None)
            return
        declined = self._declined.setdefault(tier, _Declined())
        declined.num_plans += 1
        measured_at = self._estimates.route(tier, self._top).measured_at
        is_old = measured_at is None or self._clock() - measured_at >= _PROBE_AFTER_S
        if (is_old or declined.num_plans >= _PROBE_EVERY) and declined.probe():
            declined.num_plans = 0
            probe = self._loader.prefetch(hashes[is_left][:_PROBE_BLOCKS], source=tier)
            declined.probe = lambda: probe.done() and not probe.is_draining

    def _reason(self, best: int, num_blocks: int, tiers: Sequence[Tier], prefill_tokens_per_s: float) -> str:
        lower = [(tier, self._estimates.route(tier, self._top)) for tier in tiers if tier is not self._top]
        if not lower:
            return "all in the top tier"
        verdict = "loading is sooner" if best == num_blocks else "computing is sooner behind the cut"
        believed = [
            f"{tier.value} {_show(estimate.latency_s)} + {estimate.bytes_per_s / 1e6:.4g} MB/s "
            + ("by default, not measured yet" if estimate.is_default else f"from {estimate.num_jobs} jobs")
            for tier, estimate in lower
        ]
        return f"{verdict}: {'; '.join(believed)}; prefill {prefill_tokens_per_s:.4g} tokens/s"


def _runs_of(
    tiers: Sequence[Tier], where: npt.NDArray[np.integer[Any]], load_s: npt.NDArray[np.float64]
) -> tuple[LoadRun, ...]:
    """Give the runs of neighbours in one tier, and what each adds to the time."""
    if not len(where):
        return ()
    starts = [0, *(np.flatnonzero(np.diff(where)) + 1).tolist()]
    ends = [*starts[1:], len(where)]
    return tuple(
        LoadRun(tiers[where[start]], end - start, float(load_s[end] - load_s[start]))
        for start, end in zip(starts, ends, strict=True)
    )


def _show(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
