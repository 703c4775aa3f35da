"""Waiting until no byte of a transfer moves, which may be after it has ended for its waiter.

A write may be given up while a client below still looks at its rows. They are somebody else's only afterwards.
"""

from __future__ import annotations

import time
from typing import Any

from kvbm.jobs import Transfer

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1e-3, 0.1


def wait_until_landed(transfer: Transfer[Any]) -> None:
    """Wait for the bytes of a transfer that has ended.

    Parameters
    ----------
    transfer : Transfer

    Notes
    -----
    Blocks, without a limit; returns at once where the bytes have landed, as they have nearly always. Nobody is told of
    the moment, so it looks again and again, less and less often.
    """
    pause_s = _SHORTEST_PAUSE_S
    while transfer.is_draining:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
