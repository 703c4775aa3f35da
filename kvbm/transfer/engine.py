"""TransferEngine: executes copy plans on worker threads, checksums fused with the copy.

Small copies run in the caller's thread, because a hand-over between threads costs about 70 us. The queue is bounded:
submitting waits for room. A copy that fails is stored in its Transfer, and the workers go on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.errors import ConfigError, PoolClosed, TransferError, TransferTimeout, length_mismatch
from kvbm.jobs import Transfer
from kvbm.storage.base import Storage
from kvbm.types import HashArray, IdArray, hash_array

_log = logging.getLogger("kvbm.transfer")


@dataclass(frozen=True)
class CopyResult:
    """What a copy did.

    Attributes
    ----------
    num_blocks, nbytes : int
    good : (num_blocks,) bool
        False where the bytes did not match the checksum that the source kept: do not use that copy.
    """

    num_blocks: int
    nbytes: int
    good: npt.NDArray[np.bool_]


class TransferEngine:
    """Copies blocks between storages that have addresses.

    Parameters
    ----------
    num_threads : int
        Threads that share one copy; 0 takes the machine's cores, at most 4.
    num_workers : int
        Copies that run at once.
    small_nbytes : int
        Copies up to this size run in the caller's thread.
    queue_size : int
        Copies that may wait.
    backend : Backend, optional
    """

    def __init__(
        self,
        *,
        num_threads: int = 0,
        num_workers: int = 1,
        small_nbytes: int = 1 << 20,
        queue_size: int = 64,
        backend: Backend | None = None,
    ) -> None:
        if num_threads < 0 or num_workers < 1 or queue_size < 1:
            raise ConfigError(
                f"a transfer engine needs num_threads >= 0, num_workers >= 1 and queue_size >= 1, got {num_threads}, "
                f"{num_workers} and {queue_size}"
            )
        self._backend = backend or default_backend()
        self.num_threads = num_threads or min(4, os.cpu_count() or 1)
        self._small_nbytes = small_nbytes
        self._queue_size = queue_size
        self._waiting: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # guards what is waiting, the workers, and closing; never held while copying
        self._has_work = threading.Condition(self._lock)
        self._has_room = threading.Condition(self._lock)
        self._workers: list[threading.Thread] = []
        self._num_workers = num_workers
        self._is_closed = False

    def copy(
        self,
        source: Storage,
        destination: Storage,
        source_ids: IdArray,
        destination_ids: IdArray,
        *,
        hashes: HashArray | None = None,
        deadline_s: float | None = None,
    ) -> Transfer[CopyResult]:
        """Copy blocks pairwise.

        Parameters
        ----------
        source, destination : Storage
            Both with addresses; other memory, or blocks that do not overlap.
        source_ids, destination_ids : (num_blocks,) int32
        hashes : (num_blocks, 2) uint64, optional
            Sequence hashes. With them checksums are computed on the way, compared with those that the source keeps,
            and kept by the destination.
        deadline_s : float, optional
            Seconds from now after which the transfer ends for its waiter; a copy that has not begun by then is dropped.

        Returns
        -------
        Transfer
            Of a `CopyResult`; done already when the copy was small.

        Raises
        ------
        LayoutError
            The storages hold different blocks, or an id is wrong. Nothing was copied.
        PoolClosed
            The engine is closed.

        Notes
        -----
        Waits for room while the queue is full. A failure while bytes move is the transfer's `TransferError`.
        """
        if self._is_closed:
            raise PoolClosed("the transfer engine is closed")
        # A storage may be closed meanwhile; its memory must stay until the bytes have landed.
        held = [getattr(storage, "buffers", None) for storage in (source, destination)]
        plan = plan_copy(source.bound, destination.bound, source_ids, destination_ids)
        names = None if hashes is None else hash_array(hashes)
        if names is not None and len(names) != plan.num_blocks:
            raise length_mismatch("hashes", len(names), plan.num_blocks)
        transfer: Transfer[CopyResult] = Transfer(deadline_s=deadline_s)
        # Ids are copied: the caller may reuse its arrays while the copy waits.
        origin = source, np.array(source_ids, dtype=np.int32)
        target = destination, np.array(destination_ids, dtype=np.int32)

        def run() -> None:
            if transfer.done():  # cancelled or timed out while it waited: no byte has moved
                transfer.set_landed()
                return
            try:
                transfer.set_result(self._execute(plan, origin, target, names))
            except BaseException as error:
                _log.error("copy failed num_blocks=%d error=%r", plan.num_blocks, error)
                failure = TransferError(f"the copy of {plan.num_blocks} blocks failed: {error}")
                failure.__cause__ = error
                transfer.set_exception(failure)
                if not isinstance(error, Exception):  # ctrl-C in the caller's thread
                    raise
            finally:
                held.clear()

        if plan.nbytes <= self._small_nbytes:
            run()
        else:
            self._submit(run)
        return transfer

    def compute_checksums(self, storage: Storage, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.uint64]:
        """Compute the checksums of blocks where they lie, in the storage's own order: (num_blocks,) uint64."""
        held = getattr(storage, "buffers", None)  # as in `copy`
        bound = storage.bound
        plan = plan_copy(bound, bound, block_ids, block_ids)
        checksums = self._backend.checksum_blocks(
            plan.source_blocks, plan.source_pieces, plan.piece_nbytes, hash_array(hashes), num_threads=self.num_threads
        )
        del held
        return checksums

    def copy_pieces(self, plan: CopyPlan) -> None:
        """Execute a plan in the caller's thread, without checksums; the caller sees to the memory's life."""
        if plan.num_blocks:
            self._backend.copy_blocks(
                plan.source_blocks,
                plan.destination_blocks,
                plan.source_pieces,
                plan.destination_pieces,
                plan.piece_nbytes,
                num_threads=self.num_threads,
            )

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted and stop the workers; may be called again.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; None waits for as long as it takes.

        Raises
        ------
        TransferTimeout
            Copies still run; nothing new is taken, and closing again waits for them again.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            # A callback of a transfer may close the engine from a worker, which cannot wait for itself.
            workers = [worker for worker in self._workers if worker is not threading.current_thread()]
            self._has_work.notify_all()
            self._has_room.notify_all()
        for worker in workers:
            worker.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
        if num_running := sum(worker.is_alive() for worker in workers):
            raise TransferTimeout(f"{num_running} workers still copy after {timeout} s")
        with self._lock:
            self._workers = []

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, run: Callable[[], None]) -> None:
        with self._lock:
            self._has_room.wait_for(lambda: self._is_closed or len(self._waiting) < self._queue_size)
            if self._is_closed:
                raise PoolClosed("the transfer engine is closed")
            if len(self._workers) < self._num_workers:
                worker = threading.Thread(target=self._work, name="kvbm-transfer", daemon=True)
                worker.start()
                self._workers.append(worker)
            self._waiting.append(run)
            self._has_work.notify()

    def _work(self) -> None:
        while True:
            with self._has_work:
                self._has_work.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                run = self._waiting.popleft()
                self._has_room.notify()
            run()

    def _execute(
        self,
        plan: CopyPlan,
        origin: tuple[Storage, IdArray],
        target: tuple[Storage, IdArray],
        names: HashArray | None,
    ) -> CopyResult:
        (source, from_ids), (destination, to_ids) = origin, target
        good = np.ones(plan.num_blocks, dtype=np.bool_)
        if destination.keeps_checksums:
            destination.has_checksum[to_ids] = False
        checksums = None
        if plan.num_blocks:
            checksums = self._backend.copy_blocks(
                plan.source_blocks,
                plan.destination_blocks,
                plan.source_pieces,
                plan.destination_pieces,
                plan.piece_nbytes,
                hashes=names,
                num_threads=self.num_threads,
            )
        if checksums is not None and names is not None:
            # The pieces stand in the source's logical order, so these are the checksums that the source keeps.
            if source.keeps_checksums:
                good = ~source.has_checksum[from_ids] | (source.checksums[from_ids] == checksums)
            if destination.keeps_checksums:
                if plan.kind == "permute":
                    checksums = self.compute_checksums(destination, to_ids, names)
                destination.checksums[to_ids[good]] = checksums[good]
                destination.has_checksum[to_ids[good]] = True
        return CopyResult(plan.num_blocks, plan.nbytes, good)
