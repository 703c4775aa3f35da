"""Standing aside: a thread that others need says so before it waits, so that its crew can put another in its place.

Without that, callbacks that wait for further jobs of the route whose threads they run in would wait for themselves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

_here = threading.local()  # crew: the one that this thread answers for at the moment


class Crew(Protocol):
    """Threads that do the same work."""

    def leave(self) -> None:
        """Count one of them as gone."""

    def come_back(self) -> None:
        """Count it again."""


@contextlib.contextmanager
def answering_for(crew: Crew | None) -> Iterator[None]:
    """Mark this thread as one whose waiting keeps a crew from its work; None changes nothing."""
    before = getattr(_here, "crew", None)
    _here.crew = before if crew is None else crew
    try:
        yield
    finally:
        _here.crew = before


@contextlib.contextmanager
def standing_aside() -> Iterator[None]:
    """Wait inside, in any thread: its crew, where it has one, goes on without it."""
    crew: Crew | None = getattr(_here, "crew", None)
    if crew is None:
        yield
        return
    crew.leave()
    try:
        yield
    finally:
        crew.come_back()
