"""TransferEngine: executes copy plans on worker threads, checksums fused with the copy.

Small copies run in the caller's thread, because a hand-over between threads costs about 70 us. The queue is bounded:
submitting waits for room. A copy that fails is stored in its Transfer, and the workers go on.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.copyplan import CopyPlan, plan_copy
from kvbm.errors import HashFormatError, PoolClosed, TransferError, length_mismatch
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
        self._backend = backend or default_backend()
        self._num_threads = num_threads or min(4, os.cpu_count() or 1)
        self._small_nbytes = small_nbytes
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(queue_size)
        self._lock = threading.Lock()  # start and close
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
        """
        if self._is_closed:
            raise PoolClosed("the transfer engine is closed")
        plan = plan_copy(source.bound, destination.bound, source_ids, destination_ids)
        names = None if hashes is None else hash_array(hashes)
        if names is not None and len(names) != plan.num_blocks:
            raise length_mismatch("hashes", len(names), plan.num_blocks)
        if names is not None and plan.kind == "permute":
            raise HashFormatError("a copy that reorders tokens and heads keeps no checksum yet: give no hashes")
        transfer: Transfer[CopyResult] = Transfer()

        def run() -> None:
            try:
                transfer.set_result(self._execute(plan, (source, source_ids), (destination, destination_ids), names))
            except BaseException as error:
                _log.error("copy failed num_blocks=%d error=%r", plan.num_blocks, error)
                failure = TransferError(f"the copy of {plan.num_blocks} blocks failed: {error}")
                failure.__cause__ = error
                transfer.set_exception(failure)

        if plan.nbytes <= self._small_nbytes:
            run()
        else:
            self._submit(run)
        return transfer

    def close(self) -> None:
        """Finish what was submitted and stop the workers; may be called twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            workers, self._workers = self._workers, []
        for _ in workers:
            self._queue.put(None)
        for worker in workers:
            worker.join()

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, run: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise PoolClosed("the transfer engine is closed")
            if len(self._workers) < self._num_workers:
                worker = threading.Thread(target=self._work, name="kvbm-transfer", daemon=True)
                worker.start()
                self._workers.append(worker)
            self._queue.put(run)

    def _work(self) -> None:
        while (run := self._queue.get()) is not None:
            run()

    def _execute(
        self,
        plan: CopyPlan,
        origin: tuple[Storage, IdArray],
        target: tuple[Storage, IdArray],
        names: HashArray | None,
    ) -> CopyResult:
        source, from_ids = origin[0], np.asarray(origin[1])
        destination, to_ids = target[0], np.asarray(target[1])
        good = np.ones(plan.num_blocks, dtype=np.bool_)
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
                num_threads=self._num_threads,
            )
        if checksums is not None:
            good = ~source.has_checksum[from_ids] | (source.checksums[from_ids] == checksums)
            destination.checksums[to_ids[good]] = checksums[good]
            destination.has_checksum[to_ids[good]] = True
        return CopyResult(plan.num_blocks, plan.nbytes, good)
