"""Jobs about what slots hold, not about moving it: forget, touched, probe, inventory.

Only tiers that outlive the process keep such records; for others nothing is sent. `submit` opens a job and sends it to
every rank; it takes the planner's lock, so nothing here is called under that.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.jobs import ForgetJob, InventoryJob, Job, JobResult, ProbeJob, TouchedJob, Transfer
from kvbm.planner.ledger import After, OpenJob
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, ResetBlocksResponse, Tier, hash_array

_TOUCH_BATCHES = 4096  # that wait for a slow executor; the oldest are forgotten


class Submit(Protocol):
    """Opens jobs and sends them."""

    def __call__(self, jobs: Sequence[tuple[Job, Callable[[OpenJob], Iterable[After]]]]) -> None:
        """Open and send each job; call back under the planner's lock when it is settled."""


class RecordKeeper:
    """Keeps the records of executors in step with the pools.

    Parameters
    ----------
    tiers : iterable of Tier
        Those whose executor keeps records.
    next_id : callable
        Gives job numbers; safe from any thread.
    submit : Submit
    timeout_s : float
        Until a question to the executors ends for whoever asked.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        tiers: Iterable[Tier],
        *,
        next_id: Callable[[], int],
        submit: Submit,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.tiers = frozenset(tiers)
        self._next_id = next_id
        self._submit = submit
        self._timeout_s = timeout_s
        self._clock = clock
        self._touched: dict[Tier, deque[HashArray]] = {tier: deque(maxlen=_TOUCH_BATCHES) for tier in self.tiers}
        self._is_telling: set[Tier] = set()  # tiers whose executor has not answered the last one
        self._asked: weakref.WeakSet[Transfer[Any]] = weakref.WeakSet()

    def close(self, error: BaseException) -> None:
        """End every question that is still open with this error."""
        for transfer in list(self._asked):
            transfer.set_exception(error)

    def _ask(self) -> Transfer[Any]:
        transfer: Transfer[Any] = Transfer(deadline_s=self._timeout_s, clock=self._clock)
        self._asked.add(transfer)
        return transfer

    def reset_blocks(self, pool: BlockPool, hashes: HashArray) -> ResetBlocksResponse:
        """Forget blocks of a pool by hash, and the records that would bring them back."""
        names = hash_array(hashes)
        ids = pool.lookup(names)
        response = pool.reset_blocks(names)
        gone = (ids >= 0) & (pool.lookup(names) < 0)
        self._forget(pool.tier, ids[gone], names[gone])
        return response

    def reset_pool(self, pool: BlockPool) -> int:
        """Forget every block of a pool, and the records that would bring them back; return how many."""
        ids, names, _, _ = pool.registered()
        num_blocks = pool.reset()
        self._forget(pool.tier, ids, names)
        return num_blocks

    def _forget(self, tier: Tier, ids: IdArray, hashes: HashArray) -> None:
        if tier in self.tiers and len(ids):
            job = ForgetJob(job_id=self._next_id(), tier=tier, ids=ids, hashes=hashes)
            self._submit([(job, _ignore)])

    def touch(self, pool: BlockPool, batches: Sequence[HashArray]) -> None:
        """Tell the executors of a pool's tier what was used, in order."""
        if pool.tier not in self.tiers:
            return
        waiting = self._touched[pool.tier]
        waiting.extend(batches)
        if not waiting or pool.tier in self._is_telling:  # one job at a time: an executor may be slow
            return
        hashes = np.concatenate([batch[::-1] for batch in waiting])  # oldest first: a sequence's head is its youngest
        waiting.clear()
        ids = pool.lookup(hashes)
        is_there = ids >= 0
        if not is_there.any():
            return
        ids, hashes = ids[is_there], hashes[is_there]
        _, _, priorities = pool.describe_blocks(ids)
        job = TouchedJob(job_id=self._next_id(), tier=pool.tier, ids=ids, hashes=hashes, priorities=priorities)

        def settle(entry: OpenJob) -> Iterable[After]:
            self._is_telling.discard(pool.tier)
            return ()

        self._is_telling.add(pool.tier)
        self._submit([(job, settle)])

    def probe(self, pool: BlockPool, hashes: HashArray) -> Transfer[npt.NDArray[np.bool_]]:
        """Ask every rank which registered blocks of a pool it really holds: (num_blocks,) bool."""
        names = hash_array(hashes)
        ids = pool.lookup(names)
        is_there = ids >= 0
        transfer: Transfer[npt.NDArray[np.bool_]] = self._ask()

        def settle(entry: OpenJob) -> Iterable[After]:
            held = is_there.copy()
            held[is_there] = entry.ok
            return [lambda: _end(transfer, held)]

        job = ProbeJob(job_id=self._next_id(), tier=pool.tier, ids=ids[is_there], hashes=names[is_there])
        self._submit([(job, settle)])
        return transfer

    def restore(self, pool: BlockPool) -> Transfer[int]:
        """Ask every rank what it found, register what all of them have in the same slots; give how many."""
        transfer: Transfer[int] = self._ask()

        def settle(entry: OpenJob) -> Iterable[After]:
            if entry.is_too_late:
                return ()
            ids, hashes, parents, priorities = intersect(entry.results)
            pool.restore_blocks(ids, hashes, parents, priorities)
            return [lambda: _end(transfer, len(ids))]

        self._submit([(InventoryJob(job_id=self._next_id(), tier=pool.tier), settle)])
        return transfer


def intersect(
    results: Mapping[int, JobResult],
) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
    """Keep what every rank found: the same hash in the same slot, each hash and slot once, in the first rank's order.

    Returns
    -------
    ids, hashes, parents, priorities
        (num_blocks,) int32, (num_blocks, 2) uint64 twice, (num_blocks,) uint8.
    """
    nothing = np.empty((0, 2), dtype=np.uint64)
    empty = np.empty(0, dtype=np.int32), nothing, nothing, np.empty(0, dtype=np.uint8)
    if not results or any(result.ids is None for result in results.values()):
        return empty
    first, *others = (results[rank] for rank in sorted(results))
    common = set.intersection(*(set(_entries(other)) for other in others)) if others else None
    seen: set[Any] = set()
    places = []
    for i, (block_id, name) in enumerate(_entries(first)):
        if (common is None or (block_id, name) in common) and block_id not in seen and name not in seen:
            seen.update((block_id, name))
            places.append(i)
    batches = first.ids, first.hashes, first.parents, first.priorities
    if not places or any(batch is None for batch in batches):
        return empty
    return tuple(batch[places] for batch in batches if batch is not None)  # type: ignore[return-value]


def _entries(result: JobResult) -> list[tuple[int, bytes]]:
    ids, hashes = result.ids, result.hashes
    if ids is None or hashes is None:
        return []
    data = np.ascontiguousarray(hashes).tobytes()
    return [(block_id, data[16 * i : 16 * i + 16]) for i, block_id in enumerate(ids.tolist())]


def _ignore(entry: OpenJob) -> Iterable[After]:
    return ()


def _end(transfer: Transfer[Any], result: Any) -> None:
    transfer.set_result(result)
