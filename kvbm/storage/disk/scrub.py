"""Reading a whole slab and comparing every block with its checksum; forgetting bad blocks, or all of them.

All of it holds the slab's lock. Blocks are read in the order of their slots, by threads that only read; nothing is
written before all blocks were read, so that whoever interrupts leaves everything as it was.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.errors import StorageError, wrong_num_threads
from kvbm.storage.disk.calls import DIRECT_NBYTES, OsCalls, aligned_empty, move_all, retry
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT, Header, RecordArray
from kvbm.storage.disk.index import SlabIndex
from kvbm.storage.disk.reader import SlabName, SlabReader
from kvbm.types import IdArray

GOOD, MISMATCH, UNREADABLE = 0, 1, 2  # what came of a block

_RUN_NBYTES = 4 << 20  # of one read
_RECORDS_IN_PAGE = DIRECT_NBYTES // RECORD_NBYTES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScrubReport:
    """What a scrub found.

    Attributes
    ----------
    num_blocks : int
        That were read and compared.
    slots : (num_bad,) int32
        Those whose block is bad.
    hashes : (num_bad, 2) uint64
    outcomes : (num_bad,) uint8
        Why: `MISMATCH` or `UNREADABLE`.
    num_damaged : int
        Records that are not believed: a restart passes them by.
    num_dropped : int
        Records that were voided, of bad blocks and damaged ones.
    nbytes : int
        Bytes of the blocks.
    seconds : float
    io_mode : str
        "direct" or "buffered".
    error : str
        The first that the system gave; empty where none.
    """

    num_blocks: int
    slots: IdArray
    hashes: npt.NDArray[np.uint64]
    outcomes: npt.NDArray[np.uint8]
    num_damaged: int
    num_dropped: int
    nbytes: int
    seconds: float
    io_mode: str
    error: str

    @property
    def num_mismatches(self) -> int:
        """Blocks whose bytes are not what was written."""
        return int(np.count_nonzero(self.outcomes == MISMATCH))

    @property
    def num_unreadable(self) -> int:
        """Blocks that the system could not read."""
        return int(np.count_nonzero(self.outcomes == UNREADABLE))

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong."""
        return not len(self.slots) and not self.num_damaged


class SlabScrub:
    """A slab that is held to be scrubbed or cleared; a context manager.

    Parameters
    ----------
    slab : SlabName
    lock_timeout_s : float
        Seconds to wait for another owner to be gone.
    os_calls : OsCalls, optional

    Attributes
    ----------
    header : Header
    num_blocks : int
        Blocks that a scrub will read.
    num_dropped : int
        Records voided so far.

    Raises
    ------
    StorageError
        With errno and path: it is not there, cannot be read or written, or another process holds it (EBUSY).
    SlabFormatError
        No copy of its header can be read.
    """

    def __init__(self, slab: SlabName, *, lock_timeout_s: float = 2.0, os_calls: OsCalls | None = None) -> None:
        self.slab = slab
        self._os = os_calls or OsCalls()
        self._reader = SlabReader(slab, lock_timeout_s=lock_timeout_s, os_calls=self._os)
        try:
            self._records, self._is_live, self._is_damaged = self._reader.read_records()
        except BaseException:
            self._reader.close()
            raise
        assert self._reader.header is not None, "there are records"
        self.header: Header = self._reader.header
        self.num_blocks = int(np.count_nonzero(self._is_live))
        self.num_dropped = 0

    def run(
        self,
        *,
        drop: bool = False,
        num_threads: int = 4,
        use_direct_io: bool = True,
        backend: Backend | None = None,
        on_progress: Progress | None = None,
    ) -> ScrubReport:
        """Read every block and compare its checksum.

        Parameters
        ----------
        drop : bool
            In the end, void the records of bad blocks, and damaged ones, on the medium.
        num_threads : int
            That read and compute.
        use_direct_io : bool
            Go around the page cache where the file system allows.
        backend : Backend, optional
            The twin that computes checksums.
        on_progress : callable, optional
            Called in this thread with the blocks and bytes that were read since the last call; may raise, which ends
            the scrub and leaves everything as it was.

        Raises
        ------
        ConfigError
            `num_threads` is below 1.
        StorageError
            With errno and path: the data file cannot be opened, or records could not be voided; then the message says
            how many were. A block that cannot be read is no error: it is bad.
        """
        if num_threads < 1:
            raise wrong_num_threads(num_threads)
        began = time.monotonic()
        fd, io_mode = self._reader.open_data(use_direct_io=use_direct_io)
        try:
            work = _Work(
                fd,
                self.header,
                records=self._records,
                is_live=self._is_live,
                is_direct=io_mode == "direct",
                backend=backend or default_backend(),
                os_calls=self._os,
            )
            work.run(num_threads, on_progress)
        finally:
            os.close(fd)
        bad = np.flatnonzero(work.outcomes)
        if drop:
            self._void(np.flatnonzero(self._is_damaged | (work.outcomes != GOOD)))
        return ScrubReport(
            num_blocks=self.num_blocks,
            slots=bad.astype(np.int32),
            hashes=np.ascontiguousarray(self._records["hash"][bad]),
            outcomes=work.outcomes[bad],
            num_damaged=int(np.count_nonzero(self._is_damaged)),
            num_dropped=self.num_dropped,
            nbytes=self.num_blocks * self.header.block_nbytes,
            seconds=time.monotonic() - began,
            io_mode=io_mode,
            error=work.first_error,
        )

    def clear(self) -> None:
        """Forget everything the slab holds, on the medium when this returns.

        Raises
        ------
        StorageError
            The system refused: a restart may find it.
        """
        try:
            # It shall go on as it is, so nothing can mismatch; no record is read or written, the generation is raised.
            SlabIndex(
                self._reader.index_fd, self.header, on_mismatch="refuse", os_calls=self._os, path=str(self.slab)
            ).clear()
        except OSError as error:
            text = f"could not be forgotten: {(error.strerror or str(error)).lower()}"
            raise StorageError(error.errno or errno.EIO, text, str(self.slab)) from error

    def close(self) -> None:
        """Give the slab free; may be called twice."""
        self._reader.close()

    def __enter__(self) -> SlabScrub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _void(self, slots: npt.NDArray[np.intp]) -> None:
        """Overwrite records with zeros, by pages, and bring that to the medium."""
        try:
            for page in np.unique(slots // _RECORDS_IN_PAGE):
                first = int(page) * _RECORDS_IN_PAGE
                mine = slots[slots // _RECORDS_IN_PAGE == page]
                self._records[mine] = np.zeros(1, dtype=self._records.dtype)
                rows = self._records[first : first + _RECORDS_IN_PAGE]
                data = memoryview(rows.view(np.uint8).data)
                offset = RECORDS_AT + first * RECORD_NBYTES
                if move_all(self._os.pwritev, self._reader.index_fd, data, offset) != len(data):
                    raise OSError(errno.EIO, "a write moved nothing")
                self.num_dropped += len(mine)
            self._os.fdatasync(self._reader.index_fd)
        except OSError as error:
            text = f"{self.num_dropped} of {len(slots)} records voided, then: {(error.strerror or str(error)).lower()}"
            raise StorageError(error.errno or errno.EIO, text, str(self.slab)) from error


class _Work:
    """Runs of adjacent blocks, shared among threads; each block's outcome is written by one of them."""

    def __init__(
        self,
        fd: int,
        header: Header,
        *,
        records: RecordArray,
        is_live: npt.NDArray[np.bool_],
        is_direct: bool,
        backend: Backend,
        os_calls: OsCalls,
    ) -> None:
        self._fd, self._header, self._records, self._backend, self._os = fd, header, records, backend, os_calls
        self._page = DIRECT_NBYTES if is_direct else 1
        self._rows_at_once = max(1, _RUN_NBYTES // header.slot_nbytes)
        self._runs = _runs_of(np.flatnonzero(is_live), self._rows_at_once)
        self._lock = threading.Lock()  # of the iterator and of the first error
        self._is_over = threading.Event()
        self._done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()  # blocks, or how a thread ended
        self.outcomes = np.zeros(len(records), dtype=np.uint8)
        self.first_error = ""

    def run(self, num_threads: int, on_progress: Progress | None) -> None:
        """Work until all is read; raises what a thread or `on_progress` raised, when no thread is left."""
        threads: list[threading.Thread] = []
        failure: BaseException | None = None
        try:
            for _ in range(num_threads):
                threads.append(threading.Thread(target=self._work, name="kvbm-scrub", daemon=True))
                threads[-1].start()
            num_running = num_threads
            while num_running:
                message = self._done.get()
                if isinstance(message, int):
                    if on_progress is not None:
                        on_progress(message, message * self._header.block_nbytes)
                    continue
                num_running -= 1
                if message is not None:
                    failure = failure or message
                    self._is_over.set()
        finally:
            self._is_over.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if failure is not None:
            raise failure

    def _work(self) -> None:
        try:
            memory = aligned_empty(self._rows_at_once, self._header.slot_nbytes)
            while not self._is_over.is_set():
                with self._lock:
                    run = next(self._runs, None)
                if run is None:
                    break
                self._compare(*run, memory)
                self._done.put(run[1] - run[0])
        except BaseException as error:
            self._done.put(error)
            return
        self._done.put(None)

    def _compare(self, first: int, last: int, memory: npt.NDArray[np.uint8]) -> None:
        """Judge the blocks in slots first..last-1."""
        n = last - first
        is_read = self._read(first, memory[:n])
        places = np.flatnonzero(is_read)
        addresses = np.uint64(memory.ctypes.data) + places.astype(np.uint64) * np.uint64(self._header.slot_nbytes)
        records = self._records[first:last]
        checksums = self._backend.checksum_blocks(
            addresses,
            np.zeros(1, dtype=np.uint64),
            self._header.block_nbytes,
            np.ascontiguousarray(records["hash"][places]),
        )
        outcomes = np.full(n, UNREADABLE, dtype=np.uint8)
        outcomes[places] = np.where(checksums == records["checksum"][places], GOOD, MISMATCH)
        self.outcomes[first:last] = outcomes

    def _read(self, first: int, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Read adjacent slots in one go; where that ends early, one by one; tell which blocks came whole."""
        nbytes, error = self._read_at(first, rows)
        ends = np.arange(len(rows)) * self._header.slot_nbytes + self._header.block_nbytes
        is_read: npt.NDArray[np.bool_] = ends <= nbytes
        for i in np.flatnonzero(~is_read).tolist():
            if len(rows) > 1:
                nbytes, error = self._read_at(first + i, rows[i : i + 1])
                is_read[i] = nbytes >= self._header.block_nbytes
            if not is_read[i]:
                self._note(f"slot {first + i}: {error}")
        return is_read

    def _read_at(self, slot: int, rows: npt.NDArray[np.uint8]) -> tuple[int, str]:
        """Read until all has come, the file ends or the system refuses; give the bytes that came, and what ended it."""
        data, offset = memoryview(rows.reshape(-1).data), slot * self._header.slot_nbytes
        num_read = 0
        try:
            while num_read < len(data):
                count = retry(self._os.preadv, self._fd, [data[num_read:]], offset + num_read)
                is_end = num_read + count == len(data)
                whole = count if is_end else count // self._page * self._page  # direct I/O goes on from a whole page
                num_read += whole
                if not whole:
                    return num_read + count, f"the data file ends {len(data) - num_read - count} bytes early"
        except OSError as error:
            return num_read, (error.strerror or str(error)).lower()
        return num_read, ""

    def _note(self, error: str) -> None:
        with self._lock:
            self.first_error = self.first_error or error


def scrub_slab(slab: SlabName, *, lock_timeout_s: float = 2.0, **arguments: Any) -> ScrubReport:
    """Hold a slab, read every block and compare its checksum; see `SlabScrub.run` for arguments and errors."""
    with SlabScrub(slab, lock_timeout_s=lock_timeout_s) as scrub:
        return scrub.run(**arguments)


def clear_slab(slab: SlabName, *, lock_timeout_s: float = 2.0) -> int:
    """Hold a slab and forget what it holds; give the number of blocks."""
    with SlabScrub(slab, lock_timeout_s=lock_timeout_s) as scrub:
        scrub.clear()
        return scrub.num_blocks


def _runs_of(slots: npt.NDArray[np.intp], max_rows: int) -> Iterator[tuple[int, int]]:
    """Give runs first..last-1 of adjacent slots, in order, none longer than `max_rows`."""
    if not len(slots):
        return
    ends = np.flatnonzero(np.diff(slots) != 1) + 1
    for part in np.split(slots, ends):
        first, last = int(part[0]), int(part[-1]) + 1
        for start in range(first, last, max_rows):
            yield start, min(start + max_rows, last)
