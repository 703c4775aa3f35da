"""The vocabulary: tiers, block states, sequence hashes, and the protocol by which a block reaches its bytes.

A sequence hash is 16 opaque bytes; a batch is a C-contiguous ``(num_blocks, 2)`` array of ``<u8``. Hex prints the
bytes in order, ``int`` reads them big-endian.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvbm.errors import HashFormatError, wrong_hashes, wrong_ids

HashArray: TypeAlias = "npt.NDArray[np.uint64]"
IdArray: TypeAlias = "npt.NDArray[np.int32]"
Places: TypeAlias = "npt.NDArray[np.intp]"  # indices into a batch

HASH_NBYTES = 16
DEFAULT_PRIORITY = 50
MAX_PRIORITY = 100

# One row of a store's outbox. `kind` is an OutboxKind; a GAP row has id -1 and zero hashes.
OUTBOX_DTYPE = np.dtype(
    [("seq", "<u8"), ("hash", "<u8", (2,)), ("parent", "<u8", (2,)), ("id", "<i4"), ("kind", "<u4")]
)


class Tier(str, enum.Enum):
    """Where a block's bytes lie: G1 to G4."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class BlockState(enum.IntEnum):
    """States of a block; ACTIVE and INACTIVE are registered ones with and without references."""

    FREE = 0
    MUTABLE = 1
    COMPLETE = 2
    ACTIVE = 3
    INACTIVE = 4

    @property
    def label(self) -> str:
        """The lower-case name that messages use."""
        return self.name.lower()


class OutboxKind(enum.IntEnum):
    """What an outbox row tells."""

    CREATED = 1
    DELETED = 2
    GAP = 3


class SequenceHash(bytes):
    """One sequence hash: 16 bytes that name a block and everything before it."""

    __slots__ = ()

    def __new__(cls, value: bytes) -> SequenceHash:
        if len(value) != HASH_NBYTES:
            raise HashFormatError(f"a sequence hash has {HASH_NBYTES} bytes, got {len(value)}")
        return super().__new__(cls, value)

    def __int__(self) -> int:
        return int.from_bytes(self, "big")

    def __repr__(self) -> str:
        return f"SequenceHash({self.hex()})"

    __str__ = __repr__


ZERO_HASH = SequenceHash(bytes(HASH_NBYTES))


def hash_array(hashes: Any) -> HashArray:
    """Give sequence hashes as a batch.

    Parameters
    ----------
    hashes : (num_blocks, 2) uint64 array, one 16-byte string, or a sequence of them

    Returns
    -------
    (num_blocks, 2) uint64, C-contiguous, host
        The same array where it already was one.

    Raises
    ------
    HashFormatError
        Anything else.
    """
    if isinstance(hashes, np.ndarray):
        if hashes.dtype != np.uint64 or hashes.ndim != 2 or hashes.shape[1] != 2:
            raise wrong_hashes(f"an array of shape {hashes.shape} and dtype {hashes.dtype}")
        return np.ascontiguousarray(hashes)
    if isinstance(hashes, (bytes, bytearray)):
        hashes = [hashes]
    if not isinstance(hashes, Sequence) or isinstance(hashes, str):
        raise wrong_hashes(type(hashes).__name__)
    for value in hashes:
        if not isinstance(value, (bytes, bytearray)):
            raise wrong_hashes(f"a sequence of {type(value).__name__}")
        if len(value) != HASH_NBYTES:
            raise wrong_hashes(f"a string of {len(value)} bytes")
    return np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)


def id_array(ids: Any) -> npt.NDArray[np.int64]:
    """Give block ids as a batch, wide enough that an id outside the pool can still be named.

    Parameters
    ----------
    ids : (num_blocks,) integer array, or a sequence of integers

    Returns
    -------
    (num_blocks,) int64, host

    Raises
    ------
    BlockIdError
        Anything else.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise wrong_ids(f"an array of shape {ids.shape} and dtype {ids.dtype}")
        return ids.astype(np.int64)
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise wrong_ids(type(ids).__name__)
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise wrong_ids(f"a sequence of {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise wrong_ids("an integer beyond 64 bits")
    return np.array(ids, dtype=np.int64)


def hash_list(hashes: HashArray) -> list[SequenceHash]:
    """Give a batch as a list of single hashes."""
    data = np.ascontiguousarray(hashes).tobytes()
    return [SequenceHash(data[i : i + HASH_NBYTES]) for i in range(0, len(data), HASH_NBYTES)]


class BytesView(Protocol):
    """A window onto the bytes of a block or layer: shape, dtype, NumPy and DLPack export."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def is_writable(self) -> bool: ...
    def assign(self, data: Any, *, dtype: str) -> None: ...
    def numpy(self) -> npt.NDArray[Any]: ...
    def tobytes(self) -> bytes: ...
    def __dlpack__(self, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class PoolStatus:
    """Counts of one pool at one moment; the states add up to `total_blocks`."""

    name: str
    tier: Tier
    total_blocks: int
    free: int
    mutable: int
    complete: int
    active: int
    inactive: int
    hits: int  # blocks that match found, since the start
    misses: int  # blocks asked of match that were not there
    evictions: int
    registered_total: int  # blocks registered, since the start
    folded_total: int  # of these, blocks whose hash was registered already

    @property
    def available_blocks(self) -> int:
        """Blocks that an allocation could have: free + inactive."""
        return self.free + self.inactive


@dataclass(frozen=True)
class ResetBlocksResponse:
    """What `BlockPool.reset_blocks` did with each hash; the three lists are disjoint."""

    reset: list[SequenceHash]
    not_found: list[SequenceHash]
    in_use: list[SequenceHash]


class BlockBytes(Protocol):
    """What a manager injects into a pool so that its blocks can show their bytes."""

    def block(self, block_id: int, *, writable: bool) -> BytesView:
        """View a whole block: (num_layers, outer_dim, block_size, inner_dim)."""
        ...

    def layer(self, block_id: int, layer: int, *, writable: bool) -> BytesView:
        """View one layer: (outer_dim, block_size, inner_dim)."""
        ...

    def layer_view(self, block_id: int, layer: int, outer: int, *, writable: bool) -> BytesView:
        """View one layer's K or V: (block_size, inner_dim)."""
        ...
