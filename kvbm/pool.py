"""BlockPool: one store, its policy, and the guards that users hold.

Bookkeeping only; bytes are reached through what a manager injects. Thread-safe: the store has the one lock, counters
have their own, and blocks dropped by the garbage collector, or released inside a store call, are given back by the
next call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.blocks import BlockGuard, CompleteBlocks, ImmutableBlocks, MutableBlocks, WeakBlocks
from kvbm.errors import BlockStateError, NotEnoughBlocksAvailable, PluginError, PoolClosed
from kvbm.events import EventHub, EventSubscription, KvEventType
from kvbm.histogram import SHORT_BOUNDS_S, Histogram
from kvbm.metadata import BlockMetadata
from kvbm.types import (
    BlockBytes,
    BlockState,
    HashArray,
    IdArray,
    PoolStatus,
    ResetBlocksResponse,
    Tier,
    hash_array,
    hash_list,
)
from kvbm.waiting import WaitList

_log = logging.getLogger("kvbm.pool")


class BlockPool:
    """A fixed number of blocks, reused by sequence hash.

    Parameters
    ----------
    num_blocks : int
        1 to 2**31 - 2.
    name : str
        Used in messages.
    tier : Tier
    policy : EvictionPolicy, optional
        None is the built-in LRU.
    worker_id : str
        Put into events.
    event_metadata : dict of str to str, optional
        Put into events.
    backend : Backend, optional
        The twin to use; default by ``KVBM_BACKEND``.

    Examples
    --------
    >>> import kvbm
    >>> pool = kvbm.BlockPool(8)
    >>> sequence = kvbm.TokenSequence(range(32), block_size=16)
    >>> fresh = pool.allocate_blocks(sequence.num_full_blocks)
    >>> pool.register_blocks(fresh.complete(sequence.hashes)).release()
    >>> len(pool.match_sequence_hashes(sequence.hashes))
    2
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        name: str = "pool",
        tier: Tier = Tier.DEVICE,
        policy: Any = None,
        worker_id: str = "0",
        event_metadata: dict[str, str] | None = None,
        backend: Backend | None = None,
    ) -> None:
        backend = backend or default_backend()
        self.name = name
        self.tier = tier
        self.bytes: BlockBytes | None = None  # injected by a manager
        self._store = backend.store(num_blocks, policy=None if getattr(policy, "is_builtin", False) else policy)
        self._hub = EventHub(self._store, tier=tier, worker_id=worker_id, metadata=event_metadata)
        self._dropped: deque[tuple[IdArray, bool]] = deque()  # left by finalisers
        self._metadata = BlockMetadata()
        self._waiters = WaitList()
        self._lock = threading.Lock()  # counters and listeners
        self._hits = self._misses = self._evictions = self._registered = self._folded = 0
        self._allocation_s = Histogram(SHORT_BOUNDS_S)
        self._listeners: tuple[Callable[[], None], ...] = ()  # told that something was registered
        self._used: Callable[[IdArray], None] | None = None  # told which slots are used
        self._is_closed = False

    # -- the life of blocks ------------------------------------------------------------------------------------

    def try_allocate_blocks(self, n: int) -> MutableBlocks | None:
        """Take n blocks to fill, evicting where needed; None when fewer are available."""
        self._begin()
        began = time.perf_counter()
        if (answer := self._store.allocate(n)) is None:
            _log.debug("allocation refused pool=%s num_blocks=%d", self.name, n)
            return None
        ids, evicted = answer
        with self._lock:
            self._evictions += len(evicted)
            self._allocation_s.observe(time.perf_counter() - began)
        self._metadata.forget(ids)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("allocated pool=%s num_blocks=%d num_evicted=%d", self.name, n, len(evicted))
        return MutableBlocks(self, ids)

    def allocate_blocks(self, n: int, *, timeout: float | None = None) -> MutableBlocks:
        """Take n blocks to fill, evicting where needed.

        Parameters
        ----------
        n : int
        timeout : float, optional
            Seconds to wait for others to release blocks, ``math.inf`` for ever; None does not wait. Who waits is not
            queued: the first that finds enough blocks gets them.

        Raises
        ------
        NotEnoughBlocksAvailable
            Fewer are available (by then); nothing was taken.
        """
        blocks = self.try_allocate_blocks(n)
        if blocks is not None:
            return blocks
        if timeout is not None and n <= self.total_blocks:
            blocks = self._waiters.wait_for(lambda: self.try_allocate_blocks(n), timeout)
        if blocks is None:
            counts = self._store.counts()
            free, inactive = counts["free"], counts["inactive"]
            detail = f"({free} free + {inactive} evictable, pool {self.name!r}, {self.total_blocks} total)"
            raise NotEnoughBlocksAvailable(n, free + inactive, detail)
        return blocks

    def register_blocks(self, blocks: CompleteBlocks) -> ImmutableBlocks:
        """Publish complete blocks so that others find them, and use up their guard.

        A block whose hash is registered already gives way: the guard returned holds the registered one.
        """
        self._begin()
        if getattr(blocks, "_pool", None) is not self or blocks.state is not BlockState.COMPLETE:
            raise BlockStateError(f"pool {self.name!r} registers its own CompleteBlocks, got {blocks!r}")
        ids = blocks._take("register")
        boxes = self._metadata.boxes() if self._metadata else {}
        try:
            primaries, folded = self._store.register(ids)
        except BaseException:
            blocks._give_back(ids)
            raise
        blocks._gone = "active"
        num_folded = int(np.count_nonzero(folded))
        with self._lock:
            self._registered += len(ids)
            self._folded += num_folded
        if num_folded:
            self._metadata.empty(map(boxes.get, ids[folded].tolist()))  # their slots may have other owners by now
            self._waiters.wake()
        self._note_use(primaries)
        for listener in self._listeners:
            listener()
        return ImmutableBlocks(self, primaries, blocks._hashes)

    def match_sequence_hashes(self, hashes: HashArray | Sequence[bytes]) -> ImmutableBlocks:
        """Find the longest registered prefix of a sequence and hold it; an empty guard is a miss.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64, host
            Or a sequence of 16-byte strings.
        """
        self._begin()
        names = hashes if isinstance(hashes, np.ndarray) else hash_array(hashes)
        ids = self._store.match(names)  # which refuses an array of another form
        num_hits = len(ids)
        self._note_use(ids)
        with self._lock:
            self._hits += num_hits
            self._misses += len(names) - num_hits
        return ImmutableBlocks(self, ids, names[:num_hits].copy())

    def free_blocks(self, blocks: BlockGuard | Iterable[BlockGuard]) -> None:
        """Release a guard, or several of them in the order given (give the deeper ones first)."""
        for guard in [blocks] if isinstance(blocks, BlockGuard) else blocks:
            guard.release()

    # -- names and recency -------------------------------------------------------------------------------------

    def lookup(self, hashes: HashArray) -> IdArray:
        """Give the slot of each hash, -1 where absent; holds nothing and changes no recency."""
        self._begin()
        return self._store.find(hash_array(hashes))

    def hold_blocks(self, ids: IdArray, hashes: HashArray) -> tuple[ImmutableBlocks, npt.NDArray[np.bool_]]:
        """Hold blocks, found by `lookup`, that still have these hashes; give them and, (num_blocks,) bool, which."""
        return WeakBlocks(self, ids, hashes).upgrade_each()

    def describe_blocks(self, ids: IdArray) -> tuple[HashArray, HashArray, npt.NDArray[np.uint8]]:
        """Give hashes, parents and priorities of registered blocks by slot; see `kvbm._pure.store.Store.describe`."""
        return self._store.describe(ids)

    def restore_blocks(
        self, ids: IdArray, hashes: HashArray, parents: HashArray, priorities: npt.NDArray[np.uint8]
    ) -> None:
        """Register blocks whose bytes outlived the process, as inactive, at exactly these free slots, oldest first."""
        self._begin()
        self._store.restore(ids, hashes, parents, priorities)
        self._note_use(ids)

    def touch_blocks(self, hashes: HashArray) -> int:
        """Make blocks young again; return how many of the hashes are registered."""
        self._begin()
        names = hash_array(hashes)
        if self._used is not None:
            ids = self._store.find(names)
            self._used(ids[ids >= 0])
        return self._store.touch(names)

    def set_priority(self, hashes: HashArray, priority: int) -> int:
        """Keep blocks longer (up to 100) or less long (down to 0; default 50); return how many were found."""
        self._begin()
        return self._store.set_priority(hash_array(hashes), priority)

    def discard_blocks(self, blocks: ImmutableBlocks) -> None:
        """Unpublish blocks at once, e.g. corrupt ones, unless another holder has; free when nobody holds them."""
        self._begin()
        if blocks.state is not BlockState.ACTIVE or not blocks.is_of(self):
            raise BlockStateError(f"pool {self.name!r} discards its own ImmutableBlocks, got {blocks!r}")
        ids = blocks.block_ids
        self._store.discard(ids)
        self._metadata.forget(ids)

    def reset_blocks(self, hashes: HashArray) -> ResetBlocksResponse:
        """Forget blocks by hash; those in use stay."""
        self._begin()
        reset, not_found, busy = self._store.remove(hash_array(hashes))
        self._metadata.sweep(self._store.states)
        self._waiters.wake()
        return ResetBlocksResponse(hash_list(reset), hash_list(not_found), hash_list(busy))

    def reset(self) -> int:
        """Forget every block; return how many.

        Raises
        ------
        BlockStateError
            Some block is in use; nothing was forgotten.
        """
        self._begin()
        num_blocks = self._store.clear()
        self._metadata.sweep(self._store.states)
        self._waiters.wake()
        return num_blocks

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def total_blocks(self) -> int:
        """Blocks in the pool."""
        return self._store.num_blocks

    @property
    def available_blocks(self) -> int:
        """Blocks that an allocation could have now: free + inactive."""
        self._reap()
        counts = self._store.counts()
        return counts["free"] + counts["inactive"]

    def status(self) -> PoolStatus:
        """Count blocks by state, and what happened since the start."""
        self._reap()
        counts = self._store.counts()
        with self._lock:
            return PoolStatus(
                name=self.name,
                tier=self.tier,
                total_blocks=self.total_blocks,
                **counts,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                registered_total=self._registered,
                folded_total=self._folded,
            )

    def registered(self) -> tuple[IdArray, HashArray, HashArray, int]:
        """Give ids, hashes and parents of all registered blocks, and the last event's sequence number."""
        self._reap()
        return self._store.registered()

    def subscribe_events(self, kinds: Iterable[KvEventType | str] | None = None) -> EventSubscription:
        """Read what happens from now on; `kinds` limits it to e.g. ``["created"]``."""
        self._begin()
        return self._hub.subscribe(kinds)

    def allocation_times(self) -> Histogram:
        """Give how long allocations took, in seconds, since the start."""
        with self._lock:
            return self._allocation_s.copy()

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call back after each registration, in the thread that registers; must be quick and not call the pool."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def watch_uses(self, used: Callable[[IdArray], None]) -> None:
        """Tell which slots are registered, matched, held, released or touched, in that thread; one watcher a pool."""
        self._used = used

    def check(self) -> None:
        """Verify the store's invariants; raise AssertionError where one is broken. Cost grows with the pool."""
        self._reap()
        self._store.check()

    def close(self) -> None:
        """Refuse further calls; guards can still be released."""
        self._is_closed = True
        self._waiters.wake()

    # -- what guards call --------------------------------------------------------------------------------------

    def stage(self, ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        """Name filled blocks: MUTABLE -> COMPLETE."""
        self._begin()
        self._store.stage(ids, hashes, parents)

    def acquire(self, ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Take a reference on each block that still holds its hash; return which."""
        self._begin()
        mask = self._store.acquire(ids, hashes)
        if self._used is not None:
            self._used(ids[mask])
        return mask

    def release_ids(self, ids: IdArray, *, is_registered: bool) -> None:
        """Drop one reference on each block, or leave that to the next call where this thread is in a store call."""
        try:
            if self._dropped:
                self._reap()
            self._give_back(ids, is_registered)
        except PluginError:  # the store refuses to be called back, before it changes anything
            self.drop_ids(ids, is_registered)

    def drop_ids(self, ids: IdArray, is_registered: bool) -> None:
        """Leave a collected guard's ids for the next call; takes no lock."""
        self._dropped.append((ids, is_registered))
        self._waiters.wake()

    def get_metadata(self, block_id: int) -> Any:
        """Give the user's object of a block, None without."""
        return self._metadata.get(block_id)

    def set_metadata(self, block_id: int, value: Any) -> None:
        """Keep a user's object with a block."""
        self._metadata.set(block_id, value)

    # -- private -----------------------------------------------------------------------------------------------

    def _note_use(self, ids: IdArray) -> None:
        if self._used is not None:
            self._used(ids)

    def _begin(self) -> None:
        if self._is_closed:
            raise PoolClosed(f"pool {self.name!r} is closed")
        if self._dropped or self._hub.dropped:
            self._reap()

    def _reap(self) -> None:
        """Give back what the garbage collector found."""
        while self._dropped:
            try:
                ids, is_registered = self._dropped.popleft()
            except IndexError:
                return
            try:
                self._give_back(ids, is_registered)
            except PluginError:  # called from inside a store call: the next caller does it
                self._dropped.appendleft((ids, is_registered))
                raise
        self._hub.reap()

    def _give_back(self, ids: IdArray, is_registered: bool) -> None:
        if not is_registered:
            self._metadata.forget(ids)
        else:  # before the release: nobody shall find it old once nobody holds it
            self._note_use(ids)
        self._store.release(ids)
        if _log.isEnabledFor(logging.DEBUG) and len(ids):
            _log.debug("released pool=%s num_blocks=%d is_registered=%s", self.name, len(ids), is_registered)
        self._waiters.wake()
