"""What left a pool lately, when, and why: a bounded record for whoever asks later what became of a block.

Names go into a table of fixed size by a part of their bits, so a later one may take the place of an earlier one; noting
thousands costs a few array operations, looking one up is one step. The store tells what left but not why: that follows
from which counters rose with it, and where several did, each is named. Used by one thread, the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.types import HashArray, OutboxKind

EVICTED, EXPIRED, CORRUPT, RESET = "evicted", "expired", "checksum", "reset"
_CAUSES = (EVICTED, EXPIRED, CORRUPT, RESET)
_FEWEST_PLACES, _MOST_PLACES = 1 << 10, 1 << 18
_SPARSE = 8  # places for each name, for hardly one to take another's
_BATCHES = 4096  # whose circumstances are known
_GAP = int(OutboxKind.GAP)


class Batch(msgspec.Struct, frozen=True):
    """What left a pool between two looks at it.

    Attributes
    ----------
    num_removed : int
        Blocks.
    num_in_use : int
        Blocks of the pool that could not be evicted then.
    pressure : str
        What needed room, "" where nothing is known of it.
    """

    num_removed: int
    num_in_use: int
    pressure: str


class Removal(msgspec.Struct, frozen=True):
    """How a block left.

    Attributes
    ----------
    causes : tuple of str
        "evicted", "expired", "checksum", "reset"; more than one where it cannot be told.
    at : float
        Moment of the clock when it was noticed, one step of the engine later at most.
    batch : Batch, optional
        None where that is forgotten.
    total_blocks : int
        Of the pool.
    """

    causes: tuple[str, ...]
    at: float
    batch: Batch | None
    total_blocks: int


class Removals:
    """Notes what leaves one pool.

    Parameters
    ----------
    pool : BlockPool
    planner : Planner
        Of this pool; its counts tell what expired and what was corrupt.
    """

    def __init__(self, pool: BlockPool, planner: Planner) -> None:
        self.tier = pool.tier
        self.total_blocks = pool.total_blocks
        self.num_noted = 0  # blocks that left, since the start
        self._pool = pool
        self._planner = planner
        self._events = pool.subscribe_events(["deleted"])
        num_places = min(max(_FEWEST_PLACES, 1 << (2 * pool.total_blocks - 1).bit_length()), _MOST_PLACES)
        self._mask = np.uint64(num_places - 1)
        self._names: HashArray = np.zeros((num_places, 2), dtype=np.uint64)
        self._at: npt.NDArray[np.float64] = np.zeros(num_places)
        self._causes: npt.NDArray[np.uint8] = np.zeros(num_places, dtype=np.uint8)  # bits by place in _CAUSES
        self._batch: npt.NDArray[np.int64] = np.zeros(num_places, dtype=np.int64)
        self._batches: list[Batch] = []  # a ring
        self._num_batches = 0
        self._is_whole = True  # nothing was overlooked
        self._num_evicted = pool.status().evictions
        self._num_expired, self._num_corrupt = self._counts()

    def note(self, now: float, pressure: Callable[[], str]) -> int:
        """Note what has left since the last call; give how many blocks.

        Parameters
        ----------
        now : float
            Moment of the clock.
        pressure : callable
            Says what needed room; asked where something has left.
        """
        rows = self._events.poll_rows()
        if not len(rows):
            return 0
        is_gap = rows["kind"] == _GAP
        if is_gap.any():  # more left at once than a subscription keeps
            self._is_whole = False
            rows = rows[~is_gap]
        status = self._pool.status()
        causes = self._causes_of(len(rows), status.evictions)
        if not len(rows):
            return 0
        names = rows["hash"]
        places = self._places(names)
        self._names[places], self._at[places], self._causes[places] = names, now, causes
        self._batch[places] = self._num_batches
        in_use = status.active + status.mutable + status.complete
        self._add(Batch(len(rows), in_use, pressure()))
        self.num_noted += len(rows)
        return len(rows)

    def find(self, name: HashArray) -> Removal | None:
        """Tell how a block left; None where nothing is known of it.

        Parameters
        ----------
        name : (2,) uint64
        """
        place = int((name[0] ^ name[1]) & self._mask)
        bits = int(self._causes[place])
        known = self._names[place]
        if not bits or known[0] != name[0] or known[1] != name[1]:
            return None
        causes = tuple(cause for number, cause in enumerate(_CAUSES) if bits >> number & 1)
        number = int(self._batch[place])
        is_known = self._num_batches - number <= _BATCHES
        batch = self._batches[number % _BATCHES] if is_known else None
        return Removal(causes, float(self._at[place]), batch, self.total_blocks)

    @property
    def memory(self) -> int | None:
        """About how many removals are remembered, the youngest; None while all of them are, but for a few."""
        num_places = len(self._names)
        return None if self._is_whole and self.num_noted <= num_places // _SPARSE else num_places

    def close(self) -> None:
        """Stop reading the pool's events; may be called twice."""
        self._events.close()

    # -- private -----------------------------------------------------------------------------------------------

    def _places(self, names: HashArray) -> npt.NDArray[np.intp]:
        places: npt.NDArray[np.intp] = ((names[:, 0] ^ names[:, 1]) & self._mask).astype(np.intp)
        return places

    def _add(self, batch: Batch) -> None:
        if len(self._batches) < _BATCHES:
            self._batches.append(batch)
        else:
            self._batches[self._num_batches % _BATCHES] = batch
        self._num_batches += 1

    def _causes_of(self, num_removed: int, num_evicted: int) -> int:
        """Give the bits of every cause that blocks may have left by since the last look."""
        evicted, self._num_evicted = num_evicted - self._num_evicted, num_evicted
        if evicted >= num_removed:  # as a rule; the planner's counts cost more
            return 1
        num_expired, num_corrupt = self._counts()
        expired, self._num_expired = num_expired - self._num_expired, num_expired
        corrupt, self._num_corrupt = num_corrupt - self._num_corrupt, num_corrupt
        is_more = num_removed > evicted + expired + corrupt
        rose = (evicted > 0, expired > 0, corrupt > 0, is_more)
        return sum(1 << number for number, is_cause in enumerate(rose) if is_cause)

    def _counts(self) -> tuple[int, int]:
        counts = self._planner.statistics()
        return counts.expired[self.tier.value], counts.mismatches[self.tier.value]
