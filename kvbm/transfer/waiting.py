"""The transfer of a copy on a lane: whoever waits for it without a limit finishes it, in his own thread.

The lane's thread does so for everybody else: it is told as soon as somebody looks at the transfer, asks to be called
back, waits with a limit, cancels it, or lets go of it. A transfer that is held and never looked at is finished with the
next one of its lane that is, or when the lane is full or closed.
"""

from __future__ import annotations

from collections.abc import Callable

from kvbm.jobs import Transfer, TransferState
from kvbm.transfer.engine import CopyResult
from kvbm.transfer.lanes import Submission


class LaneTransfer(Transfer[CopyResult]):
    """A copy on a lane.

    Parameters
    ----------
    deadline_s : float, optional
        As for `Transfer`.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._submission: Submission | None = None  # until somebody finishes it
        super().__init__(deadline_s=deadline_s)

    def begin(self, submission: Submission) -> None:
        """Say what it stands for: a submission whose owner is this transfer."""
        self._submission = submission
        if submission.is_finished:
            self._submission = None

    def end(self, result: CopyResult | None, error: Exception | None) -> None:
        """Say that the device is done with it, and how that went."""
        self._submission = None
        if error is not None:
            self.set_exception(error)
        elif result is not None:
            self.set_result(result)

    @property
    def state(self) -> TransferState:
        """How far the transfer is, its deadline looked at."""
        self._count_on_thread()
        return super().state

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it has ended or `timeout` seconds are over; return whether it has ended."""
        finishes_here = timeout is None and self._deadline is None and self._state is TransferState.PENDING
        if finishes_here and (submission := self._submission) is not None:
            submission.wait()
        return super().wait(timeout)

    def cancel(self) -> bool:
        """End it for its waiter; False when it had ended already."""
        is_first = super().cancel()
        self._count_on_thread()
        return is_first

    def add_done_callback(self, callback: Callable[[Transfer[CopyResult]], None]) -> None:
        """Call back with this transfer once it has ended: at once, or in the thread that ends it."""
        self._count_on_thread()
        super().add_done_callback(callback)

    def add_landed_callback(self, callback: Callable[[Transfer[CopyResult]], None]) -> None:
        """Call back with this transfer once it has ended and no byte of it moves any more: what it used is free."""
        self._count_on_thread()
        super().add_landed_callback(callback)

    def __del__(self) -> None:
        if (submission := self._submission) is not None:
            submission.hand_over()

    def _count_on_thread(self) -> None:
        if (submission := self._submission) is not None:
            submission.keep_owner(self)
            submission.hand_over()
