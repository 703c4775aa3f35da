"""The thread that pumps a planner when something was registered, answered or is overdue."""

from __future__ import annotations

import logging
import threading

from kvbm.planner.planner import Planner

_log = logging.getLogger("kvbm.planner")


class PlannerThread:
    """Pumps a planner from the first wake on; an exception of the planner's is logged and raised by `check`.

    Parameters
    ----------
    planner : Planner
    gather_s : float
        How long it lets news gather: it then works once for all of them, and seldom takes the interpreter from a
        request that has just registered.
    """

    def __init__(self, planner: Planner, *, gather_s: float = 5e-4) -> None:
        self._planner = planner
        self._gather_s = gather_s
        self._has_to_stop = threading.Event()
        self._has_news = threading.Event()
        self._is_stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvbm-planner", daemon=True)
        planner.set_wake(self.wake)
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to do; costs a look when that is known."""
        if not self._has_news.is_set():
            self._has_news.set()

    def check(self) -> None:
        """Raise what the thread failed with since the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the thread; return whether it ended in time."""
        self._is_stopping = True
        self._has_to_stop.set()
        self._has_news.set()
        if self._thread is not threading.current_thread():
            self._thread.join(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            remaining_s = self._planner.seconds_to_deadline()
            self._has_news.wait(None if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX))
            self._has_to_stop.wait(self._gather_s)
            self._has_news.clear()
            if self._is_stopping:
                return
            try:
                while self._planner.pump() and not self._is_stopping:
                    pass
            except Exception as error:
                _log.exception("the planner failed")
                self._error = error
