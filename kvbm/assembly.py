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
from kvbm.config import Config
from kvbm.errors import ConfigError, TransferTimeout
from kvbm.executor import Executor
from kvbm.jobs import LocalChannel
from kvbm.layout import BlockLayout
from kvbm.planner import OffloadPolicy, Planner, PlannerThread
from kvbm.pool import BlockPool
from kvbm.provision import make_storages
from kvbm.rules import limits_of, make_eviction_policy, make_offload_policy, ttls_of
from kvbm.storage.base import Storage
from kvbm.storage.cuda import CudaStorage
from kvbm.storage.cuda_views import CudaStorageBytes
from kvbm.storage.host import HostStorage
from kvbm.storage.views import StorageBytes
from kvbm.types import Tier

_log = logging.getLogger("kvbm.manager")


@dataclass
class Assembly:
    """The parts of a manager, by tier from the top down."""

    layouts: dict[Tier, BlockLayout]
    storages: dict[Tier, Storage]
    pools: dict[Tier, BlockPool]
    executor: Executor
    planner: Planner
    thread: PlannerThread | None  # where there is more than one tier, or something that ends by itself
    _closing: threading.Lock = field(default_factory=threading.Lock)  # held by whoever closes
    _starting: threading.Lock = field(default_factory=threading.Lock)  # guards what follows, and `thread`
    _is_closed: bool = False

    def need_thread(self) -> None:
        """Start the planner's thread where there is none yet: something ends by itself."""
        with self._starting:
            if self.thread is None and not self._is_closed:
                self.thread = PlannerThread(self.planner)

    def close(self, timeout_s: float) -> None:
        """End every transfer and let go of memory and files; each part may take this long to end what it does."""
        if not self._closing.acquire(blocking=False):
            return  # another thread closes, or this one does and calls back
        try:
            with self._starting:
                self._is_closed = True
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
    model: str | None = None,
    eviction: Any = None,
    offload_policy: OffloadPolicy | None = None,
    storages: Mapping[Tier, Storage] | None = None,
) -> Assembly:
    """Make pools, storages, planner and executor.

    Parameters
    ----------
    config : Config
    backend : Backend
    model : str, optional
        Fingerprint of the model, for tiers that outlive the process.
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
    made = make_storages(config, model=model, backend=backend, given=given)
    try:
        return _join(config, made, model=model, backend=backend, eviction=eviction, offload_policy=offload_policy)
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
    model: str | None,
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
        pools[tier] = BlockPool(
            layout.num_blocks,
            name=tier.value,
            tier=tier,
            policy=eviction if index == 0 and eviction is not None else make_eviction_policy(config, tier),
            worker_id=config.runtime.worker_id,
            event_metadata={"model": model} if model else None,
            backend=backend,
        )
        storage = storages[tier]
        if isinstance(storage, HostStorage):
            pools[tier].bytes = StorageBytes(storage)
        elif isinstance(storage, CudaStorage):
            pools[tier].bytes = CudaStorageBytes(storage)
        _log.info(
            "tier opened worker_id=%s tier=%s num_blocks=%d block_nbytes=%d storage=%s",
            config.runtime.worker_id, tier.value, layout.num_blocks, layout.block_nbytes, type(storage).__name__,
        )  # fmt: skip
    executor = Executor(
        storages,
        copy_threads=config.runtime.copy_threads,
        copy_thread_blocks=config.device.copy_thread_blocks,
        staging_blocks=config.offload.staging_blocks,
        small_nbytes=config.runtime.small_copy_nbytes,
        verifies=config.offload.verify_checksums,
        backend=backend,
    )
    policies = [
        make_offload_policy(
            config,
            tier,
            num_blocks=storage.num_blocks,
            slot_nbytes=storage.slot_nbytes,
            given=offload_policy if index == 0 else None,
        )
        for index, (tier, storage) in enumerate(list(storages.items())[1:])
    ]
    ttls_s = ttls_of(config, storages)
    planner = Planner(
        list(pools.values()),
        [LocalChannel(executor.execute, is_small=executor.is_small, is_bounded=executor.is_bounded)]
        if policies
        else [],
        policies=policies,
        recording_tiers=[tier for tier, storage in storages.items() if storage.capabilities.is_persistent],
        keyed_tiers=[tier for tier, storage in storages.items() if storage.capabilities.is_keyed],
        ttls_s=ttls_s,
        limits=limits_of(config),
    )
    try:
        planner.restore()
    except BaseException:  # ctrl-C
        planner.close(0.0)
        executor.close()
        raise
    thread = PlannerThread(planner) if policies or ttls_s else None
    return Assembly(layouts, storages, pools, executor, planner, thread)
