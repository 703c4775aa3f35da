"""A disk of a given speed: a storage's calls end no sooner than so many bytes a second allow, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvbm.jobs import Transfer


class Throttle:
    """Slows storages down that share one disk.

    Parameters
    ----------
    bytes_per_s : float
        Of reads and writes together.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()  # when the disk has done all that it was asked to

    def put_on(self, storage: Any) -> None:
        """Slow a storage down from here on."""
        storage.submit_read = self._slowed(storage.submit_read, storage.layout.block_nbytes)
        storage.submit_write = self._slowed(storage.submit_write, storage.layout.block_nbytes)

    def _slowed(self, submit: Callable[..., Transfer[Any]], block_nbytes: int) -> Callable[..., Transfer[Any]]:
        def slow(block_ids: Any, *arguments: Any, **more: Any) -> Transfer[Any]:
            inner = submit(block_ids, *arguments, **more)
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + len(block_ids) * block_nbytes / self._bytes_per_s
                due = self._free_at
            outer: Transfer[Any] = Transfer()
            timer = threading.Timer(max(0.0, due - time.monotonic()), _pass_on, (inner, outer))
            timer.daemon = True
            timer.start()
            return outer

        return slow


def _pass_on(inner: Transfer[Any], outer: Transfer[Any]) -> None:
    error = inner.exception()
    if error is None:
        outer.set_result(inner.result())
    else:
        outer.set_exception(error)
