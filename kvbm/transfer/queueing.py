"""Queues the parts of one submission on a stream: copies, permutes, checksums, each with the scratch that it needs.

Nothing here waits for the device. The scratch belongs to the submission until it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvbm.copyplan import AddressArray, CopyPlan
from kvbm.errors import StorageError
from kvbm.gpu import DeviceMemory, Gpu
from kvbm.gpu.segments import lies_in_one, parts_in_one
from kvbm.gpu.streams import as_event, as_stream, is_event
from kvbm.layout import BoundLayout
from kvbm.transfer.choose import PathTable, choose_path, shape_of
from kvbm.transfer.scratch import Scratch, ScratchPool
from kvbm.transfer.sides import Side, direction_of
from kvbm.types import HashArray, IdArray

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream

Checksums = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class GpuMeans:
    """What every submission of an engine takes from.

    Attributes
    ----------
    gpu : Gpu
    table : PathTable
    scratch : ScratchPool
    num_thread_blocks : int
        That kernels take from others at most; 0 leaves it to the native side.
    staging_nbytes : int
        Of the device memory through which a lane gathers and scatters.
    """

    gpu: Gpu
    table: PathTable
    scratch: ScratchPool
    num_thread_blocks: int = 0
    staging_nbytes: int = 64 << 20

    def path_of(self, plan: CopyPlan, direction: str, *, is_pinned: bool) -> str:
        """Choose how to copy a plan: O(number of blocks + number of pieces)."""
        return choose_path(self.table, shape_of(plan, direction), device=self.gpu.device, is_pinned=is_pinned)


class StagingMemory:
    """Device memory through which the submissions of one lane pass one after the other; made when first used.

    Parameters
    ----------
    gpu : Gpu
    nbytes : int
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu = gpu
        self._nbytes = nbytes
        self._memory: DeviceMemory | None = None

    def take(self, nbytes: int) -> tuple[int, int]:
        """Give address and size of at least this many bytes; raises `StorageError` where there is no such memory.

        The stream's order keeps submissions apart. What is replaced is freed after its use, which waits for the whole
        device: so the memory is as large as it will nearly ever be from the first, if there is room.
        """
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory = self._make(nbytes)
        return self._memory.address, self._memory.nbytes

    def _make(self, nbytes: int) -> DeviceMemory:
        if nbytes < self._nbytes:
            with contextlib.suppress(StorageError):
                return DeviceMemory(self._gpu, self._nbytes)
        return DeviceMemory(self._gpu, nbytes)

    @property
    def owner(self) -> Any:
        """What a submission holds."""
        return self._memory


class Queueing:
    """The parts of one submission.

    Parameters
    ----------
    means : GpuMeans
    stream : Stream
    staging : StagingMemory
        Of the stream's lane.
    """

    def __init__(self, means: GpuMeans, staging: StagingMemory) -> None:
        self._means = means
        self._staging = staging
        self._taken: list[Scratch] = []
        self._others: list[Stream] = []  # to be waited for, before anything else
        self._events: list[Event] = []
        self._fence: Event | None = None
        self.event: Event | None = None  # behind all that was queued, where the last call put one there
        self.held: list[Any] = []  # what must live until the submission is done
        self.paths: list[str] = []  # taken, for tests and logs

    def wait_for(self, work: Iterable[Any]) -> None:
        """Let what is queued wait for streams, for all that is on them when it is queued, and for events.

        Raises
        ------
        ConfigError
            Something else is among them.
        """
        gpu = self._means.gpu
        for one in work:
            if one is not None and is_event(one):
                self._events.append(as_event(gpu, one))
            else:
                self._others.append(as_stream(gpu, one))

    def begin(self, fence: Event) -> None:
        """Take the event that is recorded on streams to be waited for; before anything is queued."""
        self._fence = fence

    def copy(
        self,
        stream: Stream,
        plan: CopyPlan,
        sides: tuple[Side, Side],
        *,
        is_pinned: bool,
        hashes: HashArray | None,
        path: str | None = None,
    ) -> Checksums | None:
        """Queue a plan whose pieces keep their order.

        Parameters
        ----------
        stream : Stream
        plan : CopyPlan
        sides : tuple of Side
            Source and destination.
        is_pinned : bool
            The device may use the memory of both directly.
        hashes : (num_blocks, 2) uint64, optional
        path : str, optional
            Where it is known already; None chooses it.

        Returns
        -------
        (num_blocks,) uint64, pinned host, or None
            The checksums in the order of the pieces, valid when the submission is done; None without hashes.
        """
        direction = direction_of(*sides)
        if path is None:
            path = self._means.path_of(plan, direction, is_pinned=is_pinned)
        if _crosses_borders(plan, sides, path):
            return self._copy_parts(stream, plan, sides, is_pinned=is_pinned, hashes=hashes)
        return self._copy_whole(stream, plan, direction, path, hashes)

    def _copy_parts(
        self, stream: Stream, plan: CopyPlan, sides: tuple[Side, Side], *, is_pinned: bool, hashes: HashArray | None
    ) -> Checksums | None:
        """Queue a plan in parts that cross no border; the checksums, which need whole blocks, on their own."""
        direction = direction_of(*sides)
        self._wait(stream)
        for blocks, pieces in parts_in_one(
            (plan.source_blocks, plan.source_pieces, sides[0].segment_starts),
            (plan.destination_blocks, plan.destination_pieces, sides[1].segment_starts),
        ):
            part = replace(
                plan,
                source_blocks=plan.source_blocks[blocks],
                destination_blocks=plan.destination_blocks[blocks],
                source_pieces=plan.source_pieces[pieces],
                destination_pieces=plan.destination_pieces[pieces],
            )
            path = self._means.path_of(part, direction, is_pinned=is_pinned)
            self._copy_whole(stream, part, direction, path, None)
        if hashes is None:
            return None
        at = (plan.source_blocks, plan.source_pieces)
        if direction != "down":
            at = (plan.destination_blocks, plan.destination_pieces)
        return self.checksum(stream, *at, plan.piece_nbytes, hashes)

    def _copy_whole(
        self, stream: Stream, plan: CopyPlan, direction: str, path: str, hashes: HashArray | None
    ) -> Checksums | None:
        """Queue a plan by a path, the checksums with it."""
        device = self._means.gpu.device
        num_blocks, num_pieces = plan.num_blocks, len(plan.source_pieces)
        block_nbytes = num_pieces * plan.piece_nbytes
        checksums = self._checksum_memory(num_blocks) if hashes is not None else None
        # Plain copies have no descriptors, so without checksums nothing is to be had.
        needs_scratch = hashes is not None or path in ("kernel", "staged")
        step = num_blocks
        if path == "staged":
            step = max(1, min(step, self._means.staging_nbytes // block_nbytes))
        for start in range(0, num_blocks, step):
            part = slice(start, min(start + step, num_blocks))
            staging, scratch, pinned = (0, 0), (0, 0), 0
            for event in self._take_events():
                stream.wait(event)
            if path == "staged":
                staging = self._staging.take((part.stop - start) * block_nbytes)
                self.held.append(self._staging.owner)
            if needs_scratch:
                nbytes = device.scratch_nbytes(part.stop - start, num_pieces, with_checksums=hashes is not None)
                taken = self._take(nbytes)
                scratch, pinned = (taken.device_address, taken.nbytes), taken.pinned_address
            self.event = device.copy(
                stream,
                plan.source_blocks[part],
                plan.destination_blocks[part],
                plan.source_pieces,
                plan.destination_pieces,
                plan.piece_nbytes,
                path=path,
                source_on_device=direction != "up",
                destination_on_device=direction != "down",
                scratch=scratch,
                pinned=pinned,
                staging=staging,
                num_thread_blocks=self._means.num_thread_blocks,
                hashes=None if hashes is None else hashes[part],
                checksums=0 if checksums is None else checksums.ctypes.data + 8 * start,
                wait_for=self._take_others(),
                fence=self._fence,
                with_event=part.stop == num_blocks,
            )
        self.paths.append(path)
        return checksums

    def permute(self, stream: Stream, source: Side, destination: Side, layers: range) -> None:
        """Queue the copy of blocks whose tokens and heads lie in another order on each side; no checksums.

        Parameters
        ----------
        stream : Stream
        source, destination : Side
            Both of memory that the device may use directly.
        layers : range
        """
        here, there = source.storage.bound, destination.storage.bound
        regions = _regions(here, layers), _regions(there, layers)
        device = self._means.gpu.device
        scratch = self._take(device.scratch_nbytes(len(source.ids), len(regions[0]), with_checksums=False))
        self._wait(stream)
        layout = here.layout
        device.permute(
            stream,
            _block_addresses(here, source.ids),
            _block_addresses(there, destination.ids),
            *regions,
            num_tokens=layout.block_size,
            num_heads=layout.num_heads,
            head_nbytes=layout.head_nbytes,
            source_strides=(layout.strides.token, layout.strides.head),
            destination_strides=(there.layout.strides.token, there.layout.strides.head),
            scratch=(scratch.device_address, scratch.nbytes),
            pinned=scratch.pinned_address,
            num_thread_blocks=self._means.num_thread_blocks,
        )
        self.paths.append("permute")

    def checksum(
        self, stream: Stream, blocks: AddressArray, pieces: AddressArray, piece_nbytes: int, hashes: HashArray
    ) -> Checksums:
        """Queue the checksums of blocks on the device, in the order of their pieces: (num_blocks,) uint64, pinned."""
        device = self._means.gpu.device
        checksums = self._checksum_memory(len(blocks))
        scratch = self._take(device.scratch_nbytes(len(blocks), len(pieces), with_checksums=True))
        self._wait(stream)
        device.checksum(
            stream,
            blocks,
            pieces,
            piece_nbytes,
            hashes,
            scratch=(scratch.device_address, scratch.nbytes),
            pinned=scratch.pinned_address,
            checksums=checksums.ctypes.data,
            num_thread_blocks=self._means.num_thread_blocks,
        )
        return checksums

    def give_back(self) -> None:
        """Give the scratch back; the device uses none of it any more."""
        for scratch in self._taken:
            self._means.scratch.give(scratch)
        self._taken = []
        self.held = []

    def _wait(self, stream: Stream) -> None:
        """Queue the waits that were asked for, unless they are queued; what follows is behind no event yet."""
        self.event = None
        for event in self._take_events():
            stream.wait(event)
        for other in self._take_others():
            assert self._fence is not None, "it comes before anything is queued"
            other.record(self._fence)
            stream.wait(self._fence)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _take_others(self) -> list[Stream]:
        others, self._others = self._others, []
        return others

    def _take(self, nbytes: int) -> Scratch:
        scratch = self._means.scratch.take(nbytes)
        self._taken.append(scratch)
        return scratch

    def _checksum_memory(self, num_blocks: int) -> Checksums:
        return self._take(8 * num_blocks).pinned[: 8 * num_blocks].view(np.uint64)


def _crosses_borders(plan: CopyPlan, sides: tuple[Side, Side], path: str) -> bool:
    """Tell whether the native side might join what lies in several allocations of somebody else's."""
    if path not in ("memcpy", "batch"):  # a kernel takes what the device has, piece by piece
        return False
    if all(len(side.segment_starts) < 2 for side in sides):
        return False
    places = (plan.source_blocks, plan.source_pieces), (plan.destination_blocks, plan.destination_pieces)
    for side, (blocks, pieces) in zip(sides, places, strict=True):
        # A batch joins runs that follow each other, a plain copy also those at one pitch.
        may_join = path == "memcpy" or getattr(side.storage, "has_adjacent_segments", False)
        # A buffer lies in one allocation whole, so where the pieces of one block lie tells for every block.
        if may_join and not lies_in_one(blocks[:1], pieces, side.segment_starts):
            return True
    return False


def layer_plan(plan: CopyPlan, layers: range, num_layers: int) -> CopyPlan:
    """Cut the plan of whole blocks down to some layers; pieces stand in logical order, so a layer's stand together."""
    num_pieces = len(plan.source_pieces)
    if num_pieces % num_layers:  # a piece spans layers: it is the whole block then
        layer_nbytes = plan.piece_nbytes // num_layers
        start = np.uint64(layers.start * layer_nbytes)
        pieces = plan.source_pieces + start, plan.destination_pieces + start
        return replace(
            plan,
            source_pieces=pieces[0],
            destination_pieces=pieces[1],
            piece_nbytes=len(layers) * layer_nbytes,
        )
    width = num_pieces // num_layers
    part = slice(layers.start * width, layers.stop * width)
    return replace(plan, source_pieces=plan.source_pieces[part], destination_pieces=plan.destination_pieces[part])


def _block_addresses(bound: BoundLayout, ids: IdArray) -> AddressArray:
    addresses: AddressArray = ids.astype(np.uint64) * np.uint64(bound.layout.strides.block)
    addresses += np.uint64(bound.addresses[0])
    return addresses


def _regions(bound: BoundLayout, layers: range) -> AddressArray:
    """Give what each (layer, outer) adds to the address of a block, modulo 2**64: buffers lie in any order."""
    layout = bound.layout
    starts = np.array(
        [
            (bound.addresses[layer] - bound.addresses[0] if layout.has_layer_buffers else layer * layout.strides.layer)
            % 2**64
            for layer in layers
        ],
        dtype=np.uint64,
    )
    outers = np.arange(layout.outer_dim, dtype=np.uint64) * np.uint64(layout.strides.outer)
    regions: AddressArray = np.add.outer(starts, outers)
    return regions.ravel()
