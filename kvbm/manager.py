"""BlockManager: the facade that introduces bookkeeping to bytes.

It makes one layout, binds a storage to it, gives the pool its bytes, and offers what a request needs: hash, match,
onboard, allocate, register. Today it has the device tier (G1); lower tiers will join behind the same calls. Safe to
use from several threads: everything mutable lives in the pool and the storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend, load_backend
from kvbm.blocks import Block, CompleteBlocks, ImmutableBlocks, MutableBlocks
from kvbm.errors import BlockStateError, ConfigError, LayoutError
from kvbm.events import EventSubscription, KvEventType
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.plugins import load_plugin
from kvbm.pool import BlockPool
from kvbm.sequence import ContentSpan, TokenSequence
from kvbm.storage.base import Storage
from kvbm.storage.device import DeviceStorage
from kvbm.storage.views import StorageBytes
from kvbm.types import HashArray, Tier

LAYOUTS = ("fully_contiguous", "layer_separate_block_first", "layer_separate_outer_first")


class Hit:
    """What a look-up over the tiers found, each block held by one reference.

    Used up by `BlockManager.onboard`; otherwise released by `release`, ``with``, or the garbage collector.
    """

    def __init__(self, device: ImmutableBlocks) -> None:
        self._device = device
        self.num_blocks = len(device)

    @property
    def tiers(self) -> dict[str, int]:
        """Blocks found in each tier, by the tier's name."""
        return {Tier.DEVICE.value: self.num_blocks}

    @property
    def hashes(self) -> HashArray:
        """Sequence hashes of the blocks found: (num_blocks, 2) uint64, host."""
        return self._device.hashes

    def __len__(self) -> int:
        return self.num_blocks

    def release(self) -> None:
        """Give the blocks back without using them; a second call does nothing."""
        self._device.release()

    def __enter__(self) -> Hit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Hit({self.num_blocks} blocks, {self.tiers})"


class BlockManager:
    """KV-cache blocks of one model on one worker.

    Parameters
    ----------
    num_layers : int
    page_size : int
        Tokens per block.
    inner_dim : int
        Elements of one token's K (or V) in one layer: heads * head size.
    outer_dim : int
        2 for K and V, 1 for MLA.
    dtype : str
        Element type, e.g. "float16", "bfloat16", "float8_e4m3".
    device_blocks : int
        Blocks in the device tier (G1).
    host_blocks, disk_blocks : int
        Must be 0 in this version.
    model : str, optional
        Fingerprint of the model: a part of every sequence hash, so two models never share a block.
    weights_epoch : int or str, optional
        Changes every hash when weights are updated in place.
    layout : str
        One of `LAYOUTS`.
    policy : str or EvictionPolicy
        A policy's name ("lru", "fifo", or an entry point of the group ``kvbm.eviction``), or an instance.
    worker_id : str
        Put into events.
    backend : Backend or str, optional
        The twin to use; default by ``KVBM_BACKEND``.

    Raises
    ------
    ConfigError
        No device blocks, or a tier that this version does not have.
    LayoutError
        Impossible dimensions or dtype.

    Examples
    --------
    >>> import kvbm
    >>> with kvbm.BlockManager(num_layers=2, page_size=16, inner_dim=8, dtype="float32", device_blocks=4) as manager:
    ...     manager.device.total_blocks
    4
    """

    def __init__(
        self,
        *,
        num_layers: int,
        page_size: int,
        inner_dim: int,
        device_blocks: int,
        outer_dim: int = 2,
        dtype: str = "float16",
        host_blocks: int = 0,
        disk_blocks: int = 0,
        model: str | None = None,
        weights_epoch: int | str | None = None,
        layout: str = "fully_contiguous",
        policy: Any = "lru",
        worker_id: str = "0",
        backend: Backend | str | None = None,
    ) -> None:
        _only_device(device_blocks, host_blocks, disk_blocks)
        if backend is None:
            backend = default_backend()
        elif isinstance(backend, str):
            backend = load_backend(backend)
        self.backend = backend
        self.page_size = page_size
        self.model = model
        self.weights_epoch = weights_epoch
        self.layout = _make_layout(
            layout,
            num_blocks=device_blocks,
            num_layers=num_layers,
            outer_dim=outer_dim,
            block_size=page_size,
            inner_dim=inner_dim,
            dtype=dtype,
        )
        self._pool = BlockPool(
            device_blocks,
            name="device",
            tier=Tier.DEVICE,
            policy=load_plugin("eviction", policy)() if isinstance(policy, str) else policy,
            worker_id=worker_id,
            event_metadata={"model": model} if model else None,
            backend=backend,
        )
        self._storage = DeviceStorage(self.layout, backend=backend)
        self._pool.bytes = StorageBytes(self._storage)

    # -- a request ---------------------------------------------------------------------------------------------

    def sequence(
        self,
        token_ids: npt.ArrayLike = (),
        *,
        salt: bytes | str | None = None,
        lora: str | None = None,
        content: Iterable[ContentSpan] = (),
    ) -> TokenSequence:
        """Name the blocks of a prompt.

        Parameters
        ----------
        token_ids : (num_tokens,) integers
        salt : bytes or str, optional
            Keeps tenants apart: other salt, other hashes.
        lora : str, optional
            Name of the adapter.
        content : iterable of ContentSpan
            Images and the like that stand behind placeholder tokens.
        """
        return TokenSequence(
            token_ids,
            block_size=self.page_size,
            salt=salt,
            model=self.model,
            weights_epoch=self.weights_epoch,
            lora=lora,
            content=tuple(content),
            backend=self.backend,
        )

    def match_sequence_hashes(self, hashes: HashArray) -> Hit:
        """Find the longest cached prefix over all tiers and hold it; an empty hit is a miss."""
        return Hit(self._pool.match_sequence_hashes(hashes))

    def lookup(self, hashes: HashArray) -> int:
        """Count the leading blocks that are cached; holds nothing and changes no recency."""
        absent = self._pool.lookup(hashes) < 0
        return int(absent.argmax()) if absent.any() else len(absent)

    def onboard(self, hit: Hit) -> Transfer[ImmutableBlocks]:
        """Bring the blocks of a hit into the device tier, and use up the hit.

        Returns
        -------
        Transfer
            Its result is the leading blocks whose bytes are there, possibly none. Blocks that lie in the device tier
            already are there at once.
        """
        device = hit._device
        device._peek("onboard")
        moved, hit._device = device.split(len(device))
        return Transfer.completed(moved)

    def allocate_blocks(self, n: int, *, timeout: float | None = None) -> MutableBlocks:
        """Take n device blocks to fill; see `BlockPool.allocate_blocks`."""
        return self._pool.allocate_blocks(n, timeout=timeout)

    def try_allocate_blocks(self, n: int) -> MutableBlocks | None:
        """Take n device blocks to fill; None when fewer are available."""
        return self._pool.try_allocate_blocks(n)

    def register_blocks(self, blocks: CompleteBlocks) -> ImmutableBlocks:
        """Publish complete blocks; see `BlockPool.register_blocks`."""
        return self._pool.register_blocks(blocks)

    def store_kv(self, block: Block, layer: int, data: Any) -> None:
        """Write one layer of a block.

        Parameters
        ----------
        block : Block
            Not registered yet.
        layer : int
        data : bytes-like or array
            outer_dim * page_size * inner_dim elements: all K, then all V.

        Raises
        ------
        BlockStateError
            The block is registered; its bytes are read-only.
        LayoutError
            Wrong size or layer.
        """
        target = block.layer(layer).numpy()
        if not target.flags.writeable:
            raise BlockStateError(f"block {block.block_id} is active, must be mutable or complete to store into it")
        source = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
        if source.nbytes != target.nbytes:
            raise LayoutError(f"layer {layer} of a block takes {target.nbytes} bytes, got {source.nbytes}")
        target[...] = source.reshape(-1).view(target.dtype).reshape(target.shape)

    def load_kv(self, block: Block, layer: int) -> bytes:
        """Read one layer of a block: outer_dim * page_size * inner_dim elements as bytes."""
        return block.layer(layer).numpy().tobytes()

    # -- tiers -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> BlockPool:
        """The device tier's pool (G1)."""
        return self._pool

    @property
    def host(self) -> BlockPool | None:
        """The host tier's pool (G2): None, this version has none."""
        return None

    @property
    def disk(self) -> BlockPool | None:
        """The disk tier's pool (G3): None, this version has none."""
        return None

    @property
    def device_storage(self) -> Storage:
        """The bytes of the device tier: host memory stands in for the GPU in this version."""
        return self._storage

    def subscribe_events(
        self, *, tier: Tier | str | None = None, kinds: Iterable[KvEventType | str] | None = None
    ) -> EventSubscription:
        """Read what happens to blocks from now on, in one tier and of some kinds, or all."""
        if tier is not None and tier != Tier.DEVICE:
            raise ConfigError(f"there is no tier {getattr(tier, 'value', tier)!r} here, use 'device'")
        return self._pool.subscribe_events(kinds)

    def check(self) -> None:
        """Verify the invariants of every pool; raise AssertionError where one is broken."""
        self._pool.check()

    def close(self) -> None:
        """Refuse further calls and let go of the memory; arrays taken from blocks stay valid. May be called twice."""
        self._pool.close()
        self._storage.close()

    def __enter__(self) -> BlockManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"BlockManager(device={self._pool.total_blocks} blocks of {self.layout.block_nbytes} bytes)"


def _only_device(device_blocks: int, host_blocks: int, disk_blocks: int) -> None:
    if host_blocks or disk_blocks:
        raise ConfigError(
            f"host and disk tiers are not available in this version, got host_blocks={host_blocks}, "
            f"disk_blocks={disk_blocks}: give 0"
        )
    if device_blocks < 1:
        raise ConfigError(f"a manager needs at least one tier, got device_blocks={device_blocks}: give 1 or more")


def _make_layout(kind: str, **dimensions: Any) -> BlockLayout:
    if kind == "fully_contiguous":
        return BlockLayout.fully_contiguous(**dimensions)
    if kind in LAYOUTS:
        return BlockLayout.layer_separate(**dimensions, block_first=kind == "layer_separate_block_first")
    raise ConfigError(f"layout {kind!r} is not known, use {', '.join(LAYOUTS)}")
