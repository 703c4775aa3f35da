"""A bounded ring of aligned host memory: where bytes land that cannot be called back.

Reads from disks and networks go here first; the last hop into memory that somebody may reuse is a short copy. Slots
are given back by whoever sees the I/O end, so one that never ends costs its slots, never a wrong byte.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.gpu import Gpu
from kvbm.layout import BlockLayout
from kvbm.storage.host import HostStorage
from kvbm.types import IdArray

_ALIGNMENT = 4096


class StagingRing:
    """Slots of one block each, taken and given back in batches; safe from any thread.

    Parameters
    ----------
    layout : BlockLayout
        Of the tier whose blocks pass through; the slots hold the same bytes without gaps.
    num_slots : int
    gpu : Gpu, optional
        Pin the slots for this device.
    backend : Backend, optional
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    storage : HostStorage
        The slots as a storage, for copies.
    memory : (num_slots, slot_nbytes) uint8
        The slots as rows, for I/O.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_slots: int,
        *,
        gpu: Gpu | None = None,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"a staging ring needs 1 or more slots, got {num_slots}")
        self.num_slots = num_slots
        self.storage = HostStorage(layout.dense(num_slots, alignment=_ALIGNMENT), gpu=gpu, backend=backend)
        self.memory: npt.NDArray[np.uint8] = self.storage.buffers[0].reshape(num_slots, -1)
        self._clock = clock
        self._free: deque[int] = deque(range(num_slots))
        self._has_slots = threading.Condition()

    def take(self, n: int, deadline: float | None = None, *, is_urgent: bool = True) -> IdArray:
        """Take up to n slots, at least one; none, when no slot became free before the deadline.

        Who is not urgent leaves half of the ring to others.
        """
        num_left = 0 if is_urgent else self.num_slots // 2
        with self._has_slots:
            while len(self._free) <= num_left:
                remaining_s = None if deadline is None else deadline - self._clock()
                if remaining_s is not None and remaining_s <= 0:
                    break
                self._has_slots.wait(None if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX))
            num_taken = max(0, min(n, len(self._free) - num_left))
            return np.array([self._free.popleft() for _ in range(num_taken)], dtype=np.int32)

    def give(self, slots: IdArray) -> None:
        """Give slots back; no byte of theirs moves any more."""
        with self._has_slots:
            self._free.extend(slots.tolist())
            self._has_slots.notify_all()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)
