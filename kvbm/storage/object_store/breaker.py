"""The circuit breaker: after so many failures in a row nothing is asked any more, until one probe is answered.

    closed --failures in a row--> open --cool-down over, one probe--> half open --answered--> closed
                                   ^----------------- probe failed, longer cool-down ------------'

No lock: it belongs to the thread of the engine; other threads only look at `is_available`.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable

_log = logging.getLogger("kvbm.storage.object_store")


class BreakerState(str, enum.Enum):
    """What the breaker lets through: everything, nothing, one probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


class CircuitBreaker:
    """Counts failures in a row and tells listeners when the store goes and comes.

    Parameters
    ----------
    max_failures : int
        Failures in a row, of any requests, that open it.
    cool_down_s, max_cool_down_s : float
        Seconds before the first probe, doubled after each that fails, up to the maximum.
    """

    def __init__(self, *, max_failures: int, cool_down_s: float, max_cool_down_s: float) -> None:
        self.state = BreakerState.CLOSED
        self.num_opens = 0
        self.cool_down_s = cool_down_s  # of the next probe
        self._first_cool_down_s = cool_down_s
        self._max_cool_down_s = max_cool_down_s
        self._max_failures = max_failures
        self._num_failures = 0  # in a row
        self._listeners: list[Callable[[bool], None]] = []

    @property
    def is_available(self) -> bool:
        """Whether requests go through."""
        return self.state is BreakerState.CLOSED

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Call with True when the store is back and with False when it is gone; at once where it is gone now."""
        self._listeners.append(listener)
        if not self.is_available:
            self._tell(listener, False)

    def succeed(self) -> None:
        """Note a request that was answered; late answers do not close an open breaker, the probe does."""
        self._num_failures = 0

    def fail(self) -> bool:
        """Note a request that failed; tell whether this one opened the breaker."""
        self._num_failures += 1
        if self.state is not BreakerState.CLOSED or self._num_failures < self._max_failures:
            return False
        self.state = BreakerState.OPEN
        self.num_opens += 1
        self.cool_down_s = self._first_cool_down_s
        for listener in list(self._listeners):
            self._tell(listener, False)
        return True

    def begin_probe(self) -> None:
        """Let one request through."""
        self.state = BreakerState.HALF_OPEN

    def end_probe(self, is_answered: bool) -> None:
        """Close after an answer; otherwise stay open, for longer."""
        if not is_answered:
            self.state = BreakerState.OPEN
            self.cool_down_s = min(2 * self.cool_down_s, self._max_cool_down_s)
            return
        self.state = BreakerState.CLOSED
        self._num_failures = 0
        for listener in list(self._listeners):
            self._tell(listener, True)

    def _tell(self, listener: Callable[[bool], None], is_available: bool) -> None:
        try:
            listener(is_available)
        except Exception:
            _log.exception("a listener of an object store's availability failed: %r", listener)
