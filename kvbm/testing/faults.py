"""A storage that misbehaves on order: it fails, delays, tears, flips a bit, or never answers.

Nothing here sleeps: what is delayed waits at a gate that the test opens. One lock guards what is held; it is not held
while bytes move or a callback runs.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.jobs import Transfer
from kvbm.storage.base import Storage
from kvbm.testing.fault_plan import FaultMode, FaultPlan, Injection
from kvbm.types import HashArray, IdArray

__all__ = ["FaultMode", "FaultPlan", "FaultyStorage", "Injection"]

MaskTransfer = Transfer[npt.NDArray[np.bool_]]

_POISON = 0xEE


class FaultyStorage(Storage):
    """A storage whose calls go wrong as a plan says; it shares its checksums with the storage that it wraps.

    Parameters
    ----------
    storage : Storage
        Closed with this one.
    faults : FaultPlan

    Notes
    -----
    It has no addresses, even where the wrapped storage has them, so that no copy goes around it. A delayed call of
    `read` or `write` waits in its caller until another thread calls `release`.

    Examples
    --------
    >>> from kvbm.layout import BlockLayout
    >>> from kvbm.storage import HostStorage
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=1, outer_dim=1, block_size=4, inner_dim=4, dtype="uint8"
    ... )
    >>> storage = FaultyStorage(HostStorage(layout), FaultPlan([FaultMode.DELAY]))
    >>> rows = np.array([0], dtype=np.int32)
    >>> written = storage.submit_write(np.array([2], dtype=np.int32), np.ones((1, 16), dtype=np.uint8), rows)
    >>> written.done(), storage.release(), written.result()
    (False, 1, array([ True]))
    """

    def __init__(self, storage: Storage, faults: FaultPlan) -> None:
        super().__init__(storage.layout)
        self.storage = storage
        self.faults = faults
        self.capabilities = replace(storage.capabilities, is_addressable=False)
        self.keeps_checksums = storage.keeps_checksums
        self.checksums = storage.checksums
        self.has_checksum = storage.has_checksum
        self._gate = threading.Condition()
        self._held: list[tuple[MaskTransfer, Callable[[], None]]] = []  # delayed, with what lets each go
        self._unanswered: list[tuple[MaskTransfer, int]] = []  # never, with its number of blocks

    @property
    def num_held(self) -> int:
        """Delayed calls that wait for `release`."""
        return len(self._held)

    @property
    def num_unanswered(self) -> int:
        """Calls that wait for `abandon`."""
        return len(self._unanswered)

    def wait_until_held(self, num_calls: int, timeout: float = 60.0) -> bool:
        """Wait until that many calls are delayed or unanswered; False when `timeout` seconds pass before."""
        with self._gate:
            return self._gate.wait_for(lambda: len(self._held) + len(self._unanswered) >= num_calls, timeout)

    def release(self) -> int:
        """Let go, in order, what is delayed now; its bytes move from here on. Give the number of calls."""
        with self._gate:
            held, self._held = self._held, []
        for _, go in held:
            go()
        return len(held)

    def abandon(self) -> int:
        """Answer what never would: every block failed, no byte has moved. Give the number of calls."""
        with self._gate:
            unanswered, self._unanswered = self._unanswered, []
        for transfer, num_blocks in unanswered:
            transfer.set_result(np.zeros(num_blocks, dtype=np.bool_))
        return len(unanswered)

    def submit_read(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, hashes: HashArray | None = None
    ) -> MaskTransfer:
        """Begin to copy blocks out; see `Storage.submit_read`."""
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=True)
        injection = self.faults.choose(len(ids), is_read=True)
        nbytes = self.layout.block_nbytes

        def submit() -> MaskTransfer:
            return self.storage.submit_read(ids, memory, places.astype(np.int32), hashes=hashes)

        if injection is None:
            return submit()
        kept = memory[places[injection.places], :nbytes].copy()  # what a torn read leaves in its tail

        def spoil(good: npt.NDArray[np.bool_]) -> None:
            affected = places[injection.places]
            data = memory[affected, :nbytes]
            memory[affected, :nbytes] = _spoiled(injection, data, kept)
            if injection.mode is FaultMode.FAIL:
                good[injection.places] = False

        return self._answer(injection, len(ids), submit, spoil)

    def submit_write(
        self,
        block_ids: IdArray,
        memory: npt.NDArray[np.uint8],
        rows: IdArray,
        *,
        hashes: HashArray | None = None,
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> MaskTransfer:
        """Begin to copy blocks in; see `Storage.submit_write`."""
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=False)
        injection = self.faults.choose(len(ids), is_read=False)
        if injection is None or injection.mode in (FaultMode.DELAY, FaultMode.NEVER):
            source, source_rows = memory, places.astype(np.int32)
        else:
            source, source_rows = self._spoiled_copy(injection, ids, memory, places)

        def submit() -> MaskTransfer:
            return self.storage.submit_write(ids, source, source_rows, hashes=hashes, checksums=checksums)

        if injection is None:
            return submit()

        def spoil(good: npt.NDArray[np.bool_]) -> None:
            if injection.mode is FaultMode.FAIL:
                good[injection.places] = False

        return self._answer(injection, len(ids), submit, spoil)

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Copy blocks out: (num_blocks, block_nbytes) uint8, host; raises `StorageError` when a block failed."""
        ids = self._begin(block_ids)
        data = np.empty((len(ids), self.layout.block_nbytes), dtype=np.uint8)
        self._finish("read", ids, self.submit_read(ids, data, np.arange(len(ids), dtype=np.int32)))
        return data

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Copy blocks in: (num_blocks, block_nbytes) uint8, host; raises `StorageError` when a block failed."""
        ids = self._begin(block_ids)
        data = self._checked_data(ids, data)
        self._finish("write", ids, self.submit_write(ids, data, np.arange(len(ids), dtype=np.int32)))

    def record(
        self,
        block_ids: IdArray,
        *,
        hashes: HashArray,
        checksums: npt.NDArray[np.uint64] | None,
        parents: HashArray | None = None,
        priorities: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Note what slots hold, in the wrapped storage."""
        self.storage.record(block_ids, hashes=hashes, checksums=checksums, parents=parents, priorities=priorities)

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which slots hold whole blocks of these hashes: (num_blocks,) bool."""
        return self.storage.holds(block_ids, hashes)

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:
        """Note in the wrapped storage that what was read was bad."""
        self.storage.disown(block_ids, hashes)

    def forget(self, hashes: HashArray, block_ids: IdArray | None = None) -> None:
        """Make the wrapped storage forget these blocks."""
        self.storage.forget(hashes, block_ids)

    def clear(self) -> None:
        """Forget every block of the wrapped storage."""
        self.storage.clear()

    def touch(self, block_ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Note in the wrapped storage that blocks were used."""
        self.storage.touch(block_ids, hashes, priorities)

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        """Give what the wrapped storage found at opening."""
        return self.storage.inventory()

    def close(self, timeout: float | None = None) -> None:
        """Release what is held, abandon what never answers, and close the wrapped storage."""
        super().close(timeout)
        self.release()
        self.abandon()
        self.storage.close(timeout)

    # -- private -----------------------------------------------------------------------------------------------

    def _answer(
        self,
        injection: Injection,
        num_blocks: int,
        move: Callable[[], MaskTransfer],
        spoil: Callable[[npt.NDArray[np.bool_]], None],
    ) -> MaskTransfer:
        """Give a transfer of our own, that ends when the wrapped one has and the fault is done."""
        outer: MaskTransfer = Transfer()

        def finish(inner: MaskTransfer) -> None:
            try:
                good = inner.result().copy()
                spoil(good)
            except Exception as error:
                outer.set_exception(error)
            else:
                outer.set_result(good)

        def go() -> None:
            try:
                move().add_done_callback(finish)
            except Exception as error:  # the wrapped storage was closed meanwhile
                outer.set_exception(error)

        if injection.mode not in (FaultMode.DELAY, FaultMode.NEVER):
            go()
            return outer
        with self._gate:
            if injection.mode is FaultMode.DELAY:
                self._held.append((outer, go))
            else:
                self._unanswered.append((outer, num_blocks))
            self._gate.notify_all()
        return outer

    def _spoiled_copy(
        self, injection: Injection, ids: IdArray, memory: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint8], IdArray]:
        """Copy what is to be written, wrong where the plan says so."""
        data = memory[places, : self.layout.block_nbytes]
        try:
            kept = self.storage.read(ids[injection.places])  # what a torn write leaves in its tail
        except OSError:
            kept = np.full((len(injection.places), data.shape[1]), _POISON, dtype=np.uint8)
        data[injection.places] = _spoiled(injection, data[injection.places], kept)
        return data, np.arange(len(ids), dtype=np.int32)

    def _finish(self, verb: str, ids: IdArray, transfer: MaskTransfer) -> None:
        good = transfer.result()
        if not good.all():
            raise StorageError(errno.EIO, f"could not {verb} blocks {ids[~good].tolist()}", repr(self.storage))


def _spoiled(injection: Injection, data: npt.NDArray[np.uint8], kept: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Give affected blocks as the fault leaves them: (num_affected, block_nbytes)."""
    rng = np.random.default_rng(injection.seed)
    num_blocks, nbytes = data.shape
    spoiled: npt.NDArray[np.uint8] = data.copy()
    if injection.mode is FaultMode.FAIL:
        spoiled[:] = _POISON
    elif injection.mode is FaultMode.TEAR:
        for i in range(num_blocks):
            cut = int(rng.integers(0, nbytes))
            spoiled[i, cut:] = kept[i, cut:]
    elif injection.mode is FaultMode.FLIP:
        bits = (1 << rng.integers(0, 8, num_blocks)).astype(np.uint8)
        spoiled[np.arange(num_blocks), rng.integers(0, nbytes, num_blocks)] ^= bits
    return spoiled
