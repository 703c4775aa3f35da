"""How loud to say what goes wrong again and again: a disk that fails would otherwise write a line for every job."""

from __future__ import annotations

import logging
from collections.abc import Callable


class Complaints:
    """Gives a log level: WARNING for the first of a kind and then once in a while, DEBUG for those between.

    Parameters
    ----------
    clock : callable
        Gives seconds; monotonic.
    every_s : float
    """

    def __init__(self, clock: Callable[[], float], every_s: float = 10.0) -> None:
        self._clock = clock
        self._every_s = every_s
        self._said_at: dict[str, float] = {}

    def level(self, kind: str) -> int:
        """Give the level for one more of this kind."""
        now = self._clock()
        said_at = self._said_at.get(kind)
        if said_at is not None and now - said_at < self._every_s:
            return logging.DEBUG
        self._said_at[kind] = now
        return logging.WARNING
