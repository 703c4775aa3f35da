"""Waiting until no byte of a transfer moves, which may be after it has ended for its waiter.

A write may be given up while a client below still looks at its rows. They are somebody else's only afterwards.
"""

from __future__ import annotations

import threading
from typing import Any

from kvbm.jobs import Transfer
from kvbm.jobs.aside import standing_aside


def wait_until_landed(transfer: Transfer[Any]) -> None:
    """Wait for the end of a transfer and for its bytes.

    Parameters
    ----------
    transfer : Transfer

    Notes
    -----
    Blocks, without a limit; returns at once where the bytes have landed, as they have nearly always.
    """
    transfer.wait()  # whoever waits looks at its deadline
    if not transfer.is_draining:
        return
    has_landed = threading.Event()
    transfer.add_landed_callback(lambda _: has_landed.set())
    with standing_aside():
        has_landed.wait()
