"""The store's lock: knows its holder, so that a call from inside a call is an error and never a deadlock.

A signal's handler may raise between any two lines of Python, so that none of them may stand between taking the lock and
the block that gives it back: ``with`` gets the interpreter's own lock.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from kvbm.errors import called_back


class OwnedLock:
    """A lock that answers its own holder with an error instead of a deadlock."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()  # for it tells its owner; nobody ever holds it twice

    def unless_mine(self) -> AbstractContextManager[bool]:
        """Give what to enter; raise `PluginError` where this thread has the lock already."""
        if self._lock._is_owned():
            raise called_back()
        return self._lock  # type: ignore[no-any-return]
