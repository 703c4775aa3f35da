"""What a keyed tier holds, as far as is known: a bounded view, fed by jobs, that requests look into without waiting.

A keyed tier (an object store) has no slots. Its pool is the view: a block of it is a row that says "these bytes are
there", the row used longest ago gives way, and forgetting a row forgets nothing below. Rows come from a listing at the
start, from our own writes, and from probes: what a request misses is asked for in the background, in batches, one job
at a time, so that the next request finds it. What is known to be absent is not asked for again for a while. A tier that
cannot be reached is left alone for a while.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvbm.errors import PoolClosed
from kvbm.jobs import InventoryJob, JobResult, ProbeJob
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.limits import Limits
from kvbm.planner.queue import keys_of
from kvbm.planner.records import Submit
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Tier

_log = logging.getLogger("kvbm.planner")

_REQUESTS = 256  # that may wait to be asked for; the oldest are forgotten
_WISHES_AT_ONCE = 4  # of a job's blocks each
_ROWS_AT_ONCE = 4096  # registered under the lock in one piece


@dataclass(frozen=True)
class _Wish:
    """Blocks that somebody wants to know of."""

    hashes: HashArray
    parents: HashArray  # of each
    then: Callable[[HashArray], object] | None = None


class Presence:
    """The view of one keyed tier.

    Parameters
    ----------
    pool : BlockPool
        Its rows.
    limits : Limits
    next_id : callable
        Gives job numbers.
    submit : Submit
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        limits: Limits,
        next_id: Callable[[], int],
        submit: Submit,
        clock: Callable[[], float],
    ) -> None:
        self.pool = pool
        self._limits = limits
        self._next_id = next_id
        self._submit = submit
        self._clock = clock
        self._wanted: deque[_Wish] = deque(maxlen=_REQUESTS)
        self._absent: OrderedDict[bytes, float] = OrderedDict()  # until when it counts as absent
        self._is_asking = False  # one question at a time
        self._choosing = threading.Lock()  # guards it
        self._away_until = -np.inf

    @property
    def tier(self) -> Tier:
        """The keyed tier."""
        return self.pool.tier

    @property
    def is_away(self) -> bool:
        """Whether the tier could not be reached a short while ago."""
        return self._clock() < self._away_until

    def answered(self, results: Iterable[JobResult]) -> None:
        """Look at answers to a job of the tier: one that says it is out of reach has it left alone for a while."""
        if any(result.is_away for result in results):
            if not self.is_away:
                _log.warning("tier out of reach tier=%s seconds=%.1f", self.tier.value, self._limits.away_s)
            self._away_until = self._clock() + self._limits.away_s

    # -- asking ------------------------------------------------------------------------------------------------

    def want(self, hashes: HashArray, start: int) -> None:
        """Note what a request did not find: the blocks of a sequence from `start` on; any thread, no lock."""
        missing = hashes[start : start + self._limits.probe_blocks].copy()
        parents = np.zeros_like(missing)
        parents[1:] = missing[:-1]
        if start:
            parents[0] = hashes[start - 1]
        self._wanted.append(_Wish(missing, parents))

    def ask(self, hashes: HashArray, then: Callable[[HashArray], object]) -> None:
        """Ask for blocks that may be of several sequences, as many as a prefetch may bring; any thread, no lock.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64
        then : callable
            Told, without a lock, of those that are there and were not known to be.
        """
        (unknown,) = (self.pool.lookup(hashes) < 0).nonzero()
        missing = hashes.take(unknown[: self._limits.prefetch_blocks], axis=0)
        for first in range(0, len(missing), self._limits.job_blocks):
            part = missing[first : first + self._limits.job_blocks]
            self._wanted.append(_Wish(part, np.zeros_like(part), then))

    def step(self) -> bool:
        """Ask for what is wanted and not known, one job at a time; return whether a job was sent."""
        with self._choosing:
            if self._is_asking or not self._wanted or self.is_away:
                return False
            self._is_asking = True
        try:
            is_sent = self._ask_for_what_is_wanted()
        except BaseException:
            self._is_asking = False
            raise
        if not is_sent:
            self._is_asking = False
        return is_sent

    def _ask_for_what_is_wanted(self) -> bool:
        found: dict[bytes, tuple[HashArray, HashArray]] = {}
        asking: list[tuple[_Wish, list[bytes]]] = []
        known: list[tuple[_Wish, set[bytes]]] = []  # since they were wished for: by another's question
        now = self._clock()
        while self._wanted and len(found) < self._limits.job_blocks * _WISHES_AT_ONCE:
            wish = self._wanted.popleft()
            (unknown,) = (self.pool.lookup(wish.hashes) < 0).nonzero()
            keys = keys_of(wish.hashes.take(unknown, axis=0))
            if wish.then is not None and len(unknown) < len(wish.hashes):
                known.append((wish, set(keys_of(wish.hashes)).difference(keys)))
            for key, i in zip(keys, unknown.tolist(), strict=True):
                if wish.then is not None or self._absent.get(key, -np.inf) <= now:
                    found.setdefault(key, (wish.hashes[i], wish.parents[i]))
            if wish.then is not None:
                asking.append((wish, keys))
        for wish, there in known:
            _tell(wish, there)
        if not found:
            return False
        names, above = (np.array(column, dtype=np.uint64) for column in zip(*found.values(), strict=True))

        def settle(entry: OpenJob) -> Iterable[After]:
            self._is_asking = False
            if entry.is_too_late or any(result.is_away for result in entry.results.values()):
                return ()
            if not entry.reason:
                self._note_absent(names[~entry.ok])
            self.learn(names[entry.ok], above[entry.ok])
            stored = set(keys_of(names[entry.ok]))
            return [partial(_tell, wish, stored.intersection(keys)) for wish, keys in asking]

        job = ProbeJob(job_id=self._next_id(), tier=self.tier, ids=np.zeros(len(names), dtype=np.int32), hashes=names)
        self._submit([(job, settle)])
        return True

    def list(self) -> None:
        """Ask what the tier holds already, without waiting for it."""

        def settle(entry: OpenJob) -> Iterable[After]:
            if entry.is_too_late or entry.reason:
                return ()
            found = [(result.hashes, result.parents) for result in entry.results.values()]
            if any(hashes is None or parents is None for hashes, parents in found):
                return ()
            common = set.intersection(*(set(keys_of(hashes)) for hashes, _ in found if hashes is not None))
            hashes, parents = found[0]
            if hashes is None or parents is None:
                return ()
            is_common = np.array([key in common for key in keys_of(hashes)], dtype=np.bool_)
            # Oldest first, so the youngest stay where there are too few rows.
            names, above = hashes[is_common][-self.pool.total_blocks :], parents[is_common][-self.pool.total_blocks :]
            self.learn(names, above)
            _log.info("tier listed tier=%s num_blocks=%d", self.tier.value, len(names))
            return ()

        self._submit([(InventoryJob(job_id=self._next_id(), tier=self.tier), settle)])

    # -- knowing -----------------------------------------------------------------------------------------------

    def learn(self, hashes: HashArray, parents: HashArray) -> None:
        """Note that blocks are there, under the planner's lock; oldest first."""
        for first in range(0, len(hashes), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            is_new = self.pool.lookup(hashes[part]) < 0
            names, above = hashes[part][is_new], parents[part][is_new]
            try:
                rows = self.pool.try_allocate_blocks(len(names))
            except PoolClosed:
                return
            if rows is None:  # all rows are in use: it will be asked for again
                return
            self.pool.register_blocks(rows.complete(names, parents=above)).release()
            for key in keys_of(names):
                self._absent.pop(key, None)

    def _note_absent(self, hashes: HashArray) -> None:
        until = self._clock() + self._limits.absent_s
        for key in keys_of(hashes):
            self._absent[key] = until
            self._absent.move_to_end(key)
        while len(self._absent) > self._limits.absent_blocks:
            self._absent.popitem(last=False)


def _tell(wish: _Wish, there: set[bytes]) -> None:
    if wish.then is not None and there:
        is_there = [key in there for key in keys_of(wish.hashes)]
        try:
            wish.then(wish.hashes[is_there])
        except PoolClosed:  # nobody waits for it any more
            return
