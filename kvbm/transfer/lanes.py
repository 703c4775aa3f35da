"""A lane: one stream of our own, its submissions in order, and a thread that finishes those that are handed to it.

Nothing polls. A submission is queued under the lane's lock, so the order of the books is the order of the stream. It is
finished once: by a caller that waits for it, by whoever settles the lane, or by the lane's thread, which sleeps until a
submission is handed over to it and then in the driver. Waking that thread beside one that waits anyway would cost as
much as a small copy, so it is left asleep where somebody can be trusted to wait.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kvbm.errors import ConfigError, PoolClosed, TransferTimeout
from kvbm.gpu import Gpu
from kvbm.jobs.aside import standing_aside

if TYPE_CHECKING:
    from kvbm._backend import Event, Stream

Queue = Callable[["Stream", "Event"], "Event | None"]
Finish = Callable[["Exception | None"], None]

_log = logging.getLogger("kvbm.transfer")


class Submission:
    """What was queued on a lane, and what is to be done when the device is done with it.

    Attributes
    ----------
    event : Event or None
        Passed when the device is done with it. None: it could not be recorded, so the whole stream is waited for.
    error : Exception or None
        Of queueing, else of the device, once somebody has begun to finish it.
    """

    def __init__(self, lane: Lane, finish: Finish, owner: Any = None) -> None:
        self.event: Event | None = None
        self.error: Exception | None = None
        self._lane = lane
        self._finish: Finish | None = finish  # until somebody has begun to finish it
        # Whoever waits holds the owner; the lane does not, so that it learns when nobody is left who might wait.
        self._owner = None if owner is None else weakref.ref(owner)
        self._kept: Any = None  # the owner, once somebody counts on the lane's thread
        self._is_handed_over = False

    @property
    def is_finished(self) -> bool:
        """Whether somebody has begun to finish it."""
        return self._finish is None

    def is_done(self) -> bool:
        """Whether the device is done with it; never waits."""
        try:
            return self.event.is_done() if self.event is not None else self._lane.stream.is_idle()
        except Exception:  # a failed device does nothing more; finishing it tells why
            return True

    def wait(self) -> None:
        """Sleep until the device is done with it, and finish it unless somebody else does."""
        if self.is_finished:
            return
        try:
            with standing_aside():
                if self.event is not None:
                    self.event.synchronize()
                else:
                    self._lane.stream.synchronize()
        except Exception as failure:
            self.error = self.error or failure
            self._lane.settle_failure(failure)
        finish: Finish | None = None
        try:
            finish, owner = self._lane.take(self)
            if finish is not None:
                finish(self.error)
            del owner  # it lived until it was told
        except Exception:
            _log.exception("a submission could not be finished lane=%s", self._lane.name)
        except BaseException:  # ctrl-C in a caller's thread: the lane's finishes it instead
            if finish is not None:
                self._lane.put_back(self, finish)
            raise

    def hand_over(self) -> None:
        """Let the lane's thread finish it, after all that was queued before; takes no lock, so a destructor may call.

        Does nothing where the lane has no thread.
        """
        if not self._is_handed_over and self._finish is not None:
            self._is_handed_over = True
            self._lane.wake(self)

    def take(self) -> tuple[Finish | None, Any]:
        """Give what finishes it, to the first who asks, and the owner, where there is one; under the lane's lock."""
        finish, self._finish = self._finish, None
        owner, self._kept = self._owner() if self._owner is not None else None, None
        return finish, owner

    def put_back(self, finish: Finish) -> None:
        """Undo `take`; under the lane's lock."""
        self._finish = finish
        self._kept = self._owner() if self._owner is not None else None
        self._is_handed_over = False

    def keep_owner(self, owner: Any) -> None:
        """Hold the owner until it was told of the end; by a call of the owner's own, which needs no lock.

        Where `take` runs beside, it has found the owner alive before it clears what is kept, or clears nothing.
        """
        self._kept = owner


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
        # For the thread; None ends it. Putting takes no lock that a destructor could find held by its own thread.
        self._handed_over: SimpleQueue[Submission | None] = SimpleQueue()
        # Recorded on whatever the stream shall wait for, one after the other: a wait holds to the record of its moment.
        self._fence: Event | None = None
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

    def submit(
        self,
        queue: Queue,
        finish: Finish,
        *,
        followers: Sequence[Stream] = (),
        hands_over: bool = True,
        owner: Any = None,
    ) -> Submission:
        """Queue work.

        Parameters
        ----------
        queue : callable
            Takes the stream, and an event to record on streams that it shall wait for, and queues; gives the event that
            it put behind all, or None. Called once, under the lane's lock.
        finish : callable
            Called once, by any thread, when the device does nothing more of it: with None, or with what went wrong.
        followers : sequence of Stream
            What is queued on them from now on waits for the work.
        hands_over : bool
            False: the caller sees to it that somebody waits for the submission, or calls its `hand_over`.
        owner : object, optional
            What `finish` tells of the end, by a weak reference: alive while it is called unless it was gone before.

        Raises
        ------
        PoolClosed
            The lane is closed, or this is a child made by fork. Nothing was queued, and `finish` is not called.

        Notes
        -----
        Waits while too many submissions are under way. A failure while queueing is `finish`'s, after what was queued
        before it has run.
        """
        submission = Submission(self, finish, owner)
        with self._lock:
            self._wait_for_room()
            if self._is_closed or not self._gpu.is_usable:
                raise PoolClosed("the GPU's transfer engine is closed, or was made before a fork: make one here")
            stream = self.stream
            if self._fence is None:
                self._fence = self._gpu.device.create_event()
            if self._has_thread and self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"kvbm-gpu-{self.name}", daemon=True)
                self._thread.start()
            event = None
            try:
                event = queue(stream, self._fence)
            except Exception as error:
                submission.error = error
            try:
                if event is None:
                    event = self._gpu.device.create_event()
                    stream.record(event)
                submission.event = event
                for follower in followers:
                    follower.wait(event)
            except Exception as error:
                submission.error = submission.error or error
            self._in_flight.append(submission)
        if hands_over:
            submission.hand_over()
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

    def take(self, submission: Submission) -> tuple[Finish | None, Any]:
        """Drop a submission from the books that the device is done with; give as `Submission.take`."""
        with self._lock:
            taken = submission.take()
            if taken[0] is not None:
                self._in_flight.remove(submission)
                self._changed.notify_all()
        return taken

    def put_back(self, submission: Submission, finish: Finish) -> None:
        """Undo `take`, and hand the submission over to the thread."""
        with self._lock:
            submission.put_back(finish)
            self._in_flight.appendleft(submission)
        submission.hand_over()

    def wake(self, submission: Submission) -> None:
        """Tell the thread of a submission; takes no lock."""
        if self._has_thread:
            self._handed_over.put(submission)

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
            left = self._in_flight[-1] if self._in_flight else None
        if not self._gpu.is_usable:
            return
        if not self._has_thread:
            while self._in_flight:
                self._in_flight[0].wait()
        elif thread is not None:
            for last in (left, None):  # again, where it was handed over: that may be on its way still
                self._handed_over.put(last)
        if thread is not None and thread is not threading.current_thread():
            thread.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
            if thread.is_alive():
                raise TransferTimeout(f"{self.num_in_flight} copies of lane {self.name} still run after {timeout} s")
        with self._lock:
            stream, self._stream = self._stream, None
            self._fence = None
        if stream is not None:
            try:
                stream.close()
            except Exception as error:  # a lost device has no streams
                _log.debug("stream was not closed lane=%s error=%s", self.name, error)

    def _wait_for_room(self) -> None:
        """Wait until one more may be under way, or the lane is closed; under the lock, which others may take."""
        while len(self._in_flight) >= self._max_in_flight and not self._is_closed:
            if self._has_thread and threading.current_thread() is not self._thread:
                self._in_flight[-1].hand_over()
                self._changed.wait()
                continue
            oldest = self._in_flight[0]
            self._lock.release()
            try:
                oldest.wait()
            finally:
                self._lock.acquire()

    def _work(self) -> None:
        while True:
            last = self._handed_over.get()
            if last is None:
                return
            self._finish_through(last)
            del last  # nothing of it lives while the thread sleeps

    def _finish_through(self, last: Submission) -> None:
        """Finish a submission, after all that were queued before it."""
        while not last.is_finished:
            with self._lock:
                oldest = self._in_flight[0] if self._in_flight else last
            oldest.wait()
