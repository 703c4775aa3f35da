"""One host tier for all ranks of a machine, where every rank's blocks hold the same bytes.

Rank 0 owns it, and with it the tiers below; the others, its followers, map it and only read. Checksums lie in front of
the blocks, so a follower compares what it copies with what rank 0 has computed. Rank 0 writes the bytes of a block,
then its checksum, then answers; the order to load it comes one message later, so a follower sees them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec
import numpy as np

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.engines.shared_memory import Giver, SharedMemory, take
from kvbm.errors import ConfigError, StorageError
from kvbm.layout import BlockLayout
from kvbm.provision import make_layout
from kvbm.storage.host import HostStorage
from kvbm.types import Tier

_VERSION = 1
_PAGE_NBYTES = 4096


@dataclass(frozen=True)
class HostShare:
    """Who shares a host tier.

    Attributes
    ----------
    name : str
        Where they meet, as `shared_memory.name_of` makes it: the same in all ranks, and in nobody else.
    rank, num_ranks : int
        Of this process.
    timeout_s : float
        Seconds that a follower waits for rank 0 to begin.
    """

    name: str
    rank: int
    num_ranks: int
    timeout_s: float = 60.0

    @property
    def is_follower(self) -> bool:
        """Whether another rank owns the tiers."""
        return self.rank > 0


class _Gift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes with the memory."""

    version: int
    key: str  # of the layout: both sides must lay blocks out alike
    words: bytes  # of rank 0, for whoever is above


class LeadingHost:
    """The host tier of rank 0; listens for followers from the start.

    Parameters
    ----------
    config : Config
    share : HostShare
    backend : Backend

    Attributes
    ----------
    storage : HostStorage
        Closed by whoever takes it.
    memory : SharedMemory

    Raises
    ------
    ConfigError
        The host tier has an allocator of its own.
    StorageError
        The memory cannot be had, or another process has this share's name.
    """

    def __init__(self, config: Config, share: HostShare, *, backend: Backend) -> None:
        layout = _layout_of(config)
        self._key = _key_of(layout)
        self._giver = Giver(share.name, num_takers=share.num_ranks - 1)
        try:
            self.memory = SharedMemory.create(
                _Places(layout).end,
                use_huge_pages=config.host.huge_pages,
                num_threads=config.runtime.copy_threads or 2,
            )
        except BaseException:
            self._giver.close()
            raise
        self.storage = _storage_over(self.memory, layout, is_read_only=False, backend=backend)
        self.storage.has_huge_pages = self.memory.has_huge_pages

    def give(self, words: bytes) -> None:
        """Give the memory to each follower, with some words; does not wait for them."""
        gift = _Gift(version=_VERSION, key=self._key, words=words)
        self._giver.give(self.memory, msgspec.msgpack.encode(gift))

    def close(self) -> None:
        """Give to nobody any more; may be called again. The storage stays."""
        self._giver.close()
        self.memory.close()


def follow(config: Config, share: HostShare, *, backend: Backend) -> tuple[HostStorage, bytes]:
    """Map the host tier of rank 0.

    Parameters
    ----------
    config, share, backend
        As for `LeadingHost`.

    Returns
    -------
    storage : HostStorage
        Read-only, checksums too.
    words : bytes
        What rank 0 gave with it.

    Raises
    ------
    ConfigError
        Rank 0 lays blocks out otherwise, or is of another version.
    StorageError
        Rank 0 does not give its memory.

    Notes
    -----
    Blocks until rank 0 has opened its tiers.
    """
    layout = _layout_of(config)
    try:
        fd, message = take(share.name, timeout_s=share.timeout_s)
    except StorageError as error:
        raise StorageError(error.errno, f"rank {share.rank} {error.strerror}") from error
    try:
        gift = _read_gift(message)
        key = _key_of(layout)
        if gift.key != key:
            raise ConfigError(
                f"rank {share.rank} has blocks of {key}, rank 0 of {gift.key}: give all the same settings"
            )
    except BaseException:
        os.close(fd)
        raise
    memory = SharedMemory.adopt(fd, _Places(layout).end)
    return _storage_over(memory, layout, is_read_only=True, backend=backend), gift.words


# -- private ---------------------------------------------------------------------------------------------------


class _Places:
    """Where things lie in the memory: checksums, which of them hold, then from page to page each buffer of blocks."""

    def __init__(self, layout: BlockLayout) -> None:
        self.flags_at = layout.num_blocks * np.dtype(np.uint64).itemsize
        self.blocks_at = _up(self.flags_at + layout.num_blocks)
        self.step = _up(layout.buffer_nbytes)
        self.end = self.blocks_at + layout.num_buffers * self.step


def _up(nbytes: int) -> int:
    return -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES


def _layout_of(config: Config) -> BlockLayout:
    if config.host.allocator != "default":
        raise ConfigError(f"host.allocator is {config.host.allocator!r}: memory that ranks share is of our own")
    return make_layout(config, Tier.HOST)


def _key_of(layout: BlockLayout) -> str:
    return f"{layout.num_blocks} blocks of {layout.block_nbytes} bytes, {layout.strides}"


def _storage_over(memory: SharedMemory, layout: BlockLayout, *, is_read_only: bool, backend: Backend) -> HostStorage:
    places = _Places(layout)
    starts = range(places.blocks_at, places.end, places.step)
    buffers = [memory.data[start : start + layout.buffer_nbytes] for start in starts]
    storage = HostStorage(layout, buffers=buffers, is_read_only=is_read_only, backend=backend)
    storage.checksums = memory.data[: places.flags_at].view(np.uint64)
    storage.has_checksum = memory.data[places.flags_at : places.flags_at + layout.num_blocks].view(np.bool_)
    return storage


def _read_gift(message: bytes) -> _Gift:
    try:
        gift = msgspec.msgpack.decode(message, type=_Gift)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"what rank 0 gives is not of this version ({error}): use one kvbm everywhere") from error
    if gift.version != _VERSION:
        raise ConfigError(f"rank 0 gives memory of version {gift.version}, need {_VERSION}: use one kvbm everywhere")
    return gift
