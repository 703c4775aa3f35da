"""Jobs about what slots hold, not about moving it: forget, touched, probe, inventory.

Only tiers that outlive the process keep such records; for others nothing is sent. `submit` opens a job and sends it to
every rank; it takes the planner's lock, so nothing here is called under that.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.jobs import ForgetJob, InventoryJob, Job, ProbeJob, TouchedJob, Transfer
from kvbm.planner.inventories import intersect
from kvbm.planner.ledger import After, OpenJob
from kvbm.planner.queue import keys_of
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, ResetBlocksResponse, Tier, hash_array

_log = logging.getLogger("kvbm.planner")
_NO_NAMES: frozenset[bytes] = frozenset()
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
    keyed_tiers : iterable of Tier
        Those of them that others share, and whose pool is only what is known of them.
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
        keyed_tiers: Iterable[Tier] = (),
        next_id: Callable[[], int],
        submit: Submit,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.tiers = frozenset(tiers)
        self.restored: Counter[str] = Counter()  # blocks that were there at the start, by tier
        self.keyed_tiers = frozenset(keyed_tiers)
        self.shut: set[Tier] = set()  # told to forget everything, and not answered: nobody looks there
        self._next_id = next_id
        self._submit = submit
        self._timeout_s = timeout_s
        self._clock = clock
        self._touched: dict[Tier, deque[HashArray]] = {tier: deque(maxlen=_TOUCH_BATCHES) for tier in self.tiers}
        self._is_telling: set[Tier] = set()  # tiers whose executor has not answered the last one
        self._shut_out: dict[Tier, set[bytes]] = {tier: set() for tier in self.tiers}
        self._asked: weakref.WeakSet[Transfer[Any]] = weakref.WeakSet()

    def close(self, error: BaseException) -> None:
        """End every question that is still open with this error."""
        for transfer in list(self._asked):
            transfer.set_exception(error)

    def _ask(self) -> Transfer[Any]:
        transfer: Transfer[Any] = Transfer(deadline_s=self._timeout_s, clock=self._clock)
        self._asked.add(transfer)
        return transfer

    # -- forgetting --------------------------------------------------------------------------------------------

    def reset_blocks(self, pool: BlockPool, hashes: HashArray) -> ResetBlocksResponse:
        """Forget blocks of a pool by hash, and the records that would bring them back, before this returns.

        Raises
        ------
        StorageError
            The pool has forgotten them, but an executor could not: a restart may find them.
        TransferTimeout
            An executor has not said so in time.
        """
        names = hash_array(hashes)
        response = pool.reset_blocks(names)
        if pool.tier in self.tiers:
            # Also names that the pool has not: their bytes may lie in slots that nobody has taken again.
            self._forget(pool.tier, names[pool.lookup(names) < 0])
        return response

    def reset_pool(self, pool: BlockPool) -> int:
        """Forget every block of a pool, and every record of its tier, before this returns; give how many blocks.

        Raises as `reset_blocks` does.
        """
        num_blocks = pool.reset()
        if pool.tier in self.tiers:
            self._forget(pool.tier, np.empty((0, 2), dtype=np.uint64), is_all=True)
        return num_blocks

    def forget_later(self, tier: Tier, ids: IdArray, hashes: HashArray) -> None:
        """Send that no restart shall find these blocks in these slots, without waiting for it."""
        if tier in self.tiers and len(hashes):
            self._send_forget(ForgetJob(job_id=self._next_id(), tier=tier, hashes=hashes, ids=ids))

    def forget_all_later(self, tier: Tier, then: Callable[[], object]) -> None:
        """Send that no restart shall find anything in a tier, without waiting for it; `then` is called under the lock.

        Nothing may move there meanwhile.
        """
        empty = np.empty((0, 2), dtype=np.uint64)
        self._send_forget(ForgetJob(job_id=self._next_id(), tier=tier, hashes=empty, is_all=True), then=then)

    # What leaves a tier by its time is forgotten by name, wherever older copies of it lie; a copy that was written
    # meanwhile would be forgotten with them, so from before the pool forgets these names none is on its way.

    def shut_out(self, tier: Tier) -> AbstractSet[bytes]:
        """Give the names of the blocks that must not be sent to a tier for now; any thread."""
        return self._shut_out.get(tier, _NO_NAMES)

    def begin_to_forget(self, tier: Tier, hashes: HashArray) -> None:
        """Let none of these blocks be sent to a tier, until `forget_gone` has done with them."""
        if tier in self.tiers:
            self._shut_out[tier].update(keys_of(hashes))

    def forget_gone(self, tier: Tier, hashes: HashArray, is_gone: npt.NDArray[np.bool_]) -> None:
        """Send that no restart shall find those of these blocks that are gone from the pool, without waiting for it."""
        if tier not in self.tiers:
            return
        shut_out, gone = self._shut_out[tier], hashes[is_gone]
        shut_out.difference_update(keys_of(hashes[~is_gone]))
        let_in = partial(shut_out.difference_update, keys_of(gone))
        if not len(gone):
            return
        try:
            self._send_forget(ForgetJob(job_id=self._next_id(), tier=tier, hashes=gone), then=let_in)
        except BaseException:  # ctrl-C, or the planner was closed
            let_in()
            raise

    def _forget(self, tier: Tier, hashes: HashArray, *, is_all: bool = False) -> None:
        if not len(hashes) and not is_all:
            return
        transfer: Transfer[str] = self._ask()
        job = ForgetJob(job_id=self._next_id(), tier=tier, hashes=hashes, is_all=is_all)
        self._send_forget(job, transfer=transfer)
        reason = transfer.result()
        if reason:
            what = "its blocks" if is_all else f"{len(hashes)} blocks"
            text = f"the {tier.value} tier could not forget {what}, a restart may find them: {reason}"
            raise StorageError(errno.EIO, text)

    def _send_forget(
        self, job: ForgetJob, *, transfer: Transfer[str] | None = None, then: Callable[[], object] = lambda: None
    ) -> None:
        def settle(entry: OpenJob) -> Iterable[After]:
            then()
            if entry.reason:
                num_blocks = len(job.hashes)
                _log.warning("forget failed tier=%s num_blocks=%d reason=%s", job.tier.value, num_blocks, entry.reason)
            return () if transfer is None else [lambda: _end(transfer, entry.reason)]

        self._submit([(job, settle)])

    # -- recency -----------------------------------------------------------------------------------------------

    def touch(self, pool: BlockPool, batches: Sequence[HashArray], *, is_last: bool = False) -> None:
        """Tell the executors of a pool's tier what was used, in order; the last time also behind an unanswered job."""
        if pool.tier not in self.tiers - self.keyed_tiers:
            return
        waiting = self._touched[pool.tier]
        waiting.extend(batches)
        if not waiting or (pool.tier in self._is_telling and not is_last):  # one at a time: an executor may be slow
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

    # -- questions ---------------------------------------------------------------------------------------------

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
            if entry.is_too_late or transfer.done():  # its slots may be in use by now
                return ()
            try:
                ids, hashes, parents, priorities = intersect(entry.results, pool.total_blocks)
                pool.restore_blocks(ids, hashes, parents, priorities)
                self.restored[pool.tier.value] += len(ids)
            except Exception as error:
                return [partial(_fail, transfer, error)]
            return [lambda: _end(transfer, len(ids))]

        self._submit([(InventoryJob(job_id=self._next_id(), tier=pool.tier), settle)])
        return transfer


def _fail(transfer: Transfer[Any], error: Exception) -> None:
    transfer.set_exception(error)


def _end(transfer: Transfer[Any], result: Any) -> None:
    transfer.set_result(result)
