"""A limit to what is written to a tier: a token bucket in bytes a day, around any offload policy.

Flash wears by what is written to it. What the budget has no room for is shed and counted, never queued: the block goes
down at a later use, or is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.policies.base import Candidates, OffloadPolicy

DAY_S = 86400.0

_HOURS_A_DAY = 24


class TokenBucket:
    """Gives out tokens that come back at a steady rate, up to a bound.

    Parameters
    ----------
    capacity : float
        Tokens at most, and at the start; more than 0.
    per_s : float
        Tokens that come back each second; more than 0.
    clock : callable
        Gives seconds; monotonic.

    Notes
    -----
    Over any time t no more than ``capacity + per_s * t`` tokens are given out. It never waits and never locks.

    Examples
    --------
    >>> bucket = TokenBucket(10, per_s=1, clock=lambda: 0.0)
    >>> bucket.take(8, unit=3), bucket.take(8, unit=3)
    (3, 0)
    """

    def __init__(self, capacity: float, *, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not (capacity > 0 and per_s > 0):
            raise ConfigError(f"capacity is {capacity} and per_s is {per_s}, give more than 0")
        self._capacity = capacity
        self._per_s = per_s
        self._clock = clock
        self._tokens = capacity
        self._filled_at = clock()

    def take(self, n: int, *, unit: float = 1) -> int:
        """Take up to n units of so many tokens each; return how many units there were."""
        now = self._clock()
        self._tokens = min(self._capacity, self._tokens + max(0.0, now - self._filled_at) * self._per_s)
        self._filled_at = now
        taken = min(n, int(self._tokens / unit))
        self._tokens -= taken * unit
        return taken


class WriteBudget(OffloadPolicy):
    """Lets another policy choose, and limits what is written of it.

    Parameters
    ----------
    policy : OffloadPolicy
        Chooses.
    nbytes_per_block : int
        Bytes that one block takes in the tier below.
    nbytes_per_day : int
        Bytes that may be written in a day, over any longer time.
    burst_nbytes : int, optional
        Bytes that may be written at once; default an hour's share of the day, at least one block.
    clock : callable
        Gives seconds; monotonic.

    Raises
    ------
    ConfigError
        A number is below 1, or not one block fits into a burst.

    Notes
    -----
    The planner asks `afford` when a job is made, of blocks that are not below and not on their way there, so only what
    is about to be written is counted; what then fails is not given back. Of a batch the leading blocks are written,
    without which the others could not be found. A restart begins with a whole burst.

    Examples
    --------
    >>> from kvbm.planner.policies.always import AlwaysPolicy
    >>> budget = WriteBudget(AlwaysPolicy(), 1 << 20, nbytes_per_day=240 << 20, clock=lambda: 0.0)
    >>> budget.afford(8), budget.afford(8)
    (8, 2)
    """

    def __init__(
        self,
        policy: OffloadPolicy,
        nbytes_per_block: int,
        *,
        nbytes_per_day: int,
        burst_nbytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if nbytes_per_block < 1:
            raise ConfigError(f"nbytes_per_block is {nbytes_per_block}, give 1 or more bytes")
        if nbytes_per_day < 1:
            raise ConfigError(f"nbytes_per_day is {nbytes_per_day}, give 1 or more bytes, or leave the budget out")
        if burst_nbytes is not None and burst_nbytes < nbytes_per_block:
            raise ConfigError(
                f"burst_nbytes is {burst_nbytes} and a block takes {nbytes_per_block}, give at least that"
            )
        burst = burst_nbytes or max(nbytes_per_day / _HOURS_A_DAY, nbytes_per_block)
        self.policy = policy
        self._nbytes_per_block = nbytes_per_block
        self._bucket = TokenBucket(burst, per_s=nbytes_per_day / DAY_S, clock=clock)

    @property
    def counts_uses(self) -> bool:
        """Whether the policy that chooses wants to hear of uses."""
        return self.policy.counts_uses

    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Let the policy choose."""
        return self.policy.registered(blocks)

    def used(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Let the policy choose."""
        return self.policy.used(blocks)

    def prioritised(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Let the policy choose."""
        return self.policy.prioritised(blocks)

    def afford(self, num_blocks: int) -> int:
        """Take what these blocks will write out of the budget; return how many there was room for."""
        return self._bucket.take(self.policy.afford(num_blocks), unit=self._nbytes_per_block)
