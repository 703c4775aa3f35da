"""Guards: who owns blocks, and what may be done with them next.

A guard owns many blocks at once and is used up by each transition: MutableBlocks -> CompleteBlocks -> ImmutableBlocks
(<-> WeakBlocks). It gives its blocks back on ``release()``, at the end of ``with``, or when collected. A finaliser
never takes a lock: it leaves its ids where the pool's next call finds them. Using one guard from several threads is
safe: one of them gets it, the others get `BlockStateError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index as as_index
from types import TracebackType
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from kvbm.block import Block, GuardPool
from kvbm.errors import BlockIdError, BlockStateError
from kvbm.types import ZERO_HASH, BlockState, HashArray, IdArray, SequenceHash, hash_array

__all__ = [
    "Block",
    "BlockGuard",
    "CompleteBlocks",
    "GuardPool",
    "ImmutableBlocks",
    "MutableBlocks",
    "WeakBlocks",
]

GuardT = TypeVar("GuardT", bound="BlockGuard")

_PAST = {"split": "split", "merge": "merged", "reorder": "reordered"}


class BlockGuard(Sequence["Block"]):
    """Owner of a batch of blocks; indexing gives `Block` views that live as long as the guard does."""

    __slots__ = ("__weakref__", "_gone", "_live", "_pool")

    state: BlockState
    is_writable = True

    def __init__(self, pool: GuardPool, ids: IdArray) -> None:
        self._pool = pool
        self._live = [ids]  # popped by the one call that consumes the guard: list.pop is atomic
        self._gone = ""

    @property
    def block_ids(self) -> IdArray:
        """Slots of the blocks: (num_blocks,) int32, host, read-only."""
        return _read_only(self._peek("read"))

    @property
    def is_live(self) -> bool:
        """Whether the guard still owns its blocks."""
        return bool(self._live)

    def is_of(self, pool: GuardPool) -> bool:
        """Whether its blocks are this pool's."""
        return self._pool is pool

    def release(self) -> None:
        """Give the blocks back; a second call does nothing.

        Notes
        -----
        The deepest block of the guard becomes the first to be evicted. Release hit and fresh blocks of a request as
        one guard (``hit + fresh``), or the deeper one first.

        A finaliser of yours, or a generator with ``with guard:``, may be run by the garbage collector while this thread
        is inside a call of the pool's store. The blocks are then left for the pool's next call, as those of a collected
        guard are.
        """
        try:
            ids = self._live.pop()
        except IndexError:
            return
        self._gone = "released"
        self._pool.release_ids(ids, is_registered=not self.is_writable)

    def split(self: GuardT, n: int) -> tuple[GuardT, GuardT]:
        """Use up this guard and give one over its first n blocks and one over the rest."""
        place = as_index(n)
        ids = self._take("split")
        if not 0 <= place <= len(ids):
            self._give_back(ids)
            raise BlockIdError(f"cannot split {len(ids)} blocks at {n}, give 0..{len(ids)}")
        return self._part(ids, 0, place), self._part(ids, place, len(ids))

    def partition(self: GuardT, mask: npt.NDArray[np.bool_]) -> tuple[GuardT, GuardT]:
        """Use up this guard and give one over the blocks where `mask` is true and one over the others.

        Parameters
        ----------
        mask : (num_blocks,) bool
        """
        answers: npt.NDArray[Any] = np.asarray(mask)
        if answers.ndim != 1 or (answers.dtype != np.bool_ and len(answers)):
            raise BlockIdError(f"cannot partition by an array of shape {answers.shape} and dtype {answers.dtype}")
        ids = self._take("split")
        if len(answers) != len(ids):
            self._give_back(ids)
            raise BlockIdError(f"cannot partition {len(ids)} blocks by {len(answers)} answers, give one for each block")
        return self._chosen(ids, np.flatnonzero(answers)), self._chosen(ids, np.flatnonzero(answers == 0))

    def __add__(self: GuardT, other: GuardT) -> GuardT:
        """Use up two guards of one pool and kind and give one over the blocks of both."""
        if type(self) is not type(other):
            return NotImplemented
        if self._pool is not other._pool:
            raise BlockStateError(f"cannot merge blocks of pool {self._pool.name!r} and pool {other._pool.name!r}")
        first = self._take("merge")
        try:
            second = other._take("merge")
        except BlockStateError:
            self._give_back(first)
            raise
        return self._merged(other, np.concatenate([first, second]))

    def __len__(self) -> int:
        return len(self._live[0]) if self._live else 0

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        num_blocks = len(self._peek("index"))
        if isinstance(index, slice):
            return [Block(self, i) for i in range(*index.indices(num_blocks))]
        if not -num_blocks <= index < num_blocks:
            raise BlockIdError(f"index {index} is outside a guard of {num_blocks} blocks")
        return Block(self, index % num_blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter([Block(self, i) for i in range(len(self._peek("iterate")))])

    def __enter__(self: GuardT) -> GuardT:
        self._peek("enter")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if self._live:
            self._pool.drop_ids(self._live.pop(), not self.is_writable)

    def __repr__(self) -> str:
        what = f"{len(self)} blocks" if self._live else self._gone
        return f"{type(self).__name__}({what}, pool={self._pool.name!r})"

    def _peek(self, verb: str) -> IdArray:
        live = self._live
        try:
            return live[0]
        except IndexError:
            raise self._is_gone(verb) from None

    def _take(self, verb: str) -> IdArray:
        try:
            ids = self._live.pop()
        except IndexError:
            raise self._is_gone(verb) from None
        self._gone = _PAST.get(verb, verb)
        return ids

    def _give_back(self, ids: IdArray) -> None:
        self._live.append(ids)
        self._gone = ""

    def _is_gone(self, verb: str) -> BlockStateError:
        gone = self._gone or "in use by another thread"
        return BlockStateError(f"these blocks are {gone}, must be {self.state.label} to {verb} them")

    def _name_of(self, index: int) -> SequenceHash | None:
        return None

    def _part(self: GuardT, ids: IdArray, start: int, stop: int) -> GuardT:
        return type(self)(self._pool, ids[start:stop])

    def _chosen(self: GuardT, ids: IdArray, places: npt.NDArray[np.intp]) -> GuardT:
        return type(self)(self._pool, ids[places])

    def _merged(self: GuardT, other: GuardT, ids: IdArray) -> GuardT:
        return type(self)(self._pool, ids)


class MutableBlocks(BlockGuard):
    """Blocks that are being filled; nobody else can find them."""

    __slots__ = ()
    state = BlockState.MUTABLE

    def complete(
        self, hashes: HashArray, *, parent: SequenceHash | None = None, parents: HashArray | None = None
    ) -> CompleteBlocks:
        """Say what the filled blocks hold, and use up this guard.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64, host
            Sequence hashes in order, each the child of the one before.
        parent : SequenceHash, or any 16 bytes, optional
            Hash of the block before the first; None at the start of a sequence.
        parents : (num_blocks, 2) uint64, host, optional
            Hash of the block before each, instead of `parent`: the hashes may then be of several sequences.

        Raises
        ------
        HashFormatError
            Not one hash for each block, or a parent that is none; the guard stays usable.
        """
        names = hash_array(hashes).copy()
        above = _parents_of(names, parent) if parents is None else hash_array(parents)
        ids = self._take("complete")
        try:
            self._pool.stage(ids, names, above)
        except BaseException:
            self._give_back(ids)
            raise
        return CompleteBlocks(self._pool, ids, names)


class _NamedBlocks(BlockGuard):
    """Blocks that have sequence hashes."""

    __slots__ = ("_hashes",)

    def __init__(self, pool: GuardPool, ids: IdArray, hashes: HashArray) -> None:
        self._pool = pool
        self._live = [ids]
        self._gone = ""
        self._hashes = hashes

    @property
    def hashes(self) -> HashArray:
        """Sequence hashes of the blocks: (num_blocks, 2) uint64, host, read-only."""
        self._peek("read")
        return _read_only(self._hashes)

    def _name_of(self, index: int) -> SequenceHash | None:
        return SequenceHash(self._hashes[index].tobytes())

    def _part(self: Any, ids: IdArray, start: int, stop: int) -> Any:
        return type(self)(self._pool, ids[start:stop], self._hashes[start:stop])

    def _chosen(self: Any, ids: IdArray, places: npt.NDArray[np.intp]) -> Any:
        return type(self)(self._pool, ids[places], self._hashes[places])

    def _merged(self: Any, other: Any, ids: IdArray) -> Any:
        return type(self)(self._pool, ids, np.concatenate([self._hashes, other._hashes]))


class CompleteBlocks(_NamedBlocks):
    """Filled and named blocks that nobody can find yet: `BlockPool.register_blocks` publishes them."""

    __slots__ = ()
    state = BlockState.COMPLETE


class ImmutableBlocks(_NamedBlocks):
    """Registered blocks, each held by one reference; their bytes are read-only."""

    __slots__ = ()
    state = BlockState.ACTIVE
    is_writable = False

    def reordered(self, places: npt.NDArray[np.intp]) -> ImmutableBlocks:
        """Use up this guard and give one over the same blocks in another order: (num_blocks,) int, a permutation."""
        order = np.sort(places)
        ids = self._take("reorder")
        if not np.array_equal(order, np.arange(len(ids))):
            self._give_back(ids)
            raise BlockIdError(f"cannot reorder {len(ids)} blocks by {places!r}, give each of 0..{len(ids) - 1} once")
        return self._chosen(ids, places)  # type: ignore[no-any-return]

    def downgrade(self) -> WeakBlocks:
        """Use up this guard, drop its references, and keep only the names."""
        ids = self._take("downgrade")
        weak = WeakBlocks(self._pool, ids, self._hashes)
        self._pool.release_ids(ids, is_registered=True)
        return weak


class WeakBlocks:
    """Names of blocks that are not held: they may be evicted at any time."""

    __slots__ = ("_hashes", "_ids", "_pool")

    def __init__(self, pool: GuardPool, ids: IdArray, hashes: HashArray) -> None:
        self._pool = pool
        self._ids = ids
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def hashes(self) -> HashArray:
        """Sequence hashes of the blocks: (num_blocks, 2) uint64, host, read-only."""
        return _read_only(self._hashes)

    def upgrade(self) -> ImmutableBlocks | None:
        """Hold the blocks again; None, and nothing held, when any of them is gone.

        Notes
        -----
        Safe against reuse: a slot that holds another hash by now does not count.
        """
        blocks, mask = self.upgrade_each()
        if mask.all():
            return blocks
        blocks.release()
        return None

    def upgrade_each(self) -> tuple[ImmutableBlocks, npt.NDArray[np.bool_]]:
        """Hold those of the blocks that are still there; give them and, (num_blocks,) bool, which they are."""
        mask = self._pool.acquire(self._ids, self._hashes)
        if np.count_nonzero(mask) == len(mask):
            return ImmutableBlocks(self._pool, self._ids, self._hashes), mask
        return ImmutableBlocks(self._pool, self._ids[mask], self._hashes[mask]), mask


def _parents_of(names: HashArray, parent: SequenceHash | None) -> HashArray:
    parents = np.empty_like(names)
    first = hash_array([ZERO_HASH if parent is None else parent])
    if len(names):
        parents[0] = first[0]
        parents[1:] = names[:-1]
    return parents


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give a guard's own array so that nobody writes into it."""
    view: npt.NDArray[Any] = array.view()
    view.flags.writeable = False
    return view
