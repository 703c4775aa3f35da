"""The disk engine over a native queue: a batch in, a mask out, the same promises as the engine of Python threads.

Python plans and ends batches, a few array operations each; the queue runs the operations without the GIL. One thread
waits for batches that have ended. Its lock guards the books, is never held while bytes move, and is taken before the
queue's own, which nothing holds while Python runs.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import PoolClosed, StorageError, TransferTimeout
from kvbm.jobs import Transfer
from kvbm.storage.disk.calls import DIRECT_NBYTES
from kvbm.storage.disk.counters import DiskCounters, DiskTally
from kvbm.storage.disk.slab import Slab
from kvbm.types import IdArray

_log = logging.getLogger("kvbm.storage.disk")

_RUN_NBYTES = 4 << 20  # one operation moves at most this, so that a large batch is shared
_RUN_BLOCKS = 512  # and at most this many buffers; the kernel takes 1024
_MAX_LAST_WAITS = 8  # of a queue whose answers could not be taken


class NativeBatch:
    """Blocks that were submitted together, in order of their slots.

    Attributes
    ----------
    transfer : Transfer
        Of the mask.
    is_read : bool
    error : OSError or None
        The first that spoiled a block.
    """

    def __init__(self, is_read: bool, ids: IdArray, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> None:
        self.transfer: Transfer[npt.NDArray[np.bool_]] = Transfer()
        self.is_read = is_read
        self.error: OSError | None = None
        self.token = 0
        self.memory = memory
        self.order = np.argsort(ids, kind="stable")  # where each block stands in the answer
        self.slots = ids[self.order].astype(np.int64)
        # Wrapped to 64 bits on the way: addresses are unsigned, rows and strides are not.
        self.addresses = (memory.ctypes.data + rows[self.order] * memory.strides[0]).astype(np.uint64)
        self.is_good = np.zeros(len(ids), dtype=np.bool_)
        self.move_nbytes = 0  # of each block
        self.is_bounced = False
        self.places = np.arange(len(ids))  # the blocks that move in this round
        self.num_blocks = self.places  # of each operation of this round
        self.num_calls = 0
        self.failures: list[tuple[int, OSError]] = []  # block id, and why

    def mask(self) -> npt.NDArray[np.bool_]:
        """Give what is good, in the order of submission."""
        good = np.empty(len(self.order), dtype=np.bool_)
        good[self.order] = self.is_good
        return good


class NativeEngine:
    """Moves blocks between a data file and memory.

    Parameters
    ----------
    files : Slab
        Closed by the engine when its thread leaves.
    block_nbytes, slot_nbytes : int
    num_threads : int
        Of kind "threads", started as they are needed.
    max_queued_nbytes : int
        Bytes of reads, and as many of writes, that may wait or move; a batch larger than that goes alone.
    disk_io : module
        The native twin's; `Backend.disk_io`.
    kind : {"threads", "uring"}
    depth : int
        Operations under way at most, 1 to 1024; each moves 4 MiB or one block.

    Raises
    ------
    StorageError
        With errno: an io_uring cannot be had here. The files stay open.
    """

    def __init__(
        self,
        files: Slab,
        *,
        block_nbytes: int,
        slot_nbytes: int,
        num_threads: int,
        max_queued_nbytes: int,
        disk_io: ModuleType,
        kind: str,
        depth: int = 32,
    ) -> None:
        self._tally = DiskTally(files.path, block_nbytes)
        self._queue: Any = disk_io.DiskQueue(files.fd, kind=kind, depth=depth, num_threads=num_threads)
        self._files = files
        self._is_direct = files.io_mode == "direct"
        self._block_nbytes = block_nbytes
        self._slot_nbytes = slot_nbytes
        self._max_queued_nbytes = max_queued_nbytes
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._tokens = itertools.count(1)
        self._batches: dict[int, NativeBatch] = {}  # by token, until they have ended
        self._queued_nbytes = {True: 0, False: 0}  # waiting or moving, by is_read
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._broken = ""  # why nothing is answered any more

    @property
    def counters(self) -> DiskCounters:
        """What was done so far; the live object."""
        return self._tally.counters

    @property
    def is_worker(self) -> bool:
        """Whether the caller is the engine's thread: it must not wait for itself."""
        return threading.current_thread() is self._thread

    def submit(
        self, is_read: bool, ids: IdArray, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
    ) -> NativeBatch:
        """Queue a batch that was checked; waits for room, except in the thread of the engine.

        Raises
        ------
        PoolClosed
            The engine is closed.
        StorageError
            Its thread is gone, or cannot be started.
        """
        batch = NativeBatch(is_read, ids, memory, rows)
        operations = self._plan(batch) if len(ids) else ()
        nbytes = len(ids) * self._slot_nbytes
        try:
            with self._lock:
                if not self.is_worker:
                    self._has_room.wait_for(lambda: self._is_closing or self._fits(is_read, nbytes))
                if self._broken:
                    raise StorageError(errno.EIO, self._broken, str(self._files.path))
                if self._is_closing:
                    raise PoolClosed("DiskStorage is closed")
                if operations:
                    self._start_thread()
                    batch.token = next(self._tokens)
                    self._batches[batch.token] = batch
                    self._queued_nbytes[is_read] += nbytes
                    batch.transfer.add_done_callback(functools.partial(self._drop_rest, batch.token))
                    self._queue.submit(batch.token, is_read, *operations, memory, **self._bounce(batch))
        except BaseException:  # ctrl-C too: nobody will hear of this batch, so no more of it is to move
            batch.transfer.cancel()
            self._take_back(batch)
            raise
        if not operations:
            batch.transfer.set_result(batch.mask())
        return batch

    def close(self, timeout: float | None = None) -> None:
        """Let what was submitted end, and stop the threads; may be called again."""
        with self._lock:
            self.stop()
            self._has_room.notify_all()
        thread = self._thread
        if thread is None or self.is_worker:  # a callback of a transfer may close the storage
            return
        begin = time.monotonic()
        thread.join(timeout)
        if thread.is_alive():
            seconds = time.monotonic() - begin
            raise TransferTimeout(
                f"{len(self._batches)} batches still read or write after {seconds:.3g} s ({self._files.path})"
            )

    def stop(self) -> None:
        """Ask the threads to leave when the queue is empty; takes no lock of Python's, for finalisers."""
        if self._is_closing:
            return
        self._is_closing = True
        self._queue.close()
        if self._thread is None:
            self._files.close()

    # -- before the queue --------------------------------------------------------------------------------------

    def _plan(self, batch: NativeBatch) -> tuple[Any, ...]:
        """Decide how the blocks move, join adjacent slots, and give the operations in the queue's terms."""
        row_nbytes, slot_nbytes = batch.memory.shape[1], self._slot_nbytes
        has_whole_slots = row_nbytes >= slot_nbytes
        batch.move_nbytes = slot_nbytes
        if self._is_direct:
            batch.is_bounced = not has_whole_slots or bool((batch.addresses % np.uint64(DIRECT_NBYTES)).any())
        elif not has_whole_slots:
            batch.move_nbytes = self._block_nbytes
        can_join = batch.move_nbytes == slot_nbytes
        return self._cut(batch, min(_RUN_BLOCKS, max(1, _RUN_NBYTES // slot_nbytes)) if can_join else 1)

    def _cut(self, batch: NativeBatch, max_blocks: int) -> tuple[Any, ...]:
        """Cut the blocks of this round into runs: offsets, buffers of each, addresses and lengths."""
        slots, addresses = batch.slots[batch.places], batch.addresses[batch.places]
        num_blocks = len(slots)
        is_first = np.ones(num_blocks, dtype=np.bool_)
        if max_blocks > 1:
            np.not_equal(slots[1:], slots[:-1] + 1, out=is_first[1:])
            runs = np.flatnonzero(is_first)
            if len(runs) < num_blocks:
                place_in_run = np.arange(num_blocks) - runs[np.cumsum(is_first) - 1]
                is_first |= place_in_run % max_blocks == 0
        firsts = np.flatnonzero(is_first)
        batch.num_blocks = np.diff(firsts, append=num_blocks)
        offsets = slots[firsts] * self._slot_nbytes
        if batch.is_bounced:
            return offsets, batch.num_blocks, addresses, np.full(num_blocks, self._block_nbytes, dtype=np.uint64)
        if len(firsts) < num_blocks:
            is_first[1:] |= addresses[1:] != addresses[:-1] + np.uint64(batch.move_nbytes)
        buffers = np.flatnonzero(is_first)
        lengths = (np.diff(buffers, append=num_blocks) * batch.move_nbytes).astype(np.uint64)
        return offsets, np.add.reduceat(is_first, firsts, dtype=np.int64), addresses[buffers], lengths

    def _bounce(self, batch: NativeBatch) -> dict[str, int]:
        return {"block_nbytes": self._block_nbytes, "slot_nbytes": self._slot_nbytes} if batch.is_bounced else {}

    def _fits(self, is_read: bool, nbytes: int) -> bool:
        queued = self._queued_nbytes[is_read]
        return not queued or queued + nbytes <= self._max_queued_nbytes

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._work, name="kvbm-disk", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise StorageError(errno.EAGAIN, f"cannot start a thread: {error}", str(self._files.path)) from error
        self._thread = thread

    def _drop_rest(self, token: int, transfer: Transfer[npt.NDArray[np.bool_]]) -> None:
        if transfer.cancelled():
            self._queue.cancel(token)

    def _take_back(self, batch: NativeBatch) -> None:
        """Forget a batch that the queue never got; one that it got comes back by itself."""
        with self._lock:
            if batch.token in self._batches and self._queue.last_token < batch.token:
                self._forget(batch)
        if batch.token not in self._batches:
            batch.transfer.set_landed()

    def _forget(self, batch: NativeBatch) -> None:
        del self._batches[batch.token]
        self._queued_nbytes[batch.is_read] -= len(batch.order) * self._slot_nbytes
        self._has_room.notify_all()

    # -- behind the queue --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (answers := self._queue.wait()) is not None:
                for answer in answers:
                    try:
                        self._take(*answer)
                    except Exception:
                        _log.exception("the end of a disk batch was lost path=%s", self._files.path)
        except BaseException as error:  # whoever waits for a batch must hear of it
            _log.exception("disk engine is broken, it takes nothing any more path=%s", self._files.path)
            if not self._break_off(error):
                return
        self._files.close()

    def _break_off(self, error: BaseException) -> bool:
        """Take nothing more and fail every open batch; return whether no byte of them moves any more."""
        text = f"the disk engine is broken, close the storage and open it again: {error!r}"
        with self._lock:
            self._broken = text
            self._is_closing = True
            lost = list(self._batches.values())
            self._has_room.notify_all()
        self._queue.close()
        for batch in lost:
            self._queue.cancel(batch.token)
        has_landed = self._wait_for_the_rest()
        for batch in lost:
            batch.is_good[:] = False
            batch.failures = [(slot, OSError(errno.EIO, text)) for slot in batch.slots.tolist()]
            self._finish(batch, has_landed=has_landed)
        return has_landed

    def _wait_for_the_rest(self) -> bool:
        """Wait until a closed queue moves nothing any more; False where it does not say so."""
        for _ in range(_MAX_LAST_WAITS):
            try:
                while self._queue.wait() is not None:
                    pass
                return True
            except BaseException as error:
                last = error
        # Closed, the descriptor could soon be that of another file, which these bytes would go to.
        _log.error("disk queue does not end, its file stays open path=%s error=%r", self._files.path, last)
        return False

    def _take(self, token: int, errnos: npt.NDArray[np.int32], moved: npt.NDArray[np.int64], num_calls: int) -> None:
        with self._lock:
            batch = self._batches[token]
        batch.num_calls += num_calls
        try:
            if not errnos.any():
                batch.is_good[batch.places] = True
            elif self._goes_again(batch, errnos, moved):
                return
        except Exception as error:
            _log.exception("disk I/O failed in an unexpected way path=%s", self._files.path)
            batch.is_good[:] = False
            surprise = OSError(errno.EIO, f"{type(error).__name__}: {error}")
            batch.failures = [(slot, surprise) for slot in batch.slots.tolist()]
        self._finish(batch)

    def _goes_again(self, batch: NativeBatch, errnos: npt.NDArray[np.int32], moved: npt.NDArray[np.int64]) -> bool:
        """Note what moved; submit the rest of failed runs again, block by block, to learn which ones are good."""
        places, num_blocks = batch.places, batch.num_blocks
        num_good = np.where(errnos == 0, num_blocks, moved // batch.move_nbytes)
        firsts = np.cumsum(num_blocks) - num_blocks
        place_in_run = np.arange(len(places)) - np.repeat(firsts, num_blocks)
        is_good = place_in_run < np.repeat(num_good, num_blocks)
        batch.is_good[places] = is_good
        has_failed = (errnos != 0) & (errnos != errno.ECANCELED)
        for i in np.flatnonzero(has_failed & (num_blocks == 1)).tolist():
            self._note_failure(batch, int(batch.slots[places[firsts[i]]]), int(errnos[i]), int(moved[i]))
        batch.places = places[~is_good & np.repeat(has_failed & (num_blocks > 1), num_blocks)]
        if not len(batch.places) or batch.transfer.done():
            return False
        operations = self._cut(batch, 1)
        self._queue.submit(batch.token, batch.is_read, *operations, batch.memory, **self._bounce(batch), is_again=True)
        if batch.transfer.done():  # cancelled just before: what its callback dropped was not there yet
            self._queue.cancel(batch.token)
        return True

    def _note_failure(self, batch: NativeBatch, slot: int, code: int, num_moved: int) -> None:
        text = os.strerror(code)
        if code == errno.EIO:
            nbytes, offset = batch.move_nbytes, slot * self._slot_nbytes + num_moved
            text = f"{text}, ended {nbytes - num_moved} of {nbytes} bytes short at {offset}"
        batch.failures.append((slot, OSError(code, text)))

    def _finish(self, batch: NativeBatch, *, has_landed: bool = True) -> None:
        num_good = int(np.count_nonzero(batch.is_good))
        with self._lock:
            levels = self._tally.count(
                batch.is_read, num_good=num_good, num_calls=batch.num_calls, failures=batch.failures
            )
            self._forget(batch)
        batch.error = batch.failures[0][1] if batch.failures else None
        self._tally.say(batch.is_read, levels, batch.failures)
        batch.transfer.set_result(batch.mask(), has_landed=has_landed)
