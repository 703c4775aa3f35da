"""One group of layers in one worker: the engine's memory by its strides, the tiers below it, and what it tells of them.

A block is opaque bytes here, one run for each layer; what is inside is the engine's business. So a layout has one
"token" of as many "elements" as a layer has bytes. Where an engine keeps all layers of a block together, they are one
buffer, and a block is copied in one piece.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.engines.reset_note import is_noted
from kvbm.engines.runner import Runner
from kvbm.engines.shared_host import HostShare, LeadingHost, follow
from kvbm.engines.stream_copies import StreamCopies
from kvbm.errors import LayoutError, StorageError
from kvbm.executor import Executor
from kvbm.gpu import describe_gpu, find_gpu
from kvbm.jobs import ForgetJob, InventoryJob, encode
from kvbm.layout import BlockLayout
from kvbm.provision import make_storages
from kvbm.storage import CudaStorage, DeviceStorage
from kvbm.storage.base import Storage
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
    device : int or None
        Number of the GPU that the memory is on; None for host memory.
    """

    address: int
    num_blocks: int
    block_stride: int
    block_nbytes: int
    owner: Any
    device: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the end of the last block."""
        return (self.num_blocks - 1) * self.block_stride + self.block_nbytes


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
    slot_nbytes : dict of str to int
        Bytes that a block takes in each tier on this rank; `block_nbytes` where a tier is not named.
    is_shared : bool
        Rank 0's tiers are those of all ranks.
    """

    num_blocks: dict[str, int]
    block_nbytes: int
    recording: list[str]
    keyed: list[str]
    inventories: dict[str, bytes]
    slot_nbytes: dict[str, int] = {}
    is_shared: bool = False


class Shard:
    """One group's storages and what runs its jobs, in one worker.

    Parameters
    ----------
    layers : sequence of LayerMemory
        Of the group, in the model's order.
    settings : mapping
        Sections of the configuration: host, disk, remote, offload, runtime; never model and device.
    fingerprint : str
        Of the model and the engine's way to lay out a block.
    backend : Backend
    share : HostShare, optional
        Every rank's blocks hold the same bytes, and rank 0 owns one copy for all.

    Attributes
    ----------
    storages : dict of Tier to Storage
        From the top down; a follower has no more than the engine's memory and rank 0's host tier.
    executor : Runner
    num_layers : int

    Raises
    ------
    LayoutError
        Layers of one group differ in their blocks, or lie on different devices.
    ConfigError, StorageError
        A setting is impossible; memory, files or the GPU cannot be had; rank 0 does not give its host tier.

    Notes
    -----
    With a share a follower blocks here until rank 0 has opened its tiers; rank 0 waits for nobody.
    """

    def __init__(
        self,
        layers: Sequence[LayerMemory],
        settings: Mapping[str, Any],
        *,
        fingerprint: str,
        backend: Backend,
        share: HostShare | None = None,
    ) -> None:
        layout = layout_of(layers)
        self.num_layers = layout.num_layers
        self._device = layers[0].device
        self._backend = backend
        model = {
            "num_layers": layout.num_layers,
            "outer_dim": 1,
            "block_size": 1,
            "inner_dim": layout.inner_dim,
            "dtype": "uint8",
            "fingerprint": fingerprint,
        }
        self._config = Config.from_dict({**settings, "model": model})
        self._num_blocks = layout.num_blocks
        engine = _storage_over(layers, layout, backend)
        self._owners = [layer.owner for layer in layers]
        self._leading: LeadingHost | None = None
        self._followed: ShardDescription | None = None  # rank 0's
        if share is None:
            self._open({Tier.DEVICE: engine}, fingerprint)
        elif share.is_follower:
            host, words = follow(self._config, share, backend=backend)
            self._followed = msgspec.msgpack.decode(words, type=ShardDescription)
            self.storages = {Tier.DEVICE: engine, Tier.HOST: host}
            self._run()
        else:
            self._leading = LeadingHost(self._config, share, backend=backend)
            try:
                self._open({Tier.DEVICE: engine, Tier.HOST: self._leading.storage}, fingerprint)
            except BaseException:  # followers hear of it
                self._leading.close()
                raise
            self._leading.give(msgspec.msgpack.encode(self._outline()))

    def _open(self, given: Mapping[Tier, Storage], fingerprint: str) -> None:
        """Open the tiers below the engine's memory."""
        self.storages = make_storages(self._config, model=fingerprint, backend=self._backend, given=given)
        self._run()
        if self._config.disk.path and is_noted(Path(self._config.disk.path)):
            self._forget_all()

    def _run(self) -> None:
        """Make what runs jobs."""
        self._below = Executor(
            {tier: storage for tier, storage in self.storages.items() if tier is not Tier.DEVICE},
            copy_threads=self._config.runtime.copy_threads,
            staging_blocks=self._config.offload.staging_blocks,
            verifies=self._config.offload.verify_checksums,
            backend=self._backend,
        )
        self.executor = Runner(self._below)
        self.executor.attach(self.storages[Tier.DEVICE], self._copies())

    def _forget_all(self) -> None:
        """Forget what outlived the last process, which was told to and ended first."""
        for tier in self._recording():
            empty = np.empty((0, 2), dtype=np.uint64)
            result = self._below.execute(ForgetJob(job_id=0, tier=tier, hashes=empty, is_all=True))
            if result.reason:
                raise StorageError(errno.EIO, f"the {tier.value} tier was to be forgotten and is not: {result.reason}")

    def _recording(self) -> list[Tier]:
        return [
            tier
            for tier, storage in self.storages.items()
            if tier is not Tier.DEVICE and storage.capabilities.is_persistent
        ]

    def detach(self) -> None:
        """Let go of the engine's memory, once no byte moves there; may be called again.

        Notes
        -----
        Blocks while copies run. The tiers below stay, their jobs go on; those that touch the engine's memory are
        answered as failed.
        """
        self.executor.detach()
        memory = self.storages.pop(Tier.DEVICE, None)
        if memory is not None:
            memory.close()
        self._owners = []

    def attach(self, layers: Sequence[LayerMemory]) -> None:
        """Take memory of the engine's instead of that which was let go of; the memory that is there stays.

        Parameters
        ----------
        layers : sequence of LayerMemory
            As at first, wherever they lie now.

        Raises
        ------
        LayoutError
            Blocks are others than before.
        """
        if Tier.DEVICE in self.storages:
            return
        layout = layout_of(layers)
        now = layout.num_layers, layout.inner_dim, layout.num_blocks, layers[0].device
        before = self.num_layers, self._config.model.inner_dim, self._num_blocks, self._device
        if now != before:
            names = "layers, bytes of a layer's block, blocks, device"
            raise LayoutError(f"the engine came back with {now} ({names}), it had {before}: start it again")
        self.storages = {Tier.DEVICE: _storage_over(layers, layout, self._backend), **self.storages}
        self._owners = [layer.owner for layer in layers]
        self.executor.attach(self.storages[Tier.DEVICE], self._copies())

    def describe(self) -> ShardDescription:
        """Tell what the scheduler's half has to know, what outlived the last process included."""
        if self._followed is not None:
            return self._followed
        jobs = {tier: InventoryJob(job_id=0, tier=tier) for tier in self._recording()}
        inventories = {tier.value: encode(self.executor.execute(job)) for tier, job in jobs.items()}
        return msgspec.structs.replace(self._outline(), inventories=inventories)

    @property
    def is_follower(self) -> bool:
        """Whether the tiers below the engine's memory are rank 0's."""
        return self._followed is not None

    def _outline(self) -> ShardDescription:
        """Tell of the tiers, not of what they hold."""
        below = {tier: storage for tier, storage in self.storages.items() if tier is not Tier.DEVICE}
        return ShardDescription(
            num_blocks={tier.value: storage.num_blocks for tier, storage in below.items()},
            block_nbytes=self._config.model.block_nbytes,
            recording=[tier.value for tier in self._recording()],
            keyed=[tier.value for tier, storage in below.items() if storage.capabilities.is_keyed],
            inventories={},
            slot_nbytes={tier.value: storage.slot_nbytes for tier, storage in below.items()},
            is_shared=self._leading is not None,
        )

    def close(self, timeout_s: float | None = None) -> None:
        """Let go of everything but the engine's memory; no job runs any more."""
        self.detach()
        if self._leading is not None:
            self._leading.close()
        self._below.close()
        for storage in self.storages.values():
            storage.close(timeout_s)

    def _copies(self) -> Executor | StreamCopies:
        """Make what copies between the engine's memory and the tier below it; other tiers are never next to it."""
        near: dict[Tier, Storage] = dict(list(self.storages.items())[:2])
        verifies = self._config.offload.verify_checksums
        if self._device is not None:
            num_thread_blocks = self._config.device.copy_thread_blocks
            return StreamCopies(near, verifies=verifies, num_thread_blocks=num_thread_blocks)
        near = {tier: storage for tier, storage in near.items() if storage.capabilities.is_addressable}
        copy_threads = self._config.runtime.copy_threads
        return Executor(near, copy_threads=copy_threads, verifies=verifies, backend=self._backend)


def layout_of(layers: Sequence[LayerMemory]) -> BlockLayout:
    """Describe the engine's memory of one group.

    Parameters
    ----------
    layers : sequence of LayerMemory

    Returns
    -------
    BlockLayout
        Of one buffer where all layers of a block lie together at one pitch, else of a buffer for each layer.

    Raises
    ------
    LayoutError
        There is no layer, layers differ in their blocks, or lie on different devices.
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
        if layer.device != first.device:
            raise LayoutError(f"layer {index} is on device {layer.device}, layer 0 on {first.device}: give one device")
    strides = {"block": first.block_stride, "outer": first.block_nbytes}
    nbytes = first.nbytes
    if (pitch := _pitch_of(layers)) is not None:
        strides["layer"] = pitch
        nbytes += (len(layers) - 1) * pitch
    return BlockLayout.custom(
        num_blocks=first.num_blocks,
        num_layers=len(layers),
        outer_dim=1,
        block_size=1,
        inner_dim=first.block_nbytes,
        dtype="uint8",
        strides=strides,
        buffer_nbytes=nbytes,
    )


def _pitch_of(layers: Sequence[LayerMemory]) -> int | None:
    """Give the bytes from one layer to the next where all layers of a block lie within its stride, one pitch apart."""
    pitches = {after.address - before.address for before, after in itertools.pairwise(layers)}
    if len(pitches) != 1:
        return None
    (pitch,) = pitches
    first = layers[0]
    has_room = (len(layers) - 1) * pitch + first.block_nbytes <= first.block_stride
    return pitch if pitch >= first.block_nbytes and has_room else None


def _storage_over(layers: Sequence[LayerMemory], layout: BlockLayout, backend: Backend) -> Storage:
    """Bind a layout to the engine's memory, where it lies."""
    parts = layers if layout.has_layer_buffers else layers[:1]
    device = layers[0].device
    if device is None:
        return DeviceStorage(
            layout, buffers=[_bytes_of(layer, layout.buffer_nbytes) for layer in parts], backend=backend
        )
    gpu = find_gpu(index=device)
    if gpu is None:
        reason = describe_gpu(index=device)
        raise StorageError(f"the engine's memory is on GPU {device}, which cannot be used: {reason}")
    return CudaStorage(layout, gpu=gpu, buffers=[_OnDevice(layer, layout.buffer_nbytes) for layer in parts], streams=())


def _bytes_of(layer: LayerMemory, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(layer.address))


class _OnDevice:
    """Memory on a GPU as an array of bytes: engines have elements that arrays of other packages have no name for."""

    def __init__(self, layer: LayerMemory, nbytes: int) -> None:
        self.owner = layer.owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (layer.address, False),
        }
