"""Guards: who owns blocks, and what may be done with them next.

A guard owns many blocks at once and is used up by each transition: MutableBlocks -> CompleteBlocks -> ImmutableBlocks
(<-> WeakBlocks). It gives its blocks back on ``release()``, at the end of ``with``, or when collected. A finaliser
never takes a lock: it leaves its ids where the pool's next call finds them. Using one guard from several threads is
safe: one of them gets it, the others get `BlockStateError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

from kvbm.errors import BlockIdError, BlockStateError, ConfigError
from kvbm.types import ZERO_HASH, BlockBytes, BlockState, BytesView, HashArray, IdArray, SequenceHash, hash_array

GuardT = TypeVar("GuardT", bound="BlockGuard")


class GuardPool(Protocol):
    """What guards and blocks ask of the pool that made them."""

    name: str
    bytes: BlockBytes | None

    def stage(self, ids: IdArray, hashes: HashArray, parents: HashArray) -> None:
        """MUTABLE -> COMPLETE."""

    def release_ids(self, ids: IdArray, *, is_registered: bool) -> None:
        """Drop one reference on each."""

    def drop_ids(self, ids: IdArray, is_registered: bool) -> None:
        """Leave ids for the next call; takes no lock."""

    def acquire(self, ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Take a reference where the hash is still there."""

    def get_metadata(self, block_id: int) -> Any:
        """Give the user's object of a block."""

    def set_metadata(self, block_id: int, value: Any) -> None:
        """Keep a user's object with a block."""


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
        """Slots of the blocks: (num_blocks,) int32, host."""
        return self._peek("read")

    @property
    def is_live(self) -> bool:
        """Whether the guard still owns its blocks."""
        return bool(self._live)

    def release(self) -> None:
        """Give the blocks back; a second call does nothing.

        Notes
        -----
        The deepest block of the guard becomes the first to be evicted. Release hit and fresh blocks of a request as
        one guard (``hit + fresh``), or the deeper one first.
        """
        try:
            ids = self._live.pop()
        except IndexError:
            return
        self._gone = "released"
        self._pool.release_ids(ids, is_registered=not self.is_writable)

    def split(self: GuardT, n: int) -> tuple[GuardT, GuardT]:
        """Use up this guard and give one over its first n blocks and one over the rest."""
        ids = self._take("split")
        if not 0 <= n <= len(ids):
            self._give_back(ids)
            raise BlockIdError(f"cannot split {len(ids)} blocks at {n}, give 0..{len(ids)}")
        return self._part(ids, 0, n), self._part(ids, n, len(ids))

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
        self._gone = {"split": "split", "merge": "merged"}.get(verb, verb)
        return ids

    def _give_back(self, ids: IdArray) -> None:
        self._live.append(ids)
        self._gone = ""

    def _is_gone(self, verb: str) -> BlockStateError:
        gone = self._gone or "in use by another thread"
        return BlockStateError(f"these blocks are {gone}, must be {self.state.label} to {verb} them")

    def _part(self: GuardT, ids: IdArray, start: int, stop: int) -> GuardT:
        return type(self)(self._pool, ids[start:stop])

    def _merged(self: GuardT, other: GuardT, ids: IdArray) -> GuardT:
        return type(self)(self._pool, ids)


class MutableBlocks(BlockGuard):
    """Blocks that are being filled; nobody else can find them."""

    __slots__ = ()
    state = BlockState.MUTABLE

    def complete(self, hashes: HashArray, *, parent: SequenceHash | None = None) -> CompleteBlocks:
        """Say what the filled blocks hold, and use up this guard.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64, host
            Sequence hashes in order, each the child of the one before.
        parent : SequenceHash, optional
            Hash of the block before the first; None at the start of a sequence.

        Raises
        ------
        HashFormatError
            Not one hash for each block; the guard stays usable.
        """
        names = hash_array(hashes).copy()
        parents = np.empty_like(names)
        if len(names):
            parents[0] = np.frombuffer(parent or ZERO_HASH, dtype="<u8")
            parents[1:] = names[:-1]
        ids = self._take("complete")
        try:
            self._pool.stage(ids, names, parents)
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
        """Sequence hashes of the blocks: (num_blocks, 2) uint64, host."""
        self._peek("read")
        return self._hashes

    def _part(self: Any, ids: IdArray, start: int, stop: int) -> Any:
        return type(self)(self._pool, ids[start:stop], self._hashes[start:stop])

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
        """Sequence hashes of the blocks: (num_blocks, 2) uint64, host."""
        return self._hashes

    def upgrade(self) -> ImmutableBlocks | None:
        """Hold the blocks again; None, and nothing held, when any of them is gone.

        Notes
        -----
        Safe against reuse: a slot that holds another hash by now does not count.
        """
        mask = self._pool.acquire(self._ids, self._hashes)
        if mask.all():
            return ImmutableBlocks(self._pool, self._ids, self._hashes)
        self._pool.release_ids(self._ids[mask], is_registered=True)
        return None


class Block:
    """One block of a guard: its name, its user's metadata, its bytes. Raises once the guard is used up."""

    __slots__ = ("_guard", "_index")

    def __init__(self, guard: BlockGuard, index: int) -> None:
        self._guard = guard
        self._index = index

    @property
    def block_id(self) -> int:
        """Slot in the pool."""
        return int(self._guard._peek("use")[self._index])

    @property
    def state(self) -> BlockState:
        """MUTABLE, COMPLETE or ACTIVE: the state of the guard."""
        self._guard._peek("use")
        return self._guard.state

    @property
    def sequence_hash(self) -> SequenceHash | None:
        """Name of the block and everything before it; None while it is mutable."""
        self._guard._peek("use")
        if isinstance(self._guard, _NamedBlocks):
            return SequenceHash(self._guard._hashes[self._index].tobytes())
        return None

    @property
    def metadata(self) -> Any:
        """Any object of the user's, None at first; dropped when the block leaves the pool's registry."""
        return self._guard._pool.get_metadata(self.block_id)

    @metadata.setter
    def metadata(self, value: Any) -> None:
        self._guard._pool.set_metadata(self.block_id, value)

    def layer(self, layer: int) -> BytesView:
        """View one layer: (outer_dim, block_size, inner_dim)."""
        return self._bytes().layer(self.block_id, layer, writable=self._guard.is_writable)

    def layer_view(self, layer: int, outer: int) -> BytesView:
        """View K (outer 0) or V (outer 1) of one layer: (block_size, inner_dim)."""
        return self._bytes().layer_view(self.block_id, layer, outer, writable=self._guard.is_writable)

    def view(self) -> BytesView:
        """View the whole block, contiguous layouts only: (num_layers, outer_dim, block_size, inner_dim)."""
        return self._bytes().block(self.block_id, writable=self._guard.is_writable)

    def numpy(self) -> npt.NDArray[Any]:
        """Give the whole block as an array that shares its memory; read-only once registered."""
        return self.view().numpy()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.view().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view().__dlpack_device__()

    def __repr__(self) -> str:
        if not self._guard.is_live:
            return "Block(gone)"
        return f"Block({self.block_id}, {self.state.label}, {self.sequence_hash})"

    def _bytes(self) -> BlockBytes:
        pool = self._guard._pool
        if pool.bytes is None:
            raise ConfigError(f"pool {pool.name!r} keeps no bytes: use a BlockManager, or give the pool its bytes")
        return pool.bytes
