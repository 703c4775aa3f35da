"""Builds what a manager stands on, from a configuration: for each tier a pool and a storage, and the two halves.

This is the one place, within one process, where bookkeeping meets bytes.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvbm._backend import Backend, default_backend, load_backend
from kvbm.config import LAYOUTS, Config, TierConfig
from kvbm.errors import ConfigError, TransferTimeout
from kvbm.executor import Executor
from kvbm.jobs import LocalChannel
from kvbm.layout import BlockLayout
from kvbm.planner import Limits, OffloadPolicy, Planner, PlannerThread
from kvbm.planner.restore import restore_pools
from kvbm.plugins import load_plugin
from kvbm.pool import BlockPool
from kvbm.storage.base import Storage
from kvbm.storage.device import DeviceStorage
from kvbm.storage.host import HostStorage
from kvbm.storage.views import StorageBytes
from kvbm.types import Tier

_log = logging.getLogger("kvbm.manager")
_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)
_PAGE_NBYTES = 4096


@dataclass
class Assembly:
    """The parts of a manager, by tier from the top down."""

    layouts: dict[Tier, BlockLayout]
    storages: dict[Tier, Storage]
    pools: dict[Tier, BlockPool]
    executor: Executor
    planner: Planner
    thread: PlannerThread | None  # where there is more than one tier
    _closing: threading.Lock = field(default_factory=threading.Lock)  # held by whoever closes

    def close(self, timeout_s: float) -> None:
        """End every transfer and let go of memory and files; each part may take this long to end what it does."""
        if not self._closing.acquire(blocking=False):
            return  # another thread closes, or this one does and calls back
        try:
            is_quiet = self.planner.close(timeout_s)
            if self.thread is not None:
                self.thread.stop(timeout_s)
            if is_quiet:
                self.executor.close()
            for storage in self.storages.values():
                try:
                    storage.close(timeout_s)
                except TransferTimeout as error:
                    _log.warning("close: storage=%s error=%s", type(storage).__name__, error)
        finally:
            self._closing.release()


def close_dropped(parts: Assembly, name: str) -> None:
    """Close what a manager left that was dropped without `close`; on a thread, for a finaliser must not wait."""
    if parts.thread is None:  # memory goes by itself
        return
    warnings.warn(f"{name} was dropped without close(): use it in a with statement", ResourceWarning, stacklevel=2)
    threading.Thread(target=parts.close, args=(0.0,), name="kvbm-close", daemon=True).start()


def assemble(
    config: Config,
    *,
    backend: Backend,
    eviction: Any = None,
    offload_policy: OffloadPolicy | None = None,
    storages: Mapping[Tier, Storage] | None = None,
) -> Assembly:
    """Make pools, storages, planner and executor.

    Parameters
    ----------
    config : Config
    backend : Backend
    eviction : EvictionPolicy, optional
        An instance for the top tier, instead of the name in the configuration.
    offload_policy : OffloadPolicy, optional
        An instance for the first route, instead of the name in the configuration.
    storages : dict of Tier to Storage, optional
        Ready-made storages; theirs is the number of blocks, and they are closed with the manager.

    Raises
    ------
    ConfigError
        No tier has memory, or a plug-in gives something else.
    StorageError
        A tier's memory or file cannot be had; what was made is let go.
    """
    given = dict(storages or {})
    if config.disk.path is not None and not config.disk.is_present and Tier.DISK not in given:
        _log.warning("no disk tier: disk.path is given without disk.num_blocks or disk.size path=%s", config.disk.path)
    made: dict[Tier, Storage] = {}
    try:
        for tier in _TIERS:
            if tier in given:
                made[tier] = given[tier]
            elif config.tier(tier).is_present:
                made[tier] = _make_storage(config, tier, _make_layout(config, tier), backend)
        _need_memory_on_top(made)
        _need_one_shape(made)
        return _join(config, made, backend=backend, eviction=eviction, offload_policy=offload_policy)
    except BaseException:
        for storage in made.values():
            storage.close()
        raise


def config_of(config: Config | None, settings: Mapping[str, Any]) -> Config:
    """Give the configuration that keywords mean, by the path of each; None is a keyword that was not given.

    Raises
    ------
    ConfigError
        Both a configuration and keywords, or a setting is impossible.
    """
    given = {path: value for path, value in settings.items() if value is not None}
    if config is not None:
        if given:
            raise ConfigError(f"give either a config or settings, got a config and {', '.join(given)}")
        return config
    tree: dict[str, dict[str, Any]] = {"model": {}}
    for path, value in given.items():
        section, key = path.split(".")
        if not (key == "num_blocks" and value == 0):
            tree.setdefault(section, {})[key] = value
    return Config.from_dict(tree)


def find_backend(backend: Backend | str) -> Backend:
    """Give the twin of this name, ``"auto"`` for the one that ``KVBM_BACKEND`` or the installation says."""
    if isinstance(backend, str):
        return default_backend() if backend == "auto" else load_backend(backend)
    return backend


def _join(
    config: Config,
    storages: dict[Tier, Storage],
    *,
    backend: Backend,
    eviction: Any,
    offload_policy: OffloadPolicy | None,
) -> Assembly:
    top = next(iter(storages.values()))
    top.keeps_checksums = False  # an engine writes there behind our back
    top.has_checksum[:] = False
    pools = {}
    layouts = {tier: storage.layout for tier, storage in storages.items()}
    for index, (tier, layout) in enumerate(layouts.items()):
        policy = eviction if index == 0 and eviction is not None else config.tier(tier).eviction
        pools[tier] = BlockPool(
            layout.num_blocks,
            name=tier.value,
            tier=tier,
            policy=load_plugin("eviction", policy)() if isinstance(policy, str) else policy,
            worker_id=config.runtime.worker_id,
            event_metadata={"model": config.model.fingerprint} if config.model.fingerprint else None,
            backend=backend,
        )
        storage = storages[tier]
        if isinstance(storage, HostStorage):
            pools[tier].bytes = StorageBytes(storage)
        _log.info(
            "tier opened worker_id=%s tier=%s num_blocks=%d block_nbytes=%d storage=%s",
            config.runtime.worker_id, tier.value, layout.num_blocks, layout.block_nbytes, type(storage).__name__,
        )  # fmt: skip
    executor = Executor(
        storages,
        copy_threads=config.runtime.copy_threads,
        staging_blocks=config.offload.staging_blocks,
        small_nbytes=config.runtime.small_copy_nbytes,
        verifies=config.offload.verify_checksums,
        backend=backend,
    )
    policies = [_make_offload_policy(config) for _ in range(len(pools) - 1)]
    if policies and offload_policy is not None:
        policies[0] = offload_policy
    planner = Planner(
        list(pools.values()),
        [LocalChannel(executor.execute, is_small=executor.is_small, is_bounded=executor.is_bounded)]
        if policies
        else [],
        policies=policies,
        recording_tiers=[tier for tier, storage in storages.items() if storage.capabilities.is_persistent],
        limits=_limits(config),
    )
    restore_pools(planner.pools[1:], planner.records)
    return Assembly(layouts, storages, pools, executor, planner, PlannerThread(planner) if policies else None)


def _make_layout(config: Config, tier: Tier) -> BlockLayout:
    model, section = config.model, config.tier(tier)
    dimensions: dict[str, Any] = {
        "num_layers": model.num_layers,
        "outer_dim": model.outer_dim,
        "block_size": model.block_size,
        "inner_dim": model.inner_dim,
        "dtype": model.dtype,
        "num_heads": model.num_heads,
    }
    # A block that begins on a page goes between memory and disk without another copy.
    dimensions["alignment"] = _PAGE_NBYTES if tier is Tier.HOST and model.block_nbytes >= _PAGE_NBYTES else 1
    one = _lay_out(section.layout, num_blocks=1, **dimensions)
    nbytes = one.buffer_nbytes * one.num_buffers
    if tier is Tier.DISK:  # a slot of the file
        nbytes = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    num_blocks = config.num_blocks_of(tier, nbytes)
    return _lay_out(section.layout, num_blocks=num_blocks, **dimensions)


def _lay_out(kind: str, **dimensions: Any) -> BlockLayout:
    if kind == "fully_contiguous":
        return BlockLayout.fully_contiguous(**dimensions)
    if kind in LAYOUTS:
        return BlockLayout.layer_separate(**dimensions, block_first=kind == "layer_separate_block_first")
    layout = load_plugin("layout", kind)(**dimensions)
    if not isinstance(layout, BlockLayout):
        raise ConfigError(f"layout plug-in {kind!r} gave a {type(layout).__name__}, must give a BlockLayout")
    return layout


def _make_storage(config: Config, tier: Tier, layout: BlockLayout, backend: Backend) -> Storage:
    section = config.tier(tier)
    if tier is Tier.DISK:
        from kvbm.storage.disk import DiskStorage  # most managers have no disk tier

        assert config.disk.path is not None, "checked by the configuration"
        return DiskStorage(
            layout,
            config.disk.path,
            num_threads=config.runtime.io_threads,
            use_direct_io=config.disk.direct_io,
            max_queued_nbytes=config.disk.max_queued_nbytes,
        )
    kind = DeviceStorage if tier is Tier.DEVICE else HostStorage
    return kind(
        layout,
        buffers=_allocate(section, layout),
        use_huge_pages=config.host.huge_pages,
        num_threads=config.runtime.copy_threads or 2,
        backend=backend,
    )


def _allocate(section: TierConfig, layout: BlockLayout) -> list[Any] | None:
    """Ask the tier's allocator for each buffer; None for our own mapping."""
    if section.allocator == "default":
        return None
    allocator = load_plugin("allocator", section.allocator)
    return [allocator(layout.buffer_nbytes) for _ in range(layout.num_buffers)]


def _make_offload_policy(config: Config) -> OffloadPolicy:
    name = config.offload.policy
    settings: dict[str, Any] = {
        "second_use": {"max_blocks": config.offload.use_count_blocks},
        "priority": {"min_priority": config.offload.min_priority},
    }.get(name, {})
    policy = load_plugin("offload", name)(**settings)
    if not isinstance(policy, OffloadPolicy):
        raise ConfigError(f"offload plug-in {name!r} gave a {type(policy).__name__}, must give an OffloadPolicy")
    return policy


def _limits(config: Config) -> Limits:
    offload, runtime = config.offload, config.runtime
    return Limits(
        queue_blocks=offload.queue_blocks,
        job_blocks=offload.job_blocks,
        route_jobs=offload.route_jobs,
        lineage_blocks=offload.lineage_blocks,
        touch_calls=offload.touch_calls,
        in_flight_share=offload.in_flight_share,
        onboard_timeout_s=runtime.onboard_timeout_s,
        offload_timeout_s=runtime.offload_timeout_s,
    )


def _need_one_shape(storages: Mapping[Tier, Storage]) -> None:
    """Refuse storages whose blocks hold other elements than those of the top tier."""
    (top, first), *others = storages.items()
    for tier, storage in others:
        for name in ("num_layers", "outer_dim", "block_size", "inner_dim", "dtype"):
            value, expected = getattr(storage.layout, name), getattr(first.layout, name)
            if value != expected:
                raise ConfigError(
                    f"the {tier.value} storage has {name} {value}, the {top.value} storage has {expected}: every tier "
                    "holds the same blocks"
                )


def _need_memory_on_top(storages: dict[Tier, Storage]) -> None:
    if not storages:
        raise ConfigError("a manager needs at least one tier, got none: give device_blocks (or device.num_blocks)")
    tier, storage = next(iter(storages.items()))
    if not storage.capabilities.is_addressable:
        raise ConfigError(
            f"the top tier is {tier.value!r}, which has no memory to fill: give a device or host tier too"
        )
