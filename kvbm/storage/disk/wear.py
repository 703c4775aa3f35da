"""How fast a device wears: what is written to it in a day, and what that makes it write inside.

Only counting: the limit is `kvbm.planner.policies.WriteBudget`. `BytesPerDay` has one writer at a time, its owner's
lock sees to that; anybody may read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from kvbm.errors import ConfigError

_HOUR_S = 3600.0
_HOURS_A_DAY = 24

FLASH_PAGE_NBYTES = 16384  # of most flash made since 2015; what is programmed at once


def estimate_device_nbytes(written_nbytes: int, slot_nbytes: int, page_nbytes: int = FLASH_PAGE_NBYTES) -> int:
    """Estimate what a device writes to its medium for whole slots written to it.

    Parameters
    ----------
    written_nbytes : int
        Bytes of all slots written, padding included.
    slot_nbytes : int
        Bytes of one.
    page_nbytes : int
        What the device programs at once.

    Returns
    -------
    int
        Bytes; at least `written_nbytes`.

    Raises
    ------
    ConfigError
        A size is below 1, or `written_nbytes` below 0.

    Notes
    -----
    Each slot is counted as whole pages: a slot that is no multiple of a page makes the device write the rest of its
    last page too, or read and write it again later. That is all that can be said from outside. A device with a cache
    may join neighbours and write less; one that is nearly full moves other data first and writes more. Its own counter
    (``nvme smart-log``: data_units_written, and the vendor's count of media writes) has the truth.

    Examples
    --------
    >>> estimate_device_nbytes(10 * 20480, 20480), estimate_device_nbytes(10 * 65536, 65536)
    (327680, 655360)
    """
    if written_nbytes < 0 or slot_nbytes < 1 or page_nbytes < 1:
        raise ConfigError(
            f"written_nbytes is {written_nbytes}, slot_nbytes {slot_nbytes}, page_nbytes {page_nbytes}: give 0 or "
            "more, and sizes of 1 or more bytes"
        )
    pages_nbytes = -(-slot_nbytes // page_nbytes) * page_nbytes
    return -(-written_nbytes * pages_nbytes // slot_nbytes)


class BytesPerDay:
    """Bytes written in the last 24 hours, by the hour.

    Parameters
    ----------
    clock : callable
        Gives seconds; monotonic.

    Notes
    -----
    Hours begin when it is made. The window is this hour, as far as it has come, and the 23 before it, so it is never
    more than a day long and never less than 23 hours. Memory is bounded: 24 numbers.

    Examples
    --------
    >>> hours = 0
    >>> written = BytesPerDay(clock=lambda: hours * 3600.0)
    >>> written.add(1000)
    >>> hours = 5
    >>> written.add(500)
    >>> written.nbytes
    1500
    >>> hours = 24
    >>> written.nbytes, written.total_nbytes
    (500, 1500)
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = clock()
        self._hours: deque[tuple[int, int]] = deque(maxlen=_HOURS_A_DAY)  # hour, bytes; oldest first
        self.total_nbytes = 0  # since it was made

    def add(self, nbytes: int) -> None:
        """Count bytes that were written now."""
        self.total_nbytes += nbytes
        hour = self._hour()
        if self._hours and self._hours[-1][0] == hour:
            nbytes += self._hours.pop()[1]
        self._hours.append((hour, nbytes))

    @property
    def nbytes(self) -> int:
        """Bytes of the last 24 hours."""
        first = self._hour() - _HOURS_A_DAY + 1
        return sum(nbytes for hour, nbytes in tuple(self._hours) if hour >= first)

    def _hour(self) -> int:
        return int((self._clock() - self._began_at) // _HOUR_S)
