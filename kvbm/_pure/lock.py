"""The store's lock: knows its holder, so that a call from inside a call is an error and never a deadlock."""

from __future__ import annotations

import threading
from types import TracebackType

from kvbm.errors import called_back


class OwnedLock:
    """A lock that answers its own holder with an error instead of a deadlock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            raise called_back()
        self._lock.acquire()
        self._owner = me

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner = 0
        self._lock.release()
