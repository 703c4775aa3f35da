"""One block as a user sees it: a view that lives as long as the guard that owns the block."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.types import BlockBytes, BlockState, BytesView, HashArray, IdArray, SequenceHash


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


class BlockOwner(Protocol):
    """What a block asks of the guard that owns it."""

    _pool: GuardPool

    @property
    def state(self) -> BlockState:
        """MUTABLE, COMPLETE or ACTIVE."""

    @property
    def is_writable(self) -> bool:
        """Whether its blocks' bytes may be written."""

    @property
    def is_live(self) -> bool:
        """Whether it is not used up."""

    def _peek(self, verb: str) -> IdArray: ...
    def _name_of(self, index: int) -> SequenceHash | None: ...


class Block:
    """One block of a guard: its name, its user's metadata, its bytes. Raises once the guard is used up.

    Examples
    --------
    >>> import kvbm
    >>> with kvbm.BlockManager(num_layers=2, page_size=4, inner_dim=8, device_blocks=4) as manager:
    ...     with manager.allocate_blocks(1) as blocks:
    ...         blocks[0].layer(1).numpy()[...] = 3
    ...         blocks[0].layer_view(1, 0).shape
    (4, 8)
    """

    __slots__ = ("_guard", "_index")

    def __init__(self, guard: BlockOwner, index: int) -> None:
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
        return self._guard._name_of(self._index)

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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a block of {array.dtype} cannot be shown as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __buffer__(self, flags: int) -> memoryview:
        return self.numpy().data

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
