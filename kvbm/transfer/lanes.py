"""A lane: one stream of our own, its submissions in order, and a thread that sleeps until each is done.

Nothing polls. A submission is queued under the lane's lock, so the order of the books is the order of the stream. It is
finished once, by the lane's thread, or by a caller that waits for it: an event that is done needs no hand-over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvbm.errors import ConfigError, PoolClosed, TransferTimeout
from kvbm.gpu import Gpu
from kvbm.jobs.aside import standing_aside

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream

Finish = Callable[["Exception | None"], None]

_log = logging.getLogger("kvbm.transfer")


class Submission:
    """What was queued on a lane, and what is to be done when the device is done with it."""

    def __init__(self, lane: Lane, finish: Finish) -> None:
        self._lane = lane
        self._finish: Finish | None = finish  # until somebody has begun to finish it
        self._claiming = threading.Lock()
        self.event: Event | None = None  # None: it could not be recorded, so the whole stream is waited for
        self.error: Exception | None = None  # of queueing

    def is_done(self) -> bool:
        """Whether the device is done with it; never waits."""
        try:
            return self.event.is_done() if self.event is not None else self._lane.stream.is_idle()
        except Exception:  # a failed device does nothing more; finishing it tells why
            return True

    def wait(self) -> None:
        """Sleep until the device is done with it, and finish it unless somebody else does."""
        error = self.error
        try:
            with standing_aside():
                if self.event is not None:
                    self.event.synchronize()
                else:
                    self._lane.stream.synchronize()
        except Exception as failure:
            error = error or failure
            self._lane.settle_failure(failure)
        self.finish(error)

    def finish(self, error: Exception | None) -> None:
        """Do what is to be done at its end, once."""
        with self._claiming:
            finish, self._finish = self._finish, None
        if finish is None:
            return
        self._lane.forget(self)  # first: a callback of the transfer may submit more
        try:
            finish(error)
        except Exception:
            _log.exception("a submission could not be finished lane=%s", self._lane.name)


class Lane:
    """One stream.

    Parameters
    ----------
    gpu : Gpu
    name : str
    priority : int
        Of the stream; smaller is more urgent.
    max_in_flight : int
        Submissions that may be under way; who submits more waits.
    has_thread : bool
        False: nobody finishes submissions but `settle` and those who wait. For tests that advance a simulation.
    on_lost : callable
        Told, once a wait has failed for good, that the device does nothing more.
    """

    def __init__(
        self,
        gpu: Gpu,
        name: str,
        *,
        priority: int,
        max_in_flight: int = 64,
        has_thread: bool = True,
        on_lost: Callable[[Exception], None],
    ) -> None:
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight is {max_in_flight}, give 1 or more")
        self.name = name
        self._gpu = gpu
        self._priority = priority
        self._stream: Stream | None = None  # made when first used
        self._has_thread = has_thread
        self._max_in_flight = max_in_flight
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards the order of the stream and what follows; never held while waiting
        self._changed = threading.Condition(self._lock)
        self._in_flight: deque[Submission] = deque()  # until finished, in the stream's order
        self._unseen: deque[Submission] = deque()  # for the thread
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def stream(self) -> Stream:
        """The lane's stream."""
        if self._stream is None:
            self._stream = self._gpu.device.create_stream(priority=self._priority)
        return self._stream

    @property
    def num_in_flight(self) -> int:
        """Submissions that are not finished."""
        return len(self._in_flight)

    def submit(self, queue: Callable[[Stream], None], finish: Finish) -> Submission:
        """Queue work.

        Parameters
        ----------
        queue : callable
            Takes the stream and queues on it; called once, under the lane's lock.
        finish : callable
            Called once, by any thread, when the device does nothing more of it: with None, or with what went wrong.

        Raises
        ------
        PoolClosed
            The lane is closed, or this is a child made by fork. Nothing was queued, and `finish` is not called.

        Notes
        -----
        Waits while too many submissions are under way. A failure while queueing is `finish`'s, after what was queued
        before it has run.
        """
        submission = Submission(self, finish)
        with self._lock:
            while len(self._in_flight) >= self._max_in_flight and not self._is_closed:
                oldest = self._in_flight[0]
                if self._has_thread and threading.current_thread() is not self._thread:
                    self._changed.wait()
                else:
                    self._lock.release()
                    try:
                        oldest.wait()
                    finally:
                        self._lock.acquire()
            if self._is_closed or not self._gpu.is_usable:
                raise PoolClosed("the GPU's transfer engine is closed, or was made before a fork: make one here")
            stream = self.stream
            try:
                queue(stream)
            except Exception as error:
                submission.error = error
            try:
                event = self._gpu.device.create_event()
                stream.record(event)
                submission.event = event
            except Exception as error:
                submission.error = submission.error or error
            self._in_flight.append(submission)
            if self._has_thread:
                self._unseen.append(submission)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=f"kvbm-gpu-{self.name}", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        return submission

    def settle(self) -> int:
        """Finish what the device is done with; return how many submissions that were."""
        num_settled = 0
        while True:
            with self._lock:
                first = self._in_flight[0] if self._in_flight else None
            if first is None or not first.is_done():
                return num_settled
            first.wait()
            num_settled += 1

    def settle_failure(self, failure: Exception) -> None:
        """See to it, after a wait has failed, that the stream is idle; a device that cannot say so is lost.

        CUDA's errors stick: after one the driver has stopped every channel of the process, and no byte moves any more.
        """
        try:
            self.stream.synchronize()
        except Exception:
            self._on_lost(failure)

    def forget(self, submission: Submission) -> None:
        """Drop a submission from the books that the device is done with."""
        with self._lock:
            if submission in self._in_flight:
                self._in_flight.remove(submission)
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more and wait for what is under way; may be called again.

        Raises
        ------
        TransferTimeout
            Some is still under way.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if not self._gpu.is_usable:
            return
        if not self._has_thread:
            while self._in_flight:
                self._in_flight[0].wait()
        elif thread is not None and thread is not threading.current_thread():
            thread.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
            if thread.is_alive():
                raise TransferTimeout(f"{self.num_in_flight} copies of lane {self.name} still run after {timeout} s")
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except Exception as error:  # a lost device has no streams
                _log.debug("stream was not closed lane=%s error=%s", self.name, error)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unseen or self._is_closed)
                if not self._unseen:
                    return
                submission = self._unseen.popleft()
            submission.wait()
