"""The threads of a disk storage: batches in, a mask out, reads before writes.

A batch is cut into pieces, runs of adjacent slots that one call moves; threads take pieces. One lock guards the queue
and the counters, and is never held while bytes move. Waking goes through a `SimpleQueue`, so that a finaliser, which
must not take a lock, can stop the threads. The last thread to leave closes the files.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections import deque

import numpy as np
import numpy.typing as npt

from kvbm.errors import PoolClosed, StorageError, TransferTimeout
from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.counters import DiskCounters, DiskTally
from kvbm.storage.disk.mover import Batch, BlockMover, Piece
from kvbm.storage.disk.slab import Slab
from kvbm.types import IdArray

_log = logging.getLogger("kvbm.storage.disk")

_READS_IN_A_ROW = 16  # then a waiting write goes, so that writes do not wait for ever


class DiskEngine:
    """Moves blocks between a data file and memory.

    Parameters
    ----------
    files : Slab
        Closed by the engine when its last thread leaves.
    block_nbytes, slot_nbytes : int
    num_threads : int
        Started as they are needed.
    max_queued_nbytes : int
        Bytes of reads, and as many of writes, that may wait or move; a batch larger than that goes alone.
    os_calls : OsCalls
    """

    def __init__(
        self,
        files: Slab,
        *,
        block_nbytes: int,
        slot_nbytes: int,
        num_threads: int,
        max_queued_nbytes: int,
        os_calls: OsCalls,
    ) -> None:
        self._tally = DiskTally(files.path, block_nbytes)
        self._files = files
        self._mover = BlockMover(files, block_nbytes=block_nbytes, slot_nbytes=slot_nbytes, os_calls=os_calls)
        self._num_threads = num_threads
        self._max_queued_nbytes = max_queued_nbytes
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: a piece waits; False: one thread leaves
        self._waiting: dict[bool, deque[Piece]] = {True: deque(), False: deque()}  # by is_read
        self._queued_nbytes = {True: 0, False: 0}  # waiting or moving
        self._num_reads_in_a_row = 0
        self._threads: list[threading.Thread] = []
        self._num_running = 0
        self._is_closing = False

    @property
    def counters(self) -> DiskCounters:
        """What was done so far; the live object."""
        return self._tally.counters

    @property
    def is_worker(self) -> bool:
        """Whether the caller is one of the threads: it must not wait for them."""
        return threading.current_thread() in self._threads

    def submit(self, is_read: bool, ids: IdArray, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> Batch:
        """Queue a batch that was checked; waits for room, except in a thread of the engine."""
        batch = Batch(is_read, ids, memory, rows)
        pieces = self._mover.cut(batch)
        batch.num_pieces_left = len(pieces)
        try:
            self._queue(is_read, pieces)
        except BaseException:  # ctrl-C: nobody will hear of this batch, so no more of it is to move
            batch.transfer.cancel()
            raise
        if not pieces:
            batch.transfer.set_result(batch.mask())
        return batch

    def close(self, timeout: float | None = None) -> None:
        """Let what was submitted end, and stop the threads; may be called again."""
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self.stop()
            self._has_room.notify_all()
        # A callback of a transfer may close the storage from a thread, which cannot wait for itself.
        threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in threads:
            thread.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
        if num_running := sum(thread.is_alive() for thread in threads):
            raise TransferTimeout(f"{num_running} threads still read or write after {timeout} s ({self._files.path})")

    def stop(self) -> None:
        """Ask the threads to leave when the queue is empty; takes no lock, for finalisers."""
        if self._is_closing:
            return
        self._is_closing = True
        for _ in self._threads:  # behind every piece that waits
            self._wake.put(False)
        if not self._threads:
            self._files.close()

    # -- the queue ---------------------------------------------------------------------------------------------

    def _queue(self, is_read: bool, pieces: list[Piece]) -> None:
        nbytes = sum(piece.nbytes for piece in pieces)
        with self._lock:
            if not self.is_worker:
                self._has_room.wait_for(lambda: self._is_closing or self._fits(is_read, nbytes))
            if self._is_closing:
                raise PoolClosed("DiskStorage is closed")
            self._start_threads(len(pieces))
            self._queued_nbytes[is_read] += nbytes
            self._waiting[is_read].extend(pieces)
            for _ in pieces:
                self._wake.put(True)

    def _fits(self, is_read: bool, nbytes: int) -> bool:
        queued = self._queued_nbytes[is_read]
        return not queued or queued + nbytes <= self._max_queued_nbytes

    def _start_threads(self, num_pieces: int) -> None:
        for _ in range(min(num_pieces, self._num_threads - len(self._threads))):
            thread = threading.Thread(target=self._work, name="kvbm-disk", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    return
                raise StorageError(errno.EAGAIN, f"cannot start a thread: {error}", str(self._files.path)) from error
            self._threads.append(thread)
            self._num_running += 1

    def _work(self) -> None:
        is_leaving = False
        while not is_leaving:
            is_leaving = not self._wake.get()
            while (piece := self._take()) is not None:  # all there is: a wake-up may have been lost to ctrl-C
                self._run(piece)
                del piece  # a thread that waits keeps nobody's memory
        with self._lock:
            self._num_running -= 1
            is_last = not self._num_running
        if is_last:
            self._files.close()

    def _run(self, piece: Piece) -> None:
        try:
            if not piece.batch.transfer.done():  # cancelled while it waited: no byte has moved
                self._mover.move(piece)
        except Exception as error:
            _log.exception("disk I/O failed in an unexpected way path=%s", self._files.path)
            places = range(piece.first, piece.last)
            for i in places:
                piece.batch.is_good[i] = False
            surprise = OSError(errno.EIO, f"{type(error).__name__}: {error}")
            piece.failures = [(i, surprise) for i in places]
        self._finish(piece)

    def _take(self) -> Piece | None:
        with self._lock:
            reads, writes = self._waiting[True], self._waiting[False]
            if reads and (self._num_reads_in_a_row < _READS_IN_A_ROW or not writes):
                self._num_reads_in_a_row += 1
                return reads.popleft()
            self._num_reads_in_a_row = 0
            return writes.popleft() if writes else None

    def _finish(self, piece: Piece) -> None:
        batch = piece.batch
        num_good = sum(batch.is_good[piece.first : piece.last])
        failures = [(batch.slots[i], error) for i, error in piece.failures]
        with self._lock:
            levels = self._tally.count(batch.is_read, num_good=num_good, num_calls=piece.num_calls, failures=failures)
            for _, error in failures:
                batch.error = batch.error or error
            self._queued_nbytes[batch.is_read] -= piece.nbytes
            batch.num_pieces_left -= 1
            is_over = not batch.num_pieces_left
            self._has_room.notify_all()
        self._tally.say(batch.is_read, levels, failures)
        if is_over:
            batch.transfer.set_result(batch.mask())
