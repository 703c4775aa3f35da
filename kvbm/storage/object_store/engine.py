"""The thread of an object store: batches in, a mask out, reads before writes, on one asyncio loop.

Only that thread touches the queue, the counters and the breaker; others hand work over and look. A batch ends at its
deadline, whatever the store does: what runs is cancelled, what waits is dropped. Workers take blocks, each at most one;
how many there are bounds requests and bytes under way.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvbm.errors import PoolClosed, StorageError, TransferTimeout
from kvbm.storage.object_store.batch import Batch
from kvbm.storage.object_store.blocks import BlockMover

ResultT = TypeVar("ResultT")

_log = logging.getLogger("kvbm.storage.object_store")

_READS_IN_A_ROW = 16  # then a waiting write goes, so that writes do not wait for ever
_GRACE_S = 2.0  # for a client to let go of rows after it was told to


class ObjectEngine:
    """Moves batches.

    Parameters
    ----------
    mover : BlockMover
        Moves one block.
    max_blocks : int
        Blocks under way.
    deadline_s : float
        From submitting a batch to its end.
    """

    def __init__(self, mover: BlockMover, *, max_blocks: int, deadline_s: float) -> None:
        self._mover = mover
        self._max_blocks = max_blocks
        self._deadline_s = deadline_s
        self._loop: asyncio.AbstractEventLoop | None = None  # made with the thread
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # over the thread's start and the number of open batches
        self._is_closing = False
        self._is_exiting = False  # the interpreter is
        self._is_stopped = False  # the loop has ended: no worker takes another block
        self._waiting: dict[bool, deque[Batch]] = {True: deque(), False: deque()}  # by is_read
        self._open: set[Batch] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._num_reads_in_a_row = 0
        self._num_open = 0  # submitted and not ended
        self._is_quiet = threading.Condition(self._lock)  # none is

    @property
    def is_worker(self) -> bool:
        """Whether the caller is the thread: it must not wait for it."""
        return threading.current_thread() is self._thread

    def submit(self, batch: Batch) -> None:
        """Queue a batch that was checked."""
        if not len(batch):
            batch.transfer.set_result(batch.is_good)
            return
        with self._lock:
            loop = self._start()
            self._num_open += 1
            loop.call_soon_threadsafe(self._take, loop, batch)

    def call(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine on the loop and wait; it bounds its time itself."""
        if self.is_worker:
            work.close()
            raise StorageError("the books of an object store cannot be asked in a callback of one of its transfers")
        future = self.post(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise PoolClosed("ObjectStorage is closed") from None

    def post(self, work: Coroutine[Any, Any, ResultT]) -> concurrent.futures.Future[ResultT]:
        """Run a coroutine on the loop, and do not wait."""
        try:
            with self._lock:
                return asyncio.run_coroutine_threadsafe(work, self._start())
        except BaseException:
            work.close()
            raise

    def close(self, timeout: float | None = None) -> None:
        """Let what was submitted end, and stop the thread; may be called again."""
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._is_closing = True
            if self._thread is None:
                return
            if not self.is_worker and not self._is_quiet.wait_for(lambda: not self._num_open, timeout):
                raise TransferTimeout(f"{self._num_open} transfers still move after {timeout} s")
        self.stop()
        if self.is_worker:  # a callback of a transfer closes: the thread goes when that returns
            return
        self._thread.join(None if give_up is None else max(0.1, give_up - time.monotonic()))
        if self._thread.is_alive():
            raise TransferTimeout(
                f"the thread of the object store still runs after {timeout} s: the client holds on to rows of memory"
            )

    def stop(self) -> None:
        """Ask the thread to leave at once; takes no lock, for finalisers."""
        self._is_closing = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has left
                self._loop.call_soon_threadsafe(self._leave, self._loop)

    # -- the thread --------------------------------------------------------------------------------------------

    def _start(self) -> asyncio.AbstractEventLoop:
        """Give the loop, running; under the lock."""
        if self._is_closing:
            raise PoolClosed("ObjectStorage is closed")
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._run, args=(loop,), name="kvbm-objects", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                loop.close()
                raise StorageError(f"cannot start a thread: {error}") from error
            self._loop, self._thread = loop, thread
            atexit.register(self._leave_at_exit)
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        finally:
            for batch in list(self._open):
                self._expire(loop, batch)
            tasks = asyncio.all_tasks(loop)
            for task in tasks - self._workers:  # workers were told, and may be waiting for rows to come back
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=_GRACE_S))
            for batch in list(self._open):
                self._finish(batch)
            # Whoever waits for rows that a client still reads must hear of their end, so the loop outlives them.
            while (lent := [task for task in self._workers if not task.done()]) and not self._is_exiting:
                loop.run_until_complete(asyncio.wait(lent))
            loop.close()
            if not self._is_exiting:
                atexit.unregister(self._leave_at_exit)

    def _leave_at_exit(self) -> None:
        """Wait until no request is under way: its answer must not come to an interpreter that is gone."""
        self._is_exiting = True
        self.stop()
        if self._thread is not None:
            self._thread.join(_GRACE_S)

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_stopped:  # a second stop would end the wait for tasks to end
            self._is_stopped = True
            loop.stop()

    # -- the queue ---------------------------------------------------------------------------------------------

    def _take(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> None:
        self._open.add(batch)
        self._waiting[batch.is_read].append(batch)
        batch.timer = loop.call_later(self._deadline_s, self._expire, loop, batch)
        batch.transfer.add_done_callback(lambda _: self._on_done(loop, batch))
        for _ in range(min(len(batch), self._max_blocks - len(self._workers))):
            self._workers.add(loop.create_task(self._work()))

    def _next(self) -> tuple[Batch, int] | None:
        while (batch := self._choose()) is not None:
            if self._is_stopped:
                return None
            if batch.num_begun < len(batch):
                batch.num_begun += 1
                return batch, batch.num_begun - 1
            self._waiting[batch.is_read].popleft()
        return None

    def _choose(self) -> Batch | None:
        reads, writes = self._waiting[True], self._waiting[False]
        if reads and (self._num_reads_in_a_row < _READS_IN_A_ROW or not writes):
            self._num_reads_in_a_row += 1
            return reads[0]
        self._num_reads_in_a_row = 0
        return writes[0] if writes else None

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a worker is a task"
        while (item := self._next()) is not None:
            batch, i = item
            batch.running.add(task)
            try:
                await self._mover.move(batch, i)
            except asyncio.CancelledError:
                _log.debug("block given up block_id=%d", batch.ids[i])
            except Exception:
                _log.exception("moving a block failed in an unexpected way block_id=%d", batch.ids[i])
            batch.running.discard(task)
            batch.num_left -= 1
            if not batch.num_left:
                self._finish(batch)
            del batch, item  # nobody's memory is kept
        self._workers.discard(task)  # at once: a batch that comes next needs to know

    # -- ends --------------------------------------------------------------------------------------------------

    def _on_done(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> None:
        """See a batch that its caller cancelled, in whichever thread that happened."""
        if batch.num_left and batch.transfer.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop was closed: everything has ended
                loop.call_soon_threadsafe(self._expire, loop, batch)

    def _expire(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> None:
        """Give up what has not ended."""
        if batch not in self._open:
            return
        batch.end()
        if not batch.transfer.cancelled():
            self._mover.counters.num_late += batch.num_left
        batch.num_left -= len(batch) - batch.num_begun
        batch.num_begun = len(batch)
        with contextlib.suppress(ValueError):
            self._waiting[batch.is_read].remove(batch)
        if not batch.is_given_up:  # a second cancel would end their wait for rows that are still lent
            batch.is_given_up = True
            for task in list(batch.running):
                task.cancel()
        if batch.is_read or not batch.num_left:
            self._finish(batch)
        elif batch.timer is not None:
            batch.timer.cancel()
            batch.timer = loop.call_later(_GRACE_S, self._finish, batch)

    def _finish(self, batch: Batch) -> None:
        """End a transfer; one that writes and whose rows are still lent has ended, but not landed."""
        if batch not in self._open:
            if not batch.num_left:
                batch.transfer.set_landed()
            return
        self._open.discard(batch)
        batch.end()
        if batch.timer is not None:
            batch.timer.cancel()  # it holds the memory until then
        has_landed = batch.is_read or not batch.num_left
        if not has_landed:
            _log.error("object store holds on to rows num_blocks=%d: they are given back unfinished", batch.num_left)
        good: npt.NDArray[np.bool_] = batch.is_good.copy()
        if has_landed:
            batch.transfer.set_landed()  # also of one that was cancelled
        batch.transfer.set_result(good, has_landed=has_landed)
        with self._lock:
            self._num_open -= 1
            self._is_quiet.notify_all()
