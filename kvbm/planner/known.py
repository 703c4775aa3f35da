"""How long ago the rows of a keyed tier's view were known to be true, and which of them are to be asked for again.

Four thousand rows are looked at in a step, so its cost is bounded whatever the size of the view. No lock: a row that is
taken by another block meanwhile is asked for again too early, which does no harm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray

_WINDOW = 4096
_LOOKS = 16  # in the time that a row is believed
_NO_HASHES: HashArray = np.empty((0, 2), dtype=np.uint64)


class KnownRows:
    """When each row of a view was last seen to be true.

    Parameters
    ----------
    pool : BlockPool
        The view.
    known_s : float
        Seconds that a row is believed.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    looks_at : float
        Moment of the next look.
    """

    def __init__(self, pool: BlockPool, known_s: float, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._known_s = known_s
        self._clock = clock
        self._seen_at: npt.NDArray[np.float64] = np.full(pool.total_blocks, np.nan)  # NaN: since the last look at most
        self._place = 0  # where the next window begins
        self.looks_at = clock() + known_s / _LOOKS

    @property
    def is_due(self) -> bool:
        """Whether it is time for a look."""
        return self._clock() >= self.looks_at

    def see(self, ids: IdArray) -> None:
        """Note that rows were seen to be true."""
        self._seen_at[ids] = self._clock()

    def take_old(self, max_blocks: int) -> HashArray:
        """Give rows of the next window that are to be asked for again, so many at most: (num_blocks, 2) uint64.

        They are given again at the next look, unless they are seen to be true, or forgotten, before.
        """
        if not self.is_due:
            return _NO_HASHES
        now = self._clock()
        ids = np.arange(self._place, min(self._place + _WINDOW, len(self._seen_at)), dtype=np.int32)
        hashes, _, _ = self._pool.describe_blocks(ids)
        seen_at = self._seen_at[ids]
        seen_at[np.isnan(seen_at)] = now  # our own writes, as a rule
        seen_at[~hashes.any(axis=1)] = np.nan
        self._seen_at[ids] = seen_at
        (old,) = (now - seen_at >= self._known_s).nonzero()
        old = old[:max_blocks]
        self._place = int(ids[old[-1]]) + 1 if len(old) == max_blocks else int(ids[-1]) + 1
        if self._place >= len(self._seen_at):
            self._place = 0
            self.looks_at = now + self._known_s / _LOOKS
        return hashes[old]
