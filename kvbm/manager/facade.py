"""What a request needs of a manager: hash, match, onboard, allocate, register; and how it is made and closed."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.assembly import assemble, close_dropped, config_of, find_backend
from kvbm.blocks import Block, CompleteBlocks, ImmutableBlocks, MutableBlocks
from kvbm.config import Config
from kvbm.errors import BlockStateError
from kvbm.events import KvEventType, MergedSubscription, MigrationLog
from kvbm.fingerprint import find_fingerprint
from kvbm.jobs import Transfer
from kvbm.manager.tiers import TierVerbs
from kvbm.planner import Hit, OffloadPolicy, PlannerStatistics
from kvbm.sequence import ContentSpan, TokenSequence
from kvbm.storage.base import Storage
from kvbm.types import HashArray, PoolStatus, Tier

_log = logging.getLogger("kvbm.manager")


class BlockManager(TierVerbs):
    """KV-cache blocks of one model on one worker, in one to four tiers.

    Parameters
    ----------
    config : Config, optional
        Every setting there is; the keywords below are the common ones. Give one or the other.
    num_layers : int
    page_size : int
        Tokens per block.
    inner_dim : int
        Elements of one token's K (or V) in one layer: heads * head size.
    outer_dim : int
        2 for K and V, 1 for MLA.
    dtype : str
        Element type, e.g. "float16", "bfloat16", "float8_e4m3".
    device_blocks, host_blocks, disk_blocks : int
        Blocks of each tier (G1, G2, G3); 0 leaves a tier out. Registering a block copies it to the tier below, in the
        background.
    disk_path : path, optional
        Directory of the disk tier.
    remote_url : str, optional
        Object store tier, G4: ``s3://bucket/folder``, ``gs://``, ``az://``, ``file:///directory`` or ``memory://``.
    model : str, optional
        Directory of the model, whose files are then sampled, or any text that names it: a part of every sequence hash
        and of what outlives the process, so two models never share a block.
    weights_epoch : int or str, optional
        Changes every hash when weights are updated in place.
    layout : str
        Of the top tier: "fully_contiguous", "layer_separate_block_first", "layer_separate_outer_first" or a plug-in.
    policy : str or EvictionPolicy
        Eviction: a policy's name ("lru", "fifo", or an entry point of the group ``kvbm.eviction``) for every tier, or
        an instance for the top tier.
    offload_policy : str or OffloadPolicy
        What goes down: "always", "second_use", "priority", an entry point of the group ``kvbm.offload``, or an
        instance for the first route.
    worker_id : str
        Put into events.
    backend : Backend or str, optional
        The twin to use; default by ``KVBM_BACKEND``.
    storages : dict of Tier to Storage, optional
        Ready-made storages of your own for tiers; closed with the manager.

    Raises
    ------
    ConfigError
        A setting is impossible, or no tier has memory.
    LayoutError
        Impossible dimensions or dtype.
    StorageError
        A tier's memory or file cannot be had.

    Examples
    --------
    >>> import kvbm
    >>> with kvbm.BlockManager(
    ...     num_layers=2, page_size=16, inner_dim=8, dtype="float32", device_blocks=4, host_blocks=16
    ... ) as manager:
    ...     manager.device.total_blocks, manager.host.total_blocks
    (4, 16)
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        num_layers: int | None = None,
        page_size: int | None = None,
        inner_dim: int | None = None,
        outer_dim: int | None = None,
        dtype: str | None = None,
        device_blocks: int | None = None,
        host_blocks: int | None = None,
        disk_blocks: int | None = None,
        disk_path: str | os.PathLike[str] | None = None,
        remote_url: str | None = None,
        model: str | None = None,
        weights_epoch: int | str | None = None,
        layout: str | None = None,
        policy: Any = None,
        offload_policy: str | OffloadPolicy | None = None,
        worker_id: str | None = None,
        backend: Backend | str | None = None,
        storages: Mapping[Tier, Storage] | None = None,
    ) -> None:
        config = config_of(
            config,
            {
                "model.num_layers": num_layers,
                "model.block_size": page_size,
                "model.inner_dim": inner_dim,
                "model.outer_dim": outer_dim,
                "model.dtype": dtype,
                "model.fingerprint": model,
                "model.weights_epoch": weights_epoch,
                "device.num_blocks": device_blocks,
                "host.num_blocks": host_blocks,
                "disk.num_blocks": disk_blocks,
                "disk.path": None if disk_path is None else os.fspath(disk_path),
                "remote.url": remote_url,
                "device.layout": layout,
                "device.eviction": policy if isinstance(policy, str) else None,
                "host.eviction": policy if isinstance(policy, str) else None,
                "disk.eviction": policy if isinstance(policy, str) else None,
                "remote.eviction": policy if isinstance(policy, str) and remote_url else None,
                "offload.policy": offload_policy if isinstance(offload_policy, str) else None,
                "runtime.worker_id": worker_id,
            },
        )
        self.config = config
        self.backend = find_backend(config.runtime.backend if backend is None else backend)
        self.page_size = config.model.block_size
        name = config.model.fingerprint
        self.model = None if name is None else find_fingerprint(name)
        self.weights_epoch = config.model.weights_epoch
        parts = assemble(
            config,
            backend=self.backend,
            model=self.model,
            eviction=None if isinstance(policy, str) else policy,
            offload_policy=None if isinstance(offload_policy, str) else offload_policy,
            storages=storages,
        )
        self.layout = next(iter(parts.layouts.values()))
        self._pools, self._storages = parts.pools, parts.storages
        self._parts, self._executor, self._planner = parts, parts.executor, parts.planner
        self._top = next(iter(parts.pools.values()))
        self._finalizer = weakref.finalize(self, close_dropped, parts, repr(self))
        self._finalizer.atexit = False
        for tier in (Tier.DISK, Tier.REMOTE):
            if tier in self._pools and self.model is None:
                text = "a %s tier without model=... trusts that nobody changes the model: give its fingerprint"
                _log.warning(text, tier.value)

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
        """Find the longest cached prefix over all tiers and hold it; an empty hit is a miss.

        Each block is found in the highest tier that has it: a hole in one tier is filled from the next.
        """
        return self._planner.match(hashes)

    def lookup(self, hashes: HashArray) -> int:
        """Count the leading blocks that are cached in any tier; holds nothing and changes no recency."""
        return self._planner.lookup(hashes)

    def onboard(self, hit: Hit, *, timeout: float | None = None) -> Transfer[ImmutableBlocks]:
        """Bring the blocks of a hit into the top tier, and use up the hit.

        Parameters
        ----------
        hit : Hit
        timeout : float, optional
            Seconds; default ``runtime.onboard_timeout_s`` of the configuration.

        Returns
        -------
        Transfer
            Its result is the leading blocks whose bytes are there and match their checksums, possibly none. Blocks that
            lie in the top tier already are there at once. At its deadline it ends with what is there by then.

        Raises
        ------
        NotEnoughBlocksAvailable
            The top tier has no room; nothing was taken and the hit can be used again.
        BlockStateError
            The hit is used up, or of another manager.
        PoolClosed
            The manager is closed.
        """
        return self._planner.onboard(hit, timeout)

    def allocate_blocks(self, n: int, *, timeout: float | None = None) -> MutableBlocks:
        """Take n blocks of the top tier to fill; see `BlockPool.allocate_blocks`."""
        return self._top.allocate_blocks(n, timeout=timeout)

    def try_allocate_blocks(self, n: int) -> MutableBlocks | None:
        """Take n blocks of the top tier to fill; None when fewer are available."""
        return self._top.try_allocate_blocks(n)

    def register_blocks(self, blocks: CompleteBlocks) -> ImmutableBlocks:
        """Publish complete blocks of the top tier, and let them be offloaded; see `BlockPool.register_blocks`."""
        return self._top.register_blocks(blocks)

    def set_priority(self, hashes: HashArray, priority: int) -> int:
        """Keep blocks longer (up to 100) or less long (down to 0), in every tier; return how many the top tier has."""
        return self._planner.prioritise(hashes, priority)

    def store_kv(self, block: Block, layer: int, data: Any) -> None:
        """Write one layer of a block.

        Parameters
        ----------
        block : Block
            Not registered yet.
        layer : int
        data : bytes-like or array
            outer_dim * page_size * inner_dim elements: all K, then all V. An array has the block's dtype, or is
            unsigned integers of the same width, or bytes.

        Raises
        ------
        BlockStateError
            The block is registered; its bytes are read-only.
        LayoutError
            Wrong size, dtype or layer.
        """
        view = block.layer(layer)
        if not view.is_writable:
            raise BlockStateError(f"block {block.block_id} is active, must be mutable or complete to store into it")
        view.assign(data, dtype=self.layout.dtype)

    def load_kv(self, block: Block, layer: int) -> bytes:
        """Read one layer of a block: outer_dim * page_size * inner_dim elements as bytes."""
        return block.layer(layer).tobytes()

    # -- looking -----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, PoolStatus]:
        """Count the blocks of each tier by state, and what happened there since the start, by the tier's name."""
        return {tier.value: pool.status() for tier, pool in self._pools.items()}

    def statistics(self) -> PlannerStatistics:
        """Count hits, misses, what moved between tiers, and what was dropped, since the start."""
        return self._planner.statistics()

    def subscribe_events(
        self, *, tier: Tier | str | None = None, kinds: Iterable[KvEventType | str] | None = None
    ) -> MergedSubscription:
        """Read what happens to blocks from now on, in one tier and of some kinds, or all."""
        kinds = None if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
        only = None if tier is None else self._tier(tier)
        pools = self._pools.values() if only is None else [self._pools[only]]
        subscriptions = [pool.subscribe_events(kinds) for pool in pools]
        if kinds is not None and KvEventType.MIGRATED not in kinds:
            return MergedSubscription(subscriptions)
        metadata = {"model": self.model} if self.model else None
        log = MigrationLog(worker_id=self.config.runtime.worker_id, metadata=metadata, tier=only)
        self._planner.migrations.add(log)
        return MergedSubscription(subscriptions, migrations=log)

    def check(self) -> None:
        """Verify the invariants of every pool; raise AssertionError where one is broken."""
        for pool in self._pools.values():
            pool.check()

    def close(self, timeout: float | None = None) -> None:
        """End every transfer, refuse further calls, let go of memory and files; return at once while another call does.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for bytes that still move; default ``runtime.close_timeout_s`` of the configuration. What
            moves beyond that is left to itself, and logged. Arrays taken from blocks stay valid.
        """
        self._finalizer.detach()
        self._parts.close(self.config.runtime.close_timeout_s if timeout is None else timeout)

    def __enter__(self) -> BlockManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        tiers = ", ".join(f"{tier.value}={pool.total_blocks}" for tier, pool in self._pools.items())
        return f"BlockManager({tiers} blocks of {self.layout.block_nbytes} bytes)"
