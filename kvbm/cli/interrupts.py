"""Ctrl-C that is never lost.

Python drops a ``KeyboardInterrupt`` that comes while a finaliser runs. The handler here also leaves a note, which long
work looks at between two steps.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While it is entered, ctrl-C raises `KeyboardInterrupt` at once, and from the next `check` if that was lost."""

    def __init__(self) -> None:
        self._came = False
        self._former: Any = None

    def check(self) -> None:
        """Raise `KeyboardInterrupt` when ctrl-C was pressed."""
        if self._came:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt
