"""Why blocks of a job failed, in one line: each reason once, in the order in which they came up."""

from __future__ import annotations


class Reasons:
    """Collects why blocks of one job failed; as text, all of it."""

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}

    def add(self, reason: str) -> None:
        """Note a reason; an empty one is none."""
        if reason:
            self._seen[reason] = None

    def __str__(self) -> str:
        return ", ".join(self._seen)


def text_of(error: Exception) -> str:
    """Give what an error says, or what it is where it says nothing."""
    return str(error) or repr(error)
