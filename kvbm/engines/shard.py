"""One group of layers in one worker: the engine's memory by its strides, the tiers below it, and what it tells of them.

A block is opaque bytes here, one run for each layer; what is inside is the engine's business. So a layout has one
"token" of as many "elements" as a layer has bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.errors import LayoutError
from kvbm.executor import Executor
from kvbm.jobs import InventoryJob, encode
from kvbm.layout import BlockLayout
from kvbm.provision import make_storages
from kvbm.storage import DeviceStorage
from kvbm.types import Tier


@dataclass(frozen=True)
class LayerMemory:
    """Where the blocks of one layer lie.

    Attributes
    ----------
    address : int
        Of block 0.
    num_blocks : int
    block_stride, block_nbytes : int
        Bytes from one block to the next, and bytes of a block, which lie in one piece.
    owner : object
        Keeps the memory alive.
    """

    address: int
    num_blocks: int
    block_stride: int
    block_nbytes: int
    owner: Any


class ShardDescription(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the scheduler's half has to know of a worker's tiers.

    Attributes
    ----------
    num_blocks : dict of str to int
        Of each tier below the engine's memory, from the top down.
    block_nbytes : int
        On this rank.
    recording, keyed : list of str
        Tiers that keep records, and that have no slots.
    inventories : dict of str to bytes
        What tiers that outlive the process hold: encoded results of `InventoryJob`.
    """

    num_blocks: dict[str, int]
    block_nbytes: int
    recording: list[str]
    keyed: list[str]
    inventories: dict[str, bytes]


class Shard:
    """One group's storages and executor in one worker.

    Parameters
    ----------
    layers : sequence of LayerMemory
        Of the group, in the model's order.
    settings : mapping
        Sections of the configuration: host, disk, remote, offload, runtime; never model and device.
    fingerprint : str
        Of the model and the engine's way to lay out a block.
    backend : Backend

    Raises
    ------
    LayoutError
        Layers of one group differ in their blocks.
    ConfigError, StorageError
        A setting is impossible; memory or files cannot be had.
    """

    def __init__(
        self, layers: Sequence[LayerMemory], settings: Mapping[str, Any], *, fingerprint: str, backend: Backend
    ) -> None:
        layout = layout_of(layers)
        model = {
            "num_layers": layout.num_layers,
            "outer_dim": 1,
            "block_size": 1,
            "inner_dim": layout.inner_dim,
            "dtype": "uint8",
            "fingerprint": fingerprint,
        }
        config = Config.from_dict({**settings, "model": model})
        engine = DeviceStorage(layout, buffers=[_bytes_of(layer) for layer in layers], backend=backend)
        self._owners = [layer.owner for layer in layers]
        self.storages = make_storages(config, model=fingerprint, backend=backend, given={Tier.DEVICE: engine})
        self.executor = Executor(
            self.storages,
            copy_threads=config.runtime.copy_threads,
            staging_blocks=config.offload.staging_blocks,
            verifies=config.offload.verify_checksums,
            backend=backend,
        )

    def describe(self) -> ShardDescription:
        """Tell what the scheduler's half has to know, what outlived the last process included."""
        below = {tier: storage for tier, storage in self.storages.items() if tier is not Tier.DEVICE}
        recording = [tier for tier, storage in below.items() if storage.capabilities.is_persistent]
        jobs = {tier: InventoryJob(job_id=0, tier=tier) for tier in recording}
        return ShardDescription(
            num_blocks={tier.value: storage.num_blocks for tier, storage in below.items()},
            block_nbytes=self.storages[Tier.DEVICE].layout.block_nbytes,
            recording=[tier.value for tier in recording],
            keyed=[tier.value for tier, storage in below.items() if storage.capabilities.is_keyed],
            inventories={tier.value: encode(self.executor.execute(job)) for tier, job in jobs.items()},
        )

    def close(self, timeout_s: float | None = None) -> None:
        """Let go of everything but the engine's memory; no job runs any more."""
        self.executor.close()
        for storage in self.storages.values():
            storage.close(timeout_s)
        self._owners = []


def layout_of(layers: Sequence[LayerMemory]) -> BlockLayout:
    """Describe the engine's memory of one group.

    Raises
    ------
    LayoutError
        There is no layer, or layers differ in their blocks.
    """
    if not layers:
        raise LayoutError("a group of layers has no layer")
    first = layers[0]
    for index, layer in enumerate(layers):
        if (layer.num_blocks, layer.block_stride, layer.block_nbytes) != (
            first.num_blocks,
            first.block_stride,
            first.block_nbytes,
        ):
            raise LayoutError(
                f"layer {index} has {layer.num_blocks} blocks of {layer.block_nbytes} bytes every {layer.block_stride},"
                f" layer 0 {first.num_blocks} of {first.block_nbytes} every {first.block_stride}: give one kind a group"
            )
    return BlockLayout.custom(
        num_blocks=first.num_blocks,
        num_layers=len(layers),
        outer_dim=1,
        block_size=1,
        inner_dim=first.block_nbytes,
        dtype="uint8",
        strides={"block": first.block_stride, "outer": first.block_nbytes},
        buffer_nbytes=(first.num_blocks - 1) * first.block_stride + first.block_nbytes,
    )


def _bytes_of(layer: LayerMemory) -> npt.NDArray[np.uint8]:
    nbytes = (layer.num_blocks - 1) * layer.block_stride + layer.block_nbytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(layer.address))
