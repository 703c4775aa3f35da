"""The index of a slab: what each slot holds, kept so that a restart finds it.

Records reach the kernel as soon as a block's bytes have, so that a killed process loses nothing; `sync` brings them to
the medium, so that a power cut loses at most what came after it. No order of writes is relied on: a record is believed
only if its CRC holds, a block only if its checksum does. One lock guards records and file; it is held for bookkeeping
and writes to the page cache, and for one sync where something is forgotten. Another, taken before it, lets one sync run
at a time: the system tells of a failure once, and whoever forgets has to hear of it.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvbm.errors import SlabFormatError
from kvbm.storage.disk.calls import OsCalls, move_all, retry
from kvbm.storage.disk.format import (
    FREE,
    HEADER_NBYTES,
    LIVE,
    NUM_HEADERS,
    RECORD_DTYPE,
    RECORD_NBYTES,
    RECORDS_AT,
    Header,
    RecordArray,
    SlabVersionError,
    choose_header,
    encode_header,
    is_last_of_its_name,
    is_live,
    seal,
)
from kvbm.types import HashArray, IdArray

_log = logging.getLogger("kvbm.storage.disk")

_PAGE_SLOTS = 64  # records are written by pages, never in smaller pieces
_ORDER_BITS = 16  # of a stamp, below its seconds
_RUN_PAGES = 256  # of one write, so that the lock is never held for long


class SlabIndex:
    """Records of all slots, in memory and in a file.

    Parameters
    ----------
    fd : int
        Of the index file, open for reading and writing; the caller's.
    header : Header
        What the slab shall be; `sequence`, `generation` and `made_at` are taken from the file where it has them.
    on_mismatch : str
        "refuse", or "replace": forget a slab of another fingerprint, shape or version.
    os_calls : OsCalls
    path : str
        For messages.
    clock : callable
        Gives seconds since 1970.

    Attributes
    ----------
    header : Header
    num_damaged : int
        Records that were found and not believed; those of an older generation are not damaged.
    num_failures : int
        Writes of records and syncs that the system refused.

    Raises
    ------
    SlabFormatError
        The file holds a slab of another fingerprint, shape or version; both are in the message.
    """

    def __init__(
        self,
        fd: int,
        header: Header,
        *,
        on_mismatch: str,
        os_calls: OsCalls,
        path: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._fd = fd
        self._os = os_calls
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._records: RecordArray = np.zeros(header.num_slots, dtype=RECORD_DTYPE)
        self._syncing = threading.Lock()  # taken before `_lock`
        self._next_stamp = 0  # seconds since 1970, and an order within them
        num_pages = -(-header.num_slots // _PAGE_SLOTS)
        self._is_dirty = np.zeros(num_pages, dtype=np.bool_)  # in memory only
        self._is_unsynced = np.zeros(num_pages, dtype=np.bool_)  # written since the last sync
        self._is_owed = np.zeros(num_pages, dtype=np.bool_)  # the medium may hold what was forgotten, be it long ago
        self._owes_header = False
        self._last_error: OSError | None = None
        self.num_damaged = 0
        self.num_failures = 0
        self.header = header
        self._is_new = True  # the file was empty
        self._is_warm = (found := self._find(header, on_mismatch)) is not None
        if found is None and not self._is_new:  # records beyond those that are voided now must never count
            self.header = replace(self.header, generation=secrets.randbits(32))
        if found is not None:
            self.header = replace(header, made_at=found.made_at, sequence=found.sequence, generation=found.generation)

    def begin(self) -> None:
        """Read the records of a slab that is continued, and write the header; the file has its size by now."""
        if self._is_warm:
            self._load()
        with self._lock:
            if not self._is_warm and not self._is_new:  # records of what is replaced must not count later
                self._is_owed[:] = True
                self._pay()
            self._write_header()

    # -- what slots hold ---------------------------------------------------------------------------------------

    def put(
        self,
        slots: IdArray,
        hashes: HashArray,
        parents: HashArray,
        checksums: npt.NDArray[np.uint64],
        priorities: npt.NDArray[np.uint8],
    ) -> None:
        """Note what slots hold whose bytes were just written; a head comes before its tail."""
        if not len(slots):
            return
        with self._lock:
            rows = np.zeros(len(slots), dtype=RECORD_DTYPE)
            rows["hash"], rows["parent"], rows["checksum"], rows["priority"] = hashes, parents, checksums, priorities
            rows["length"], rows["generation"], rows["state"] = self.header.block_nbytes, self.header.generation, LIVE
            rows["used_at"][::-1], rows["order"][::-1] = self._stamps(len(slots))  # a tail leaves before its head
            rows["written_at"] = int(self._clock()) & 0xFFFFFFFF
            self._records[slots] = seal(rows)
            self._write(slots)

    def void(self, slots: IdArray) -> None:
        """Note that slots are about to be overwritten, so that a record never outlives its bytes."""
        with self._lock:
            live = slots[self._records["state"][slots] == LIVE]
            if len(live):
                self._records[live] = np.zeros(1, dtype=RECORD_DTYPE)
                self._write(live)

    def forget(self, hashes: HashArray, only: IdArray | None = None) -> None:
        """Void the records of these hashes, in all slots or `only` in these, on the medium when this returns.

        Raises
        ------
        OSError
            The system refused: a restart may find them.
        """
        if not len(hashes):
            return
        wanted = set(_keys_of(hashes))
        with self._syncing, self._lock:
            candidates = self._candidates(hashes) if only is None else only
            keys = _keys_of(self._records["hash"][candidates])
            slots = np.array(
                [slot for slot, key in zip(candidates, keys, strict=True) if key in wanted], dtype=np.int32
            )
            self._records[slots] = np.zeros(1, dtype=RECORD_DTYPE)
            self._is_owed[slots // _PAGE_SLOTS] = True
            self._pay()

    def _candidates(self, hashes: HashArray) -> npt.NDArray[np.intp]:
        is_candidate = np.isin(self._records["hash"][:, 0], hashes[:, 0])
        return np.flatnonzero(is_candidate & (self._records["state"] == LIVE))

    def clear(self) -> None:
        """Void every record, on the medium when this returns.

        Raises
        ------
        OSError
            The system refused: a restart may find them.
        """
        with self._syncing, self._lock:
            self._records[:] = np.zeros(1, dtype=RECORD_DTYPE)
            self.header = replace(self.header, generation=(self.header.generation + 1) & 0xFFFFFFFF)
            try:
                self._write_header()
            except OSError as error:  # the file may be of the old generation, and then its records count
                self._owes_header = True
                self._is_owed[:] = self._is_dirty[:] = True
                self._fail("write", error)
                raise
            self._is_owed[:] = self._is_dirty[:] = False  # records of an older generation do not count

    def touch(self, slots: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Note that slots were used, oldest first, where they still hold these hashes; `sync` writes it down."""
        with self._lock:
            kept = (self._records["state"][slots] == LIVE) & (self._records["hash"][slots] == hashes).all(axis=1)
            if not kept.any():
                return
            slots = slots[kept]
            rows = self._records[slots]
            rows["used_at"], rows["order"] = self._stamps(len(slots))
            rows["priority"] = priorities[kept]
            self._records[slots] = seal(rows)
            self._is_dirty[slots // _PAGE_SLOTS] = True

    def holds(self, slots: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which slots hold these hashes: (num_slots,) bool."""
        with self._lock:
            is_live_slot = self._records["state"][slots] == LIVE
            return is_live_slot & (self._records["hash"][slots] == hashes).all(axis=1)  # type: ignore[no-any-return]

    def live(self) -> tuple[IdArray, RecordArray]:
        """Give the slots that hold a block and their records, used longest ago first; each hash once."""
        with self._lock:
            slots = np.flatnonzero(self._records["state"] == LIVE)
            rows = self._records[slots]
        age = rows["used_at"].astype(np.uint64) << np.uint64(16) | rows["order"]
        order = np.argsort(age)
        slots, rows = slots[order], rows[order]
        is_youngest = is_last_of_its_name(rows["hash"])
        if not is_youngest.all():
            slots, rows = slots[is_youngest], rows[is_youngest]
        return slots.astype(np.int32), rows

    def checksums(self) -> tuple[IdArray, npt.NDArray[np.uint64]]:
        """Give the slots that hold a block, and its checksum."""
        with self._lock:
            slots = np.flatnonzero(self._records["state"] == LIVE)
            return slots.astype(np.int32), self._records["checksum"][slots]

    def close(self) -> None:
        """Write no more: the file's descriptor may soon be another's."""
        with self._lock:
            self._fd = -1

    # -- the medium --------------------------------------------------------------------------------------------

    @property
    def needs_sync(self) -> bool:
        """Whether something is not on the medium yet."""
        return bool(self._is_unsynced.any() or self._is_dirty.any()) or self._owes_header

    def sync(self) -> None:
        """Write down what `touch` noted, and bring everything to the medium; failures are counted and logged."""
        with self._syncing:
            self._pay_header()
            dirty = np.flatnonzero(self._is_dirty)
            for first in range(0, len(dirty), _RUN_PAGES):
                with self._lock:
                    pages = dirty[first : first + _RUN_PAGES]
                    self._write_pages(pages[self._is_dirty[pages]])
            if self._is_unsynced.any():
                lost = self._sync_index()
                with self._lock:
                    self._is_dirty[lost] = self._is_owed[lost] = True

    def _sync_index(self) -> npt.NDArray[np.intp]:
        """Sync; give the pages that may be lost, for the system takes those it could not sync for written."""
        pages = np.flatnonzero(self._is_unsynced)
        self._is_unsynced[pages] = False  # before: what is written meanwhile may come too late for this one
        try:
            retry(self._os.fdatasync, self._fd)
        except OSError as error:
            self._fail("sync", error)
            return pages
        return pages[:0]

    def _pay(self) -> None:
        """Bring what was forgotten to the medium, what failed before included; raise where the system refuses."""
        num_failures = self.num_failures
        self._pay_header()
        owed = np.flatnonzero(self._is_owed)
        self._write_pages(owed)
        lost = self._sync_index()
        if self.num_failures > num_failures:
            self._is_dirty[lost] = self._is_owed[lost] = True
            assert self._last_error is not None
            raise self._last_error
        self._is_owed[:] = False

    def _pay_header(self) -> None:
        if not self._owes_header:
            return
        try:
            self._write_header()
            self._owes_header = False
        except OSError as error:
            self._fail("write", error)

    def _write(self, slots: IdArray) -> None:
        self._write_pages(np.unique(slots // _PAGE_SLOTS))

    def _write_pages(self, pages: npt.NDArray[np.intp]) -> None:
        """Write whole pages of records, adjacent ones together; what fails stays dirty and is tried by `sync`."""
        data = self._bytes()
        page_nbytes = _PAGE_SLOTS * RECORD_NBYTES
        first = 0
        for i in range(1, len(pages) + 1):
            if i < len(pages) and pages[i] == pages[i - 1] + 1:
                continue
            run = pages[first:i]
            begin, end = int(run[0]) * page_nbytes, (int(run[-1]) + 1) * page_nbytes
            part = data[begin:end]
            try:
                if move_all(self._os.pwritev, self._fd, part, RECORDS_AT + begin) != len(part):
                    raise OSError(errno.EIO, "a write moved nothing")
                self._is_dirty[run] = False
                self._is_unsynced[run] = True
            except OSError as error:
                self._is_dirty[run] = self._is_owed[run] = True
                self._fail("write", error)
            first = i

    def _bytes(self) -> memoryview:
        return memoryview(self._records.view(np.uint8).data)

    def _write_header(self) -> None:
        """Write both copies, one after the other, so that one of them is whole at any moment."""
        self.header = replace(self.header, sequence=self.header.sequence + 1)
        data = memoryview(encode_header(self.header))
        for copy in range(NUM_HEADERS):
            if move_all(self._os.pwritev, self._fd, data, copy * HEADER_NBYTES) != len(data):
                raise OSError(errno.EIO, "a write of the index header moved nothing")
            retry(self._os.fdatasync, self._fd)

    def _fail(self, verb: str, error: OSError) -> None:
        level = logging.DEBUG if self.num_failures else logging.WARNING
        self.num_failures += 1
        self._last_error = error
        _log.log(level, "disk index %s failed path=%s error=%s", verb, self._path, error)

    # -- opening -----------------------------------------------------------------------------------------------

    def _find(self, wanted: Header, on_mismatch: str) -> Header | None:
        """Give the header of the slab that is continued; None where there is nothing to continue."""
        data = bytearray(NUM_HEADERS * HEADER_NBYTES)
        num_read = move_all(self._os.preadv, self._fd, memoryview(data), 0)
        if not num_read:
            return None
        self._is_new = False
        try:
            found = choose_header([bytes(data[i * HEADER_NBYTES :][:HEADER_NBYTES]) for i in range(NUM_HEADERS)])
        except SlabVersionError as error:
            if on_mismatch == "replace":
                _log.warning("disk slab replaced path=%s reason=%s", self._path, error)
                return None
            raise SlabFormatError(f"{self._path}: {error}") from error
        except SlabFormatError as error:
            if any(data):
                _log.warning("disk slab starts empty path=%s reason=%s", self._path, error)
            return None
        names = ("fingerprint", "block_nbytes", "slot_nbytes")
        wrong = [
            f"{name} {getattr(found, name)!r}, expected {getattr(wanted, name)!r}"
            for name in names
            if getattr(found, name) != getattr(wanted, name)
        ]
        if not wrong:
            return found
        if on_mismatch == "replace":
            _log.warning("disk slab replaced path=%s reason=it has %s", self._path, "; ".join(wrong))
            return None
        raise SlabFormatError(
            f"{self._path} is of another model or layout: it has {'; '.join(wrong)}. Give another directory or slab "
            "name, or on_mismatch='replace' to forget what it holds"
        )

    def _load(self) -> None:
        data = self._bytes()
        num_read = move_all(self._os.preadv, self._fd, data, RECORDS_AT)
        data[num_read:] = bytes(len(data) - num_read)
        good = is_live(self._records, self.header)
        is_ours = self._records["generation"] == self.header.generation
        self.num_damaged = int(np.count_nonzero((self._records["state"] != FREE) & is_ours & ~good))
        self._records[~good] = np.zeros(1, dtype=RECORD_DTYPE)
        seconds = self._records["used_at"].astype(np.int64)
        self._next_stamp = int(((seconds << _ORDER_BITS) | self._records["order"]).max(initial=0)) + 1

    def _stamps(self, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Give n rising stamps: seconds, and an order within each.

        What comes now is younger than all before, be the clock set back or a second full of stamps.
        """
        first = max(int(self._clock()) << _ORDER_BITS, self._next_stamp)
        self._next_stamp = first + n
        stamps = np.arange(first, first + n, dtype=np.int64)
        return (stamps >> _ORDER_BITS) & 0xFFFFFFFF, stamps & ((1 << _ORDER_BITS) - 1)


def _keys_of(hashes: HashArray) -> list[bytes]:
    return np.ascontiguousarray(hashes).view("V16").ravel().tolist()  # type: ignore[no-any-return]
