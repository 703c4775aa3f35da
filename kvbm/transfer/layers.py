"""Copies layer by layer: compute on the first while the rest is on its way, or offload each as soon as it is written.

Works with either engine, so what connects an inference engine looks the same with and without a GPU. A checksum covers
a whole block, so it is compared when the last layer is there: what was computed before is good only if the result says
so.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.errors import ConfigError, LayoutError, TransferError, length_mismatch
from kvbm.gpu import as_stream
from kvbm.jobs import Transfer
from kvbm.storage.base import Storage
from kvbm.transfer.engine import CopyResult, TransferEngine
from kvbm.transfer.gpu_copy import checksum_on_device, conclude
from kvbm.transfer.gpu_engine import GpuTransferEngine
from kvbm.transfer.lanes import Submission
from kvbm.transfer.queueing import Checksums, Queueing, layer_plan
from kvbm.transfer.sides import Side, are_pinned, direction_of, memory_of, streams_of
from kvbm.types import HashArray, IdArray, hash_array

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream


class LayerTransfer(ABC):
    """A copy whose layers can be waited for, or told, one by one.

    Attributes
    ----------
    transfer : Transfer
        Of the whole: a `CopyResult` once every layer has landed and the checksums were compared.
    num_layers : int
    """

    def __init__(self, num_layers: int, deadline_s: float | None) -> None:
        self.num_layers = num_layers
        self.transfer: Transfer[CopyResult] = Transfer(deadline_s=deadline_s)
        self._lock = threading.RLock()  # a callback of the transfer may come back
        self._is_written = [False] * num_layers
        self._has_ended = False  # the last part was submitted

    @abstractmethod
    def wait_layer(self, layer: int, stream: Any = None) -> None:
        """Wait for a layer.

        Parameters
        ----------
        layer : int
        stream : object, optional
            Anything that `kvbm.gpu.stream_handle` takes but None: what is queued on it from now on waits. None: the
            caller waits.

        Raises
        ------
        LayoutError
            There is no such layer.
        ConfigError
            It was not said to be written yet, so nothing is under way.
        TransferError
            Its copy failed.
        """

    @abstractmethod
    def _copy_layer(self, layer: int, stream: Any) -> None:
        """Begin the copy of a layer; called once for each, under the lock."""

    @abstractmethod
    def _finish(self, is_whole: bool) -> None:
        """Queue what follows the last layer; called once, under the lock."""

    def layer_written(self, layer: int, stream: Any = None) -> None:
        """Say that a layer of the source is written, in any order; its copy begins.

        Parameters
        ----------
        layer : int
        stream : object, optional
            The stream that writes it: the copy waits for what is queued there by now. None takes the streams that the
            storage has attached.

        Raises
        ------
        LayoutError
            There is no such layer.
        ConfigError
            It was said before.
        CudaError, PoolClosed
            Its copy could not be begun; the layer counts as not written.

        Notes
        -----
        Does nothing once the transfer has ended, e.g. by its deadline. Stream-ordered.
        """
        self._check(layer)
        with self._lock:
            if self._is_written[layer]:
                raise ConfigError(f"layer {layer} was said to be written before")
            self._is_written[layer] = True
            if self._has_ended:
                return
            if self.transfer.done():
                self._end(is_whole=False)
                return
            try:
                self._copy_layer(layer, stream)
            except BaseException:  # nothing is under way: it may be said again
                self._is_written[layer] = False
                raise
            if all(self._is_written):
                self._end(is_whole=True)

    def cancel(self) -> bool:
        """End it for its waiter; layers that were not said to be written are not copied. False when it had ended."""
        is_first = self.transfer.cancel()
        with self._lock:
            if not self._has_ended:
                self._end(is_whole=False)
        return is_first

    def _end(self, *, is_whole: bool) -> None:
        self._has_ended = True
        self._finish(is_whole)

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise LayoutError(f"layer {layer} is outside 0..{self.num_layers - 1}")


def submit_layers(
    engine: GpuTransferEngine | TransferEngine,
    source: Storage,
    destination: Storage,
    source_ids: IdArray,
    destination_ids: IdArray,
    *,
    hashes: HashArray | None = None,
    deadline_s: float | None = None,
    is_urgent: bool = True,
    when_written: bool = False,
    wait_for: Iterable[Any] = (),
) -> LayerTransfer:
    """Copy blocks pairwise, layer by layer.

    Parameters
    ----------
    engine : GpuTransferEngine or TransferEngine
        The latter copies in the caller's thread.
    source, destination, source_ids, destination_ids, hashes, deadline_s, is_urgent
        As for `GpuTransferEngine.copy`.
    when_written : bool
        Each layer is copied when `LayerTransfer.layer_written` says so; otherwise all are, the first one first.
    wait_for : iterable of streams and events
        What the first layer waits for, where nothing says that layers are written.

    Returns
    -------
    LayerTransfer

    Raises
    ------
    LayoutError, ConfigError, PoolClosed
        As `GpuTransferEngine.copy`.
    """

    def _sides() -> tuple[Side, Side]:  # once the ids were checked
        return Side(source, source_ids), Side(destination, destination_ids)

    is_gpu = source.capabilities.is_gpu or destination.capabilities.is_gpu
    held = [memory_of(source), memory_of(destination)]  # a storage may be closed meanwhile
    copied: LayerTransfer
    if isinstance(engine, GpuTransferEngine) and is_gpu:
        plan, names = engine.plan(source, destination, source_ids, destination_ids, hashes)
        copied = _GpuLayers(
            engine, plan, _sides(), names, held=held, deadline_s=deadline_s, is_urgent=is_urgent, waits=list(wait_for)
        )
    else:
        if list(wait_for):
            raise ConfigError("wait_for orders copies of a GPU, and neither storage is on one")
        host = engine if isinstance(engine, TransferEngine) else engine.host_engine
        plan = plan_copy(source.bound, destination.bound, source_ids, destination_ids)
        names = None if hashes is None else hash_array(hashes)
        if names is not None and len(names) != plan.num_blocks:
            raise length_mismatch("hashes", len(names), plan.num_blocks)
        copied = _HostLayers(host, plan, _sides(), names, held=held, deadline_s=deadline_s)
    if destination.keeps_checksums:
        destination.has_checksum[np.asarray(destination_ids)] = False
    if not when_written:
        for layer in range(copied.num_layers):
            copied.layer_written(layer)
    return copied


class _GpuLayers(LayerTransfer):
    """Layers on a lane: a submission each, and one that compares the checksums."""

    def __init__(
        self,
        engine: GpuTransferEngine,
        plan: CopyPlan,
        sides: tuple[Side, Side],
        names: HashArray | None,
        *,
        held: list[Any],
        deadline_s: float | None,
        is_urgent: bool,
        waits: list[Any],
    ) -> None:
        super().__init__(sides[0].storage.layout.num_layers, deadline_s)
        self._engine = engine
        self._plan = plan
        self._source, self._destination = sides
        self._direction = direction_of(*sides)
        self._lane = engine.lane_of(self._direction, is_urgent)
        self._is_pinned = are_pinned(*sides)
        self._names = names
        self._held = held
        self._waits = waits  # until the first layer is queued
        self._submissions: dict[int, Submission] = {}

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        self._check(layer)
        submission = self._submissions.get(layer)
        if submission is None:
            raise ConfigError(
                f"layer {layer} was not said to be written, or the transfer had ended: nothing is under way"
            )
        if stream is not None and submission.event is not None:
            as_stream(self._engine.gpu, stream).wait(submission.event)
            return
        submission.wait()
        if (error := self._first_error()) is not None:
            raise self._engine.failure(self._plan.num_blocks, error)

    def _copy_layer(self, layer: int, stream: Any) -> None:
        plan = layer_plan(self._plan, range(layer, layer + 1), self.num_layers)
        owners = [*streams_of(self._source), *streams_of(self._destination)] if stream is None else [stream]
        parts = self._begin()
        parts.wait_for([*owners, *self._waits])

        def queue(own: Stream, fence: Event) -> Event | None:
            parts.begin(fence)
            if self._plan.kind == "permute" and self._is_pinned:
                parts.permute(own, self._source, self._destination, range(layer, layer + 1))
            elif plan.num_blocks:
                sides = self._source, self._destination
                parts.copy(own, plan, sides, is_pinned=self._is_pinned, hashes=None)
            return parts.event

        def finish(error: Exception | None) -> None:
            self._engine.release(parts)

        # The last submission brings the lane's thread to all of them: one waking instead of one a layer.
        self._submissions[layer] = self._engine.submit(self._lane, queue, finish, hands_over=False)
        self._waits = []

    def _finish(self, is_whole: bool) -> None:
        source, destination, names = self._source, self._destination, self._names
        parts = self._begin()
        found: list[Checksums] = []

        def queue(own: Stream, fence: Event) -> None:
            parts.begin(fence)
            if not is_whole or names is None or not len(names):
                return
            found.append(checksum_on_device(own, parts, source, destination, names))
            if self._plan.kind == "permute" and destination.storage.keeps_checksums:
                found.append(checksum_on_device(own, parts, destination, source, names))

        def finish(error: Exception | None) -> None:
            result = None
            failed = error or self._first_error()
            if failed is None and is_whole:
                first, last = (found[0], found[-1]) if found else (None, None)
                result = conclude(self._plan, source, destination, first, last)
            self._engine.release(parts)
            if failed is not None:
                self.transfer.set_exception(self._engine.failure(self._plan.num_blocks, failed))
            elif result is not None:
                self.transfer.set_result(result)
            else:
                self.transfer.set_landed()

        try:
            self._engine.submit(self._lane, queue, finish)
        except Exception as error:  # closed, or no stream left: the layers end by themselves, and this without a lane
            for submission in self._submissions.values():
                submission.wait()
            finish(error)

    def _first_error(self) -> Exception | None:
        submissions = list(self._submissions.values())
        return next((one.error for one in submissions if one.error is not None), None)

    def _begin(self) -> Queueing:
        parts = self._engine.queueing(self._lane)
        parts.held += self._held
        return parts


class _HostLayers(LayerTransfer):
    """Layers in the caller's thread."""

    def __init__(
        self,
        engine: TransferEngine,
        plan: CopyPlan,
        sides: tuple[Side, Side],
        names: HashArray | None,
        *,
        held: list[Any],
        deadline_s: float | None,
    ) -> None:
        super().__init__(sides[0].storage.layout.num_layers, deadline_s)
        self._engine = engine
        self._plan = plan
        self._names = names
        self._source, self._destination = sides
        self._held = held
        self._error: Exception | None = None

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        self._check(layer)
        if self._error is not None:
            raise TransferError(f"the copy of {self._plan.num_blocks} blocks failed: {self._error}") from self._error
        if not self._is_written[layer]:
            raise ConfigError(
                f"layer {layer} was not said to be written, or the transfer had ended: nothing is under way"
            )

    def _copy_layer(self, layer: int, stream: Any) -> None:
        try:
            self._engine.copy_pieces(layer_plan(self._plan, range(layer, layer + 1), self.num_layers))
        except Exception as error:
            self._error = self._error or error

    def _finish(self, is_whole: bool) -> None:
        found, kept = None, None
        if is_whole and self._names is not None and self._error is None:
            found = self._engine.compute_checksums(self._source.storage, self._source.ids, self._names)
            if self._plan.kind == "permute":
                kept = self._engine.compute_checksums(self._destination.storage, self._destination.ids, self._names)
        if self._error is not None:
            failure = TransferError(f"the copy of {self._plan.num_blocks} blocks failed: {self._error}")
            failure.__cause__ = self._error
            self.transfer.set_exception(failure)
        elif is_whole:
            self.transfer.set_result(conclude(self._plan, self._source, self._destination, found, kept))
        else:
            self.transfer.set_landed()
        self._held = []
