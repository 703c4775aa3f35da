"""GpuTransferEngine: executes copy plans on a GPU's streams, checksums computed on the device in the same submission.

One submission a batch and direction. Three lanes, each a stream and a thread that sleeps: down, up, and expedited. What
moves is held until the device is done with it. After an error that sticks the engine takes nothing more: the process
must be started again to use the GPU.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.errors import ConfigError, LayoutError, PoolClosed, TransferError, TransferTimeout, length_mismatch
from kvbm.gpu import Gpu, as_stream
from kvbm.jobs import Transfer
from kvbm.storage.base import Storage
from kvbm.transfer.choose import PathTable
from kvbm.transfer.engine import CopyResult, TransferEngine
from kvbm.transfer.gpu_copy import CopyJob
from kvbm.transfer.lanes import Lane, Submission
from kvbm.transfer.queueing import Checksums, GpuMeans, Queueing, StagingMemory
from kvbm.transfer.routes import Route, RouteCache
from kvbm.transfer.scratch import ScratchPool
from kvbm.transfer.sides import Side, memory_of, streams_of
from kvbm.transfer.waiting import LaneTransfer
from kvbm.types import HashArray, IdArray, hash_array

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream

_log = logging.getLogger("kvbm.transfer")


class GpuTransferEngine:
    """Copies blocks between GPU memory and host memory, and within the GPU.

    Parameters
    ----------
    gpu : Gpu
    host_engine : TransferEngine, optional
        Copies between memories of the host; stays the caller's. None makes one when it is needed.
    table : PathTable, optional
        Crossovers; None takes what `kvbm tune` measured on this machine, else the built-in ones.
    num_thread_blocks : int
        Thread blocks of a kernel at most: what copies take from the work of others. 0 takes a few.
    staging_nbytes : int
        Device memory of each lane through which it gathers and scatters; made when first needed.
    max_in_flight : int
        Submissions of each lane that may be under way; who submits more waits.
    has_threads : bool
        False: nobody finishes transfers but `settle` and those who wait for them. For tests that advance a simulation.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        host_engine: TransferEngine | None = None,
        table: PathTable | None = None,
        num_thread_blocks: int = 0,
        staging_nbytes: int = 64 << 20,
        max_in_flight: int = 64,
        has_threads: bool = True,
    ) -> None:
        if num_thread_blocks < 0 or staging_nbytes < 1:
            raise ConfigError(
                "a GPU's transfer engine needs num_thread_blocks >= 0 and staging_nbytes >= 1, got "
                f"{num_thread_blocks} and {staging_nbytes}"
            )
        if table is None:
            from kvbm.transfer.tuning import load_table  # reads a file

            table = load_table(gpu)
        self.gpu = gpu
        self._host = host_engine
        self._own_host: TransferEngine | None = None
        self.means = GpuMeans(gpu, table, ScratchPool(gpu), num_thread_blocks, staging_nbytes)
        self.means.scratch.prepare()  # now, so that no transfer waits for it
        self._routes = RouteCache(self.means)
        least, greatest = gpu.device.priorities
        # Decoding runs at the default priority, 0 or thereabouts: what waits for a prefill may go before it.
        priorities = {"down": least, "up": least, "expedited": greatest}
        self._lanes = {
            name: Lane(
                gpu,
                name,
                priority=priority,
                max_in_flight=max_in_flight,
                has_thread=has_threads,
                on_lost=self._lose,
            )
            for name, priority in priorities.items()
        }
        self._staging = {name: StagingMemory(gpu, staging_nbytes) for name in priorities}
        self._lost: Exception | None = None  # why the device does nothing more
        self._is_closed = False

    # -- copies ------------------------------------------------------------------------------------------------

    def copy(
        self,
        source: Storage,
        destination: Storage,
        source_ids: IdArray,
        destination_ids: IdArray,
        *,
        hashes: HashArray | None = None,
        deadline_s: float | None = None,
        is_urgent: bool = False,
        wait_for: Iterable[Any] = (),
        then: Iterable[Any] = (),
    ) -> Transfer[CopyResult]:
        """Copy blocks pairwise; arguments as for `TransferEngine.copy`, and these.

        Parameters
        ----------
        source, destination : Storage
            With addresses; where neither is on a GPU the host's engine copies.
        source_ids, destination_ids : (num_blocks,) int32
        hashes : (num_blocks, 2) uint64, optional
        deadline_s : float, optional
            Seconds from now after which the transfer ends for its waiter; its blocks drain until they have landed.
        is_urgent : bool
            Take the expedited lane; down always has its own.
        wait_for : iterable of streams and events
            The copy waits for what is queued on them by now, e.g. the forward pass that writes the blocks; beside the
            streams that a `CudaStorage` has attached.
        then : iterable of streams
            What is queued on them from now on waits for the copy. It does not wait for the checksums to be compared:
            look at the result before what was computed is used.

        Returns
        -------
        Transfer
            Of a `CopyResult`. It fails with `TransferError`, whose cause is the CUDA error.

        Raises
        ------
        LayoutError
            The storages hold different blocks, or an id is wrong. Nothing was copied.
        ConfigError
            `wait_for` or `then` hold something else, or neither storage is on a GPU and they hold something.
        PoolClosed
            The engine is closed.

        Notes
        -----
        Stream-ordered: returns as soon as the copy is queued. Waits for room while too much is under way, and for host
        memory that is still being pinned. Who then waits without a limit finishes the transfer in his own thread;
        otherwise the lane's does, once somebody looks at the transfer or lets go of it.
        """
        waits, followers = list(wait_for), list(then)
        if not (source.capabilities.is_gpu or destination.capabilities.is_gpu):
            if waits or followers:
                raise ConfigError("wait_for and then order copies of a GPU, and neither storage is on one")
            return self.host_engine.copy(
                source, destination, source_ids, destination_ids, hashes=hashes, deadline_s=deadline_s
            )
        streams = [as_stream(self.gpu, stream) for stream in followers]
        held = [memory_of(source), memory_of(destination)]  # a storage may be closed meanwhile
        route = self._route(source, destination)
        plan = route.plan(source_ids, destination_ids)
        names = _names_for(plan, hashes)
        origin, target = Side(source, source_ids), Side(destination, destination_ids)
        if destination.keeps_checksums:
            destination.has_checksum[target.ids] = False
        if not plan.num_blocks:
            return Transfer.completed(CopyResult(0, 0, np.ones(0, dtype=np.bool_)))
        job = CopyJob(plan, origin, target, names, route)
        return self._submit_copy(job, held, deadline_s=deadline_s, is_urgent=is_urgent, waits=waits, followers=streams)

    def compute_checksums(self, storage: Storage, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.uint64]:
        """Compute the checksums of blocks where they lie, in the storage's own order: (num_blocks,) uint64; waits."""
        if not storage.capabilities.is_gpu:
            return self.host_engine.compute_checksums(storage, block_ids, hashes)
        held = memory_of(storage)
        plan = plan_copy(storage.bound, storage.bound, block_ids, block_ids)
        names, side = hash_array(hashes), Side(storage, block_ids)
        if not plan.num_blocks:
            return np.empty(0, dtype=np.uint64)
        transfer: Transfer[npt.NDArray[np.uint64]] = Transfer()
        parts = self.queueing("down")
        parts.held.append(held)
        parts.wait_for(streams_of(side))
        found: list[Checksums] = []

        def queue(stream: Stream, fence: Event) -> None:
            parts.begin(fence)
            found.append(parts.checksum(stream, plan.source_blocks, plan.source_pieces, plan.piece_nbytes, names))

        def finish(error: Exception | None) -> None:
            if error is None:
                transfer.set_result(found[0].copy())
            self.release(parts)
            if error is not None:
                transfer.set_exception(self.failure(plan.num_blocks, error))

        submission = self.submit("down", queue, finish, hands_over=False)
        try:
            submission.wait()
        finally:
            submission.hand_over()
        return transfer.result()

    # -- for copies by layers, and for ourselves ---------------------------------------------------------------

    def plan(
        self, source: Storage, destination: Storage, source_ids: IdArray, destination_ids: IdArray, hashes: Any
    ) -> tuple[CopyPlan, HashArray | None]:
        """Check everything that `copy` refuses before a byte moves."""
        plan = self._route(source, destination).plan(source_ids, destination_ids)
        return plan, _names_for(plan, hashes)

    def queueing(self, lane: str) -> Queueing:
        """Begin a submission for a lane."""
        return Queueing(self.means, self._staging[lane])

    def lane_of(self, direction: str, is_urgent: bool) -> str:
        """Give the lane of a copy."""
        return "down" if direction == "down" else "expedited" if is_urgent else "up"

    def submit(self, lane: str, queue: Any, finish: Any, **arguments: Any) -> Submission:
        """Queue on a lane; arguments as for `Lane.submit`."""
        return self._lanes[lane].submit(queue, finish, **arguments)

    def release(self, parts: Queueing) -> None:
        """Give a submission's scratch back, unless nobody knows any more what the device does with it."""
        if self._lost is None:
            parts.give_back()

    def failure(self, num_blocks: int, error: Exception) -> TransferError:
        """Make what a transfer ends with."""
        _log.error("copy failed num_blocks=%d error=%r", num_blocks, error)
        failure = TransferError(f"the copy of {num_blocks} blocks failed: {error}")
        failure.__cause__ = error
        return failure

    @property
    def lost_reason(self) -> Exception | None:
        """Why the device does nothing more; None while it works."""
        return self._lost

    @property
    def num_in_flight(self) -> int:
        """Submissions that are not finished."""
        return sum(lane.num_in_flight for lane in self._lanes.values())

    def settle(self) -> int:
        """Finish what the device is done with, in the caller's thread; return how many submissions that were."""
        return sum(lane.settle() for lane in self._lanes.values())

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted and let go of streams and memory; may be called again.

        Raises
        ------
        TransferTimeout
            Copies still run; nothing new is taken, and closing again waits for them again.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        self._is_closed = True
        late: TransferTimeout | None = None
        for lane in self._lanes.values():
            try:
                lane.close(None if give_up is None else max(0.0, give_up - time.monotonic()))
            except TransferTimeout as error:
                late = late or error
        if self._own_host is not None:
            self._own_host.close(timeout)
        if late is not None:
            raise late
        self.means.scratch.close()

    def __enter__(self) -> GpuTransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _route(self, source: Storage, destination: Storage) -> Route:
        """Give the route between two storages, having checked that this engine may move bytes there."""
        if self._is_closed:
            raise PoolClosed("the GPU's transfer engine is closed")
        route = self._routes.between(source.bound, destination.bound)
        for storage in (source, destination):
            if storage.capabilities.is_gpu and getattr(storage, "gpu", None) is not self.gpu:
                raise LayoutError(
                    f"{storage!r} lies on another GPU than this engine moves for ({self.gpu.device.name})"
                )
        return route

    def _submit_copy(
        self,
        job: CopyJob,
        held: list[Any],
        *,
        deadline_s: float | None,
        is_urgent: bool,
        waits: list[Any],
        followers: list[Stream],
    ) -> Transfer[CopyResult]:
        num_blocks = job.plan.num_blocks
        transfer = LaneTransfer(deadline_s)
        if self._lost is not None:
            transfer.set_exception(self.failure(num_blocks, self._lost))
            return transfer
        lane = self.lane_of(job.direction, is_urgent)
        parts = self.queueing(lane)
        parts.held += held
        parts.wait_for([*streams_of(job.source), *streams_of(job.destination), *waits])
        owner = weakref.ref(transfer)

        def queue(stream: Stream, fence: Event) -> Event | None:
            parts.begin(fence)
            job.queue(stream, parts)
            return parts.event

        def finish(error: Exception | None) -> None:
            result = None
            if error is None:
                try:
                    result = job.conclude()
                except Exception as trouble:
                    error = trouble
            self.release(parts)
            failure = None if error is None else self.failure(num_blocks, error)
            if (told := owner()) is not None:  # else nobody is left who could ask
                told.end(result, failure)

        transfer.begin(self.submit(lane, queue, finish, followers=followers, hands_over=False, owner=transfer))
        return transfer

    @property
    def host_engine(self) -> TransferEngine:
        """The engine that copies between memories of the host."""
        if self._host is not None:
            return self._host
        if self._own_host is None:
            self._own_host = TransferEngine()
        return self._own_host

    def _lose(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = error
            _log.error("GPU lost device=%s error=%s; start the process again to use it", self.gpu.device.name, error)


def _names_for(plan: CopyPlan, hashes: Any) -> HashArray | None:
    """Check the sequence hashes of the blocks of a plan, where there are any."""
    if hashes is None:
        return None
    names = hash_array(hashes)
    if len(names) != plan.num_blocks:
        raise length_mismatch("hashes", len(names), plan.num_blocks)
    return names
