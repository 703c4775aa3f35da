"""Makes the bytes of each tier, from a configuration: layout, GPU and host memory, slab, object store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvbm._backend import Backend
from kvbm.config import LAYOUTS, Config, DeviceConfig, RemoteConfig, TierConfig
from kvbm.config.sections import MAX_BLOCKS
from kvbm.errors import ConfigError, StorageError
from kvbm.fingerprint import slab_fingerprint
from kvbm.gpu import Gpu, find_gpu
from kvbm.layout import BlockLayout
from kvbm.plugins import load_plugin
from kvbm.storage.base import Storage
from kvbm.storage.cuda import BUFFER_ALIGNMENT, CudaStorage
from kvbm.storage.device import DeviceStorage
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT
from kvbm.storage.host import HostStorage
from kvbm.types import Tier

_log = logging.getLogger("kvbm.manager")
_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.REMOTE)
_PAGE_NBYTES = 4096


def make_storages(
    config: Config, *, model: str | None, backend: Backend, given: Mapping[Tier, Storage]
) -> dict[Tier, Storage]:
    """Make the storages of all tiers that the configuration asks for, from the top down.

    Parameters
    ----------
    config, model, backend
        As for `make_storage`.
    given : dict of Tier to Storage
        Taken instead of those.

    Raises
    ------
    ConfigError, StorageError, SlabFormatError
        As `make_storage`; or no tier has memory, or two hold blocks of other elements. What was made, and what was
        given, is closed.
    """
    made: dict[Tier, Storage] = {}
    try:
        gpu = _find_gpu(config, given)
        for tier in _TIERS:
            if tier in given:
                made[tier] = given[tier]
            elif config.tier(tier).is_present:
                made[tier] = make_storage(config, tier, model=model, backend=backend, gpu=gpu)
        _need_memory_on_top(made)
        _need_one_shape(made)
    except BaseException:
        for storage in made.values():
            storage.close()
        raise
    return made


def _find_gpu(config: Config, given: Mapping[Tier, Storage]) -> Gpu | None:
    """Give the GPU that holds the device tier, None where host memory stands in or there is no such tier."""
    if Tier.DEVICE in given:
        storage = given[Tier.DEVICE]
        return storage.gpu if isinstance(storage, CudaStorage) else None
    if not config.tier(Tier.DEVICE).is_present:
        fraction = config.device.gpu_memory_fraction
        if fraction != DeviceConfig().gpu_memory_fraction:
            _log.warning(
                "no device tier: device.gpu_memory_fraction=%s is given without device.kind = cuda, num_blocks or size",
                fraction,
            )
        return None
    kind = config.device.kind
    return find_gpu(None if kind == "auto" else kind, index=config.device.index)


def make_layout(config: Config, tier: Tier, gpu: Gpu | None = None) -> BlockLayout:
    """Lay out the blocks of one tier.

    Parameters
    ----------
    config, tier, gpu
        As for `make_storage`.

    Raises
    ------
    ConfigError
        A plug-in gives something else, or the tier has no room for a block.
    StorageError
        The GPU has none.
    """
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
    if tier is Tier.DISK:  # a slot of the file, and its record
        nbytes = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES + RECORD_NBYTES
    # Beside the slots lie the index's headers, the rest of its last page, and a lock file of one page.
    reserved = RECORDS_AT + (_PAGE_NBYTES - RECORD_NBYTES) + _PAGE_NBYTES if tier is Tier.DISK else 0
    if tier is Tier.DEVICE and config.device.takes_share and gpu is not None:
        num_blocks = _share_of(gpu, config.device.gpu_memory_fraction, one)
    else:
        num_blocks = config.num_blocks_of(tier, nbytes, reserved_nbytes=reserved)
    return _lay_out(section.layout, num_blocks=num_blocks, **dimensions)


def _share_of(gpu: Gpu, fraction: float, one: BlockLayout) -> int:
    """Count the blocks that fit into a share of the memory that is free now.

    Of the free memory and not of all: what an engine or another process holds already is nobody's to share.
    """
    free_nbytes, _ = gpu.device.memory_info()
    nbytes = int(free_nbytes * fraction) - one.num_buffers * BUFFER_ALIGNMENT  # each buffer begins on such a border
    num_blocks = min(nbytes // (one.buffer_nbytes * one.num_buffers), MAX_BLOCKS)
    if num_blocks < 1:
        raise StorageError(
            f"device.gpu_memory_fraction is {fraction} and {free_nbytes} bytes are free on {gpu.device.name}, one "
            f"block takes {one.buffer_nbytes * one.num_buffers}: give a larger share, or the GPU less to hold"
        )
    return num_blocks


def _lay_out(kind: str, **dimensions: Any) -> BlockLayout:
    if kind == "fully_contiguous":
        return BlockLayout.fully_contiguous(**dimensions)
    if kind in LAYOUTS:
        return BlockLayout.layer_separate(**dimensions, block_first=kind == "layer_separate_block_first")
    layout = load_plugin("layout", kind)(**dimensions)
    if not isinstance(layout, BlockLayout):
        raise ConfigError(f"layout plug-in {kind!r} gave a {type(layout).__name__}, must give a BlockLayout")
    return layout


def make_storage(config: Config, tier: Tier, *, model: str | None, backend: Backend, gpu: Gpu | None = None) -> Storage:
    """Make the storage of one tier.

    Parameters
    ----------
    config : Config
    tier : Tier
        One that the configuration asks for.
    model : str, optional
        Fingerprint of the model.
    backend : Backend
    gpu : Gpu, optional
        Holds the device tier, and has host memory pinned for it; None lets host memory stand in.

    Raises
    ------
    ConfigError
        A plug-in gives something else, or a setting is impossible.
    StorageError
        Memory or files cannot be had.
    SlabFormatError
        The disk tier's slab is of another model or layout.
    """
    layout = make_layout(config, tier, gpu)
    section = config.tier(tier)
    fingerprint = slab_fingerprint(model, layout, rank=config.runtime.rank, num_ranks=config.runtime.num_ranks)
    if tier is Tier.DISK:
        from kvbm.storage.disk import DiskStorage  # most managers have no disk tier

        assert config.disk.path is not None, "checked by the configuration"
        return DiskStorage(
            layout,
            config.disk.path,
            name=config.disk.slab or f"rank{config.runtime.rank}",
            fingerprint=fingerprint,
            on_mismatch=config.disk.on_mismatch,
            engine=config.disk.engine,
            num_threads=config.runtime.io_threads,
            depth=config.disk.depth,
            use_direct_io=config.disk.direct_io,
            max_queued_nbytes=config.disk.max_queued_nbytes,
            sync_interval_s=config.disk.sync_interval_s,
            backend=backend,
        )
    if tier is Tier.REMOTE:
        from kvbm.storage.object_store import ObjectStorage

        assert config.remote.url is not None, "checked by the configuration"
        if model is None:  # others share it: blocks of another model of the same shape would be taken for ours
            raise ConfigError(
                "an object store is shared, so it needs to know the model: give model.fingerprint (model=)"
            )
        return ObjectStorage(
            layout,
            config.remote.url,
            fingerprint=fingerprint,
            prefix=config.remote.prefix,
            max_concurrency=config.remote.max_concurrency,
            timeout_s=config.remote.request_timeout_s,
            deadline_s=config.runtime.offload_timeout_s,
            listing_timeout_s=config.runtime.offload_timeout_s,
            options=_options_of(config.remote),
        )
    if tier is Tier.DEVICE and gpu is not None:
        return CudaStorage(layout, gpu=gpu, buffers=_allocate(section, layout))
    kind = DeviceStorage if tier is Tier.DEVICE else HostStorage
    return kind(
        layout,
        buffers=_allocate(section, layout),
        use_huge_pages=config.host.huge_pages,
        num_threads=config.runtime.copy_threads or 2,
        gpu=gpu,
        backend=backend,
    )


def _allocate(section: TierConfig, layout: BlockLayout) -> list[Any] | None:
    """Ask the tier's allocator for each buffer; None for our own mapping."""
    if section.allocator == "default":
        return None
    allocator = load_plugin("allocator", section.allocator)
    return [allocator(layout.buffer_nbytes) for _ in range(layout.num_buffers)]


def _options_of(section: RemoteConfig) -> dict[str, Any]:
    given = {"endpoint": section.endpoint, "region": section.region, "allow_http": section.allow_http or None}
    return {name: value for name, value in given.items() if value is not None}


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
