"""What an engine counts and says of the batches that it has moved; both engines keep it, under their own lock."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger("kvbm.storage.disk")

Failure = tuple[int, OSError]  # a block id, and why it could not be moved


@dataclass
class DiskCounters:
    """What a disk storage has done since it was opened.

    Attributes
    ----------
    num_reads, num_writes : int
        Blocks moved.
    num_calls : int
        Positional reads and writes, retries included.
    read_nbytes, written_nbytes : int
        Bytes of those blocks.
    num_failures : int
        Blocks that could not be read or written.
    last_error : str
        What the last failure said; empty while there is none.
    """

    num_reads: int = 0
    num_writes: int = 0
    num_calls: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    num_failures: int = 0
    last_error: str = ""


class DiskTally:
    """Counts what was moved and logs what was not, each kind of error once above DEBUG.

    Parameters
    ----------
    path : Path
        The data file, for messages.
    block_nbytes : int

    Attributes
    ----------
    counters : DiskCounters
    """

    def __init__(self, path: Path, block_nbytes: int) -> None:
        self.counters = DiskCounters()
        self._path = path
        self._block_nbytes = block_nbytes
        self._known_errnos: set[int] = set()  # announced once each

    def count(self, is_read: bool, *, num_good: int, num_calls: int, failures: Iterable[Failure]) -> list[int]:
        """Count blocks of a batch, under the lock of the engine; give the level to log each failure at."""
        counters = self.counters
        counters.num_calls += num_calls
        if is_read:
            counters.num_reads += num_good
            counters.read_nbytes += num_good * self._block_nbytes
        else:
            counters.num_writes += num_good
            counters.written_nbytes += num_good * self._block_nbytes
        levels = []
        for block_id, error in failures:
            counters.num_failures += 1
            counters.last_error = f"could not {_verb(is_read)} block {block_id} of {self._path}: {error}"
            code = error.errno or 0
            levels.append(logging.DEBUG if code in self._known_errnos else logging.WARNING)
            self._known_errnos.add(code)
        return levels

    def say(self, is_read: bool, levels: list[int], failures: Iterable[Failure]) -> None:
        """Log failures at their levels, without the lock."""
        for level, (block_id, error) in zip(levels, failures, strict=True):
            text = "disk %s failed block_id=%d path=%s error=%s"
            _log.log(level, text, _verb(is_read), block_id, self._path, error)


def _verb(is_read: bool) -> str:
    return "read" if is_read else "write"
