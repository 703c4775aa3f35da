"""What a keyed tier holds, as far as is known: a bounded view, fed by jobs, that requests look into without waiting.

A keyed tier (an object store) has no slots. Its pool is the view: a block of it is a row that says "these bytes are
there", the row used longest ago gives way, and forgetting a row forgets nothing below. Rows come from a listing at the
start, from our own writes, and from probes: what a request misses is asked for in the background, in batches, one job
at a time, so that the next request finds it; a sequence is followed as long as its blocks are there. What is known to
be absent is not asked for again for a while, and what is known to be there is asked for again after a longer one:
others may delete it. A tier that cannot be reached is left alone for a while.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvbm.errors import PoolClosed
from kvbm.jobs import InventoryJob, JobResult, ProbeJob
from kvbm.planner.known import KnownRows
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


Then = Callable[[HashArray, HashArray], object]


@dataclass(eq=False)
class Wish:
    """Blocks that somebody wants to know of.

    Attributes
    ----------
    hashes, parents : (num_blocks, 2) uint64
        Of those that are asked for next.
    until : float
        Moment after which nobody wants to know.
    then : callable, optional
        Told once.
    is_wanted : callable
    rest : (num_blocks, 2) uint64, optional
        What follows in the sequence: it is asked for as long as all before it is there.
    is_open : bool
        Whether an answer may still come.
    """

    hashes: HashArray
    parents: HashArray
    until: float
    then: Then | None = None
    is_wanted: Callable[[], bool] = lambda: True
    rest: HashArray | None = None
    is_open: bool = True

    def go_on(self, most: int) -> bool:
        """Turn to what follows in the sequence, to twice as much, `most` at most; return whether there is any."""
        if self.rest is None or not len(self.rest):
            return False
        size = min(2 * len(self.hashes), most)
        above = self.hashes[-1:]
        self.hashes, self.rest = self.rest[:size], self.rest[size:]
        self.parents = np.concatenate([above, self.hashes[:-1]])
        return True


@dataclass
class _Question:
    """One job, and whom to tell what of its answer."""

    found: dict[bytes, tuple[HashArray, HashArray]] = field(default_factory=dict)  # hash, parent
    wishes: list[tuple[Wish, set[bytes]]] = field(default_factory=list)  # with what is known to be there already
    followed: list[Wish] = field(default_factory=list)  # that nobody is told of, and that may go on
    known: set[bytes] = field(default_factory=set)  # rows that are asked for again


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
        self._wanted: deque[Wish] = deque(maxlen=_REQUESTS)  # what requests missed
        self._asked: deque[Wish] = deque()  # what somebody waits for; under `_choosing`
        self._known = KnownRows(pool, limits.known_s, clock)
        self._absent: OrderedDict[bytes, float] = OrderedDict()  # until when it counts as absent
        self.asked_at: float | None = None  # moment when the open question was begun: one at a time
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

    def has_unknown(self, hashes: HashArray) -> bool:
        """Tell whether asking for a sequence's next blocks may say something new; any thread."""
        names, now = hashes[: self._limits.probe_blocks], self._clock()
        if self.is_away:
            return False
        unknown = names[self.pool.lookup(names) < 0]
        return any(not self._is_absent(key, now) for key in keys_of(unknown))

    def answered(self, results: Iterable[JobResult]) -> None:
        """Look at answers to a job of the tier: one that says it is out of reach has it left alone for a while."""
        if any(result.is_away for result in results):
            if not self.is_away:
                _log.warning("tier out of reach tier=%s seconds=%.1f", self.tier.value, self._limits.away_s)
            self._away_until = self._clock() + self._limits.away_s

    # -- asking ------------------------------------------------------------------------------------------------

    def want(self, hashes: HashArray, start: int) -> Wish:
        """Note what a request did not find: the blocks of a sequence from `start` on; any thread, no lock."""
        missing, size = hashes[start:].copy(), self._limits.probe_blocks
        above = hashes[start - 1 : start] if start else np.zeros((1, 2), dtype=np.uint64)
        parents = np.concatenate([above, missing[: size - 1]])[: len(missing)]
        until = self._clock() + self._limits.offload_timeout_s
        wish = Wish(missing[:size], parents, until, rest=missing[size:])
        self._put(wish)
        return wish

    def _put(self, wish: Wish) -> None:
        if len(self._wanted) == _REQUESTS:
            with contextlib.suppress(IndexError):  # another thread took it
                self._wanted.popleft().is_open = False
        self._wanted.append(wish)

    def ask(
        self, hashes: HashArray, then: Then, *, is_wanted: Callable[[], bool], until: float
    ) -> tuple[list[HashArray], int]:
        """Ask for blocks that may be of several sequences, as many as a prefetch may bring; any thread.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64
        then : callable
            Told once of each part, without a lock: which blocks were asked for, and those of them that are there; none
            where there was no answer.
        is_wanted : callable
            Whether anybody waits still; takes no lock.
        until : float
            Moment after which nobody waits.

        Returns
        -------
        parts : list of (num_blocks, 2) uint64
            That will be asked for.
        num_left : int
            Blocks that will not be, because enough are.
        """
        (unknown,) = (self.pool.lookup(hashes) < 0).nonzero()
        missing = hashes.take(unknown[: self._limits.prefetch_blocks], axis=0)
        size = self._limits.job_blocks
        with self._choosing:
            room = max(0, _REQUESTS - len(self._asked))
            parts = [missing[first : first + size] for first in range(0, len(missing), size)][:room]
            self._asked.extend(Wish(part, np.zeros_like(part), until, then, is_wanted) for part in parts)
        return parts, len(unknown) - sum([len(part) for part in parts])

    def next_look(self) -> float | None:
        """When to step again, if nothing happens before."""
        if self.asked_at is not None:
            return None
        return self._away_until if self._asked or self._wanted else max(self._known.looks_at, self._away_until)

    def step(self) -> bool:
        """Ask for what is wanted and not known, one job at a time; return whether there is more to do at once."""
        self._drop_unwanted()
        with self._choosing:
            has_work = self._wanted or self._asked or self._known.is_due
            if self.asked_at is not None or not has_work or self.is_away:
                return False
            self.asked_at = self._clock()
        question = _Question()
        try:
            self._choose(question)
            if question.found:
                self._send(question)
                return True
        except BaseException:
            with self._choosing:
                self._asked.extendleft(reversed([wish for wish, _ in question.wishes]))
            self.asked_at = None
            self._end(question)
            raise
        self.asked_at = None
        return bool(self._wanted or self._asked or self._known.is_due)

    def _drop_unwanted(self) -> None:
        """Answer wishes that nobody has any more."""
        now = self._clock()
        with self._choosing:
            dropped = [wish for wish in self._asked if now >= wish.until or not wish.is_wanted()]
            if not dropped:
                return
            gone = set(map(id, dropped))
            self._asked = deque(wish for wish in self._asked if id(wish) not in gone)
        for wish in dropped:
            _tell(wish, set())

    def _choose(self, question: _Question) -> None:
        """Take as many wishes as one job answers, and rows that are to be asked for again where there is room."""
        now, found = self._clock(), question.found
        max_blocks = self._limits.job_blocks * _WISHES_AT_ONCE
        while len(found) < max_blocks and (wish := self._next_wish()) is not None:
            (unknown,) = (self.pool.lookup(wish.hashes) < 0).nonzero()
            keys = keys_of(wish.hashes.take(unknown, axis=0))
            if wish.then is not None:
                known = set(keys_of(wish.hashes)).difference(keys)  # since it was wished for: by another's question
                if not keys:
                    _tell(wish, known)
                    continue
                question.wishes.append((wish, known))
            elif now >= wish.until or all(self._is_absent(key, now) for key in keys):
                self._follow(wish, is_there=not keys and now < wish.until)
                continue
            else:
                question.followed.append(wish)
            for key, i in zip(keys, unknown.tolist(), strict=True):
                if wish.then is not None or not self._is_absent(key, now):
                    found.setdefault(key, (wish.hashes[i], wish.parents[i]))
        if len(found) < max_blocks:
            old = self._known.take_old(max_blocks - len(found))
            question.known.update(keys_of(old))
            zeros = np.zeros(2, dtype=np.uint64)
            for key, name in zip(keys_of(old), old, strict=True):
                found[key] = name, zeros

    def _follow(self, wish: Wish, *, is_there: bool) -> None:
        """Turn to what follows in a sequence whose blocks are all there; otherwise its wish is answered."""
        if is_there and wish.go_on(self._limits.job_blocks * _WISHES_AT_ONCE):
            self._put(wish)
        else:
            wish.is_open = False

    def _end(self, question: _Question) -> None:
        """Note that a question is answered, or was not sent; what was learnt of it is registered."""
        for wish in question.followed:
            self._follow(wish, is_there=bool((self.pool.lookup(wish.hashes) >= 0).all()))

    def _next_wish(self) -> Wish | None:
        with self._choosing:
            if self._asked:
                return self._asked.popleft()
            return self._wanted.popleft() if self._wanted else None

    def _send(self, question: _Question) -> None:
        names, above = (np.array(column, dtype=np.uint64) for column in zip(*question.found.values(), strict=True))

        def settle(entry: OpenJob) -> Iterable[After]:
            self.asked_at = None
            is_away = any(result.is_away for result in entry.results.values())
            if is_away and not entry.is_too_late:  # it is asked again, as long as somebody wants to know
                self._end(question)
                with self._choosing:
                    self._asked.extendleft(reversed([wish for wish, _ in question.wishes]))
                return ()
            stored: set[bytes] = set()
            if not entry.is_too_late:
                if not entry.reason:
                    self._note_absent(names[~entry.ok])
                    self._forget(names[~entry.ok], question.known)
                self.learn(names[entry.ok], above[entry.ok])
                stored = set(keys_of(names[entry.ok]))
            self._end(question)
            return [partial(_tell, wish, known | stored) for wish, known in question.wishes]

        job = ProbeJob(job_id=self._next_id(), tier=self.tier, ids=np.zeros(len(names), dtype=np.int32), hashes=names)
        self._submit([(job, settle)])

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
            ids = self.pool.lookup(hashes[part])
            self._known.see(ids[ids >= 0])
            for key in keys_of(names):
                self._absent.pop(key, None)

    def _forget(self, hashes: HashArray, known: set[bytes]) -> None:
        """Forget rows that were believed and are not there any more; those in use stay until somebody has read."""
        is_row = np.array([key in known for key in keys_of(hashes)], dtype=np.bool_)
        if is_row.any():
            with contextlib.suppress(PoolClosed):
                self.pool.reset_blocks(hashes[is_row])

    def _is_absent(self, key: bytes, now: float) -> bool:
        """Tell whether a block was not there a short while ago."""
        return self._absent.get(key, -np.inf) > now

    def _note_absent(self, hashes: HashArray) -> None:
        until = self._clock() + self._limits.absent_s
        for key in keys_of(hashes):
            self._absent[key] = until
            self._absent.move_to_end(key)
        while len(self._absent) > self._limits.absent_blocks:
            self._absent.popitem(last=False)


def _tell(wish: Wish, there: set[bytes]) -> None:
    if wish.then is not None:
        is_there = np.array([key in there for key in keys_of(wish.hashes)], dtype=np.bool_)
        with contextlib.suppress(PoolClosed):  # nobody waits for it any more
            wish.then(wish.hashes, wish.hashes[is_there])
