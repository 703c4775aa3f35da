"""Threads that wait until something is released.

A waiter sleeps on a queue of its own, whose ``put`` may be called from a finaliser: waking takes no lock of ours.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class WaitList:
    """Waiters that try again whenever they are woken; they are not queued among themselves."""

    def __init__(self) -> None:
        self._waiters: tuple[queue.SimpleQueue[None], ...] = ()  # replaced whole, so a finaliser may read it
        self._lock = threading.Lock()  # for replacing it

    def __len__(self) -> int:
        return len(self._waiters)

    def wake(self) -> None:
        """Let every waiter try again."""
        for waiter in self._waiters:
            waiter.put(None)

    def wait_for(self, attempt: Callable[[], T | None], timeout_s: float) -> T | None:
        """Try now and after each wake until there is an answer; None when `timeout_s` seconds (or inf) are over."""
        waiter: queue.SimpleQueue[None] = queue.SimpleQueue()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._waiters = (*self._waiters, waiter)
        try:
            while (answer := attempt()) is None:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    return None
                with contextlib.suppress(queue.Empty):
                    waiter.get(timeout=min(remaining_s, threading.TIMEOUT_MAX))
            return answer
        finally:
            with self._lock:
                self._waiters = tuple(other for other in self._waiters if other is not waiter)
