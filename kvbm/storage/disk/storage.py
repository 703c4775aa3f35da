"""DiskStorage: blocks in one preallocated file, and an index by which a restart finds them.

Bytes and records are with the kernel when a write has ended, on the medium within `sync_interval_s`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.errors import ConfigError, StorageError, TransferTimeout, wrong_num_threads
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.storage.base import Storage, StorageCapabilities
from kvbm.storage.disk.calls import DIRECT_NBYTES, OsCalls, aligned_empty
from kvbm.storage.disk.choose import SubmittedBatch, check_engine, choose_engine
from kvbm.storage.disk.counters import DiskCounters
from kvbm.storage.disk.format import MAX_FINGERPRINT_NBYTES, Header
from kvbm.storage.disk.slab import Slab
from kvbm.storage.disk.wear import BytesPerDay, estimate_device_nbytes
from kvbm.types import DEFAULT_PRIORITY, HashArray, IdArray

ON_MISMATCH = ("refuse", "replace")


class DiskStorage(Storage):
    """Blocks in a slab: a data file of fixed slots and an index file, in a directory.

    Parameters
    ----------
    layout : BlockLayout
        A block takes its bytes, rounded up to 4096, in logical order.
    directory : path
        Where the files lie; made, for the owner only, where its parent exists.
    name : str
        Of the slab, without a folder: several ranks keep theirs in one directory. One storage at a time holds it.
    fingerprint : str
        What the blocks are of; a slab with another one is not continued. At most 2048 bytes.
    on_mismatch : str
        What to do with a slab of another fingerprint, block size or version: "refuse" it, or "replace" it, which
        forgets what it holds.
    engine : str
        What moves blocks: "uring" (a ring of the kernel's), "threads" (native), "python", or "auto": what a short probe
        shows to be faster, or cheaper; see `engine_name`.
    num_threads : int
        Threads that read and write, where the engine has them.
    depth : int
        Reads and writes that a native engine has under way at once.
    use_direct_io : bool
        Go around the page cache where an aligned probe shows that this works; see `io_mode`.
    max_queued_nbytes : int
        Bytes of reads, and as many of writes, that may be under way before a submitter waits.
    sync_interval_s : float
        Seconds after which what was written is on the medium: a power cut loses at most that.
    lock_timeout_s : float
        Seconds to wait for another owner to be gone.
    os_calls : OsCalls, optional
        The operating system; tests give another, which the native engines cannot use.
    backend : Backend, optional
        The twin to use; default by ``KVBM_BACKEND``. The pure one has no native engine.

    Raises
    ------
    StorageError
        With errno and path: the slab is in use, cannot be made or written, is a symbolic link, or has no room for all
        blocks. Nothing is left behind.
    SlabFormatError
        The slab is of another fingerprint, block size or version; both are named.
    ConfigError
        An impossible setting.

    Notes
    -----
    Blocks go straight between disk and memory where a row starts on a multiple of 4096 bytes and holds a whole slot;
    otherwise, under direct I/O, through a buffer of the thread. Adjacent blocks move in one call. Reads go before
    writes that wait; two calls that name the same block, one of them a write, must not be under way together. A failed
    block is False in its mask, counted and logged. The files stay when the storage is closed; `inventory` gives what
    was found in them. A slab may be opened with more or fewer blocks than it was made with. A forked child cannot use
    the storage of its parent.

    Examples
    --------
    >>> import tempfile
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    ... )
    >>> with tempfile.TemporaryDirectory() as parent, DiskStorage(layout, f"{parent}/blocks") as storage:
    ...     memory = np.full((2, layout.block_nbytes), 7, dtype=np.uint8)
    ...     ids, rows = np.array([3, 0], dtype=np.int32), np.array([0, 1], dtype=np.int32)
    ...     storage.submit_write(ids, memory, rows).result()
    array([ True,  True])
    """

    capabilities = StorageCapabilities(is_persistent=True)

    def __init__(
        self,
        layout: BlockLayout,
        directory: str | os.PathLike[str],
        *,
        name: str = "rank0",
        fingerprint: str = "",
        on_mismatch: str = "refuse",
        engine: str = "auto",
        num_threads: int = 4,
        depth: int = 32,
        use_direct_io: bool = True,
        max_queued_nbytes: int = 256 << 20,
        sync_interval_s: float = 1.0,
        lock_timeout_s: float = 2.0,
        os_calls: OsCalls | None = None,
        backend: Backend | None = None,
    ) -> None:
        if num_threads < 1:
            raise wrong_num_threads(num_threads)
        if max_queued_nbytes < 1:
            raise ConfigError(f"max_queued_nbytes is {max_queued_nbytes}, give 1 or more bytes")
        if not sync_interval_s > 0:
            raise ConfigError(f"sync_interval_s is {sync_interval_s}, give more than 0 seconds")
        if on_mismatch not in ON_MISMATCH:
            raise ConfigError(f"on_mismatch is {on_mismatch!r}, give one of {', '.join(ON_MISMATCH)}")
        if not os.fspath(directory) or "\0" in os.fspath(directory):
            raise ConfigError(f"directory {os.fspath(directory)!r} is impossible, give the path of a directory")
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise ConfigError(f"slab name {name!r} is impossible, give a plain name such as rank0")
        if (length := len(fingerprint.encode())) > MAX_FINGERPRINT_NBYTES:
            raise ConfigError(f"a fingerprint of {length} bytes is too long, give at most {MAX_FINGERPRINT_NBYTES}")
        disk_io = (backend or default_backend()).disk_io
        check_engine(engine, disk_io)
        super().__init__(layout)
        self.slot_nbytes = -(-layout.block_nbytes // DIRECT_NBYTES) * DIRECT_NBYTES
        calls = os_calls or OsCalls()
        header = Header(
            num_slots=layout.num_blocks,
            block_nbytes=layout.block_nbytes,
            slot_nbytes=self.slot_nbytes,
            made_at=time.time_ns(),
            sequence=0,
            generation=0,
            fingerprint=fingerprint,
        )
        self._slab = Slab(
            Path(directory).absolute(),
            name,
            header,
            use_direct_io=use_direct_io,
            on_mismatch=on_mismatch,
            sync_interval_s=sync_interval_s,
            lock_timeout_s=lock_timeout_s,
            os_calls=calls,
        )
        slots, checksums = self._slab.index.checksums()
        self.checksums[slots] = checksums
        self.has_checksum[slots] = True
        sizes = {"block_nbytes": layout.block_nbytes, "slot_nbytes": self.slot_nbytes, "num_threads": num_threads}
        limits = {"depth": depth, "max_queued_nbytes": max_queued_nbytes}
        try:
            choice = choose_engine(engine, self._slab, os_calls=calls, disk_io=disk_io, **sizes, **limits)
        except BaseException:
            self._slab.close()
            raise
        self.engine_name, self.engine_reason = choice.name, choice.reason
        self._engine = choice.engine
        self._bytes_per_day = BytesPerDay()
        self._wearing = threading.Lock()
        self._pid = os.getpid()
        weakref.finalize(self, self._engine.stop).atexit = False

    @property
    def path(self) -> Path:
        """The data file."""
        return self._slab.path

    @property
    def io_mode(self) -> str:
        """How the file is read and written: "direct" or "buffered"."""
        return self._slab.io_mode

    @property
    def io_mode_reason(self) -> str:
        """Why it is done that way."""
        return self._slab.files.io_mode_reason

    @property
    def is_sparse(self) -> bool:
        """Whether the file system could not preallocate: a write may then still find the disk full."""
        return self._slab.files.is_sparse

    @property
    def counters(self) -> DiskCounters:
        """What was done so far; the live object."""
        return self._engine.counters

    @property
    def bytes_per_day(self) -> BytesPerDay:
        """Bytes of slots written, in all and in the last 24 hours; the live object."""
        return self._bytes_per_day

    @property
    def device_nbytes(self) -> int:
        """What a device has written to its medium for those bytes, as far as can be estimated from outside."""
        return estimate_device_nbytes(self._bytes_per_day.total_nbytes, self.slot_nbytes)

    @property
    def slab(self) -> Slab:
        """The files behind it, which count what the system refused."""
        return self._slab

    def submit_read(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, hashes: HashArray | None = None
    ) -> Transfer[npt.NDArray[np.bool_]]:
        """Begin to copy blocks out; see `Storage.submit_read`.

        Notes
        -----
        Returns at once; waits for room while `max_queued_nbytes` are under way. Cancelled before it began, it does not.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=True)
        return self._engine.submit(True, ids, memory, places).transfer

    def submit_write(
        self,
        block_ids: IdArray,
        memory: npt.NDArray[np.uint8],
        rows: IdArray,
        *,
        hashes: HashArray | None = None,
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> Transfer[npt.NDArray[np.bool_]]:
        """Begin to copy blocks in; see `Storage.submit_write`.

        Notes
        -----
        Returns at once; waits for room while `max_queued_nbytes` are under way. Cancelled before it began, it does not.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=False)
        self._slab.index.void(ids)
        return self._engine.submit(False, ids, memory, places).transfer

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Copy blocks out: (num_blocks, block_nbytes) uint8, host.

        Raises
        ------
        StorageError
            With errno and path: a block could not be read.
        """
        ids = self._begin(block_ids)
        self._refuse_to_wait_for_itself()
        memory = aligned_empty(len(ids), self.layout.block_nbytes)
        self._finish(self._engine.submit(True, ids, memory, np.arange(len(ids))), ids)
        return memory

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Copy blocks in: (num_blocks, block_nbytes) uint8, host.

        Raises
        ------
        StorageError
            With errno and path: a block could not be written.
        """
        ids = self._begin(block_ids)
        data = self._checked_data(ids, data)
        self._refuse_to_wait_for_itself()
        self.has_checksum[ids] = False
        self._slab.index.void(ids)
        self._finish(self._engine.submit(False, ids, data, np.arange(len(ids))), ids)

    # -- books -------------------------------------------------------------------------------------------------

    def record(
        self,
        block_ids: IdArray,
        *,
        hashes: HashArray,
        checksums: npt.NDArray[np.uint64] | None,
        parents: HashArray | None = None,
        priorities: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Note what slots hold; without checksums a restart could not tell good bytes from bad, and finds nothing."""
        self._refuse_forks()
        super().record(block_ids, hashes=hashes, checksums=checksums)
        if checksums is not None:
            self._slab.index.put(
                block_ids,
                hashes,
                np.zeros_like(hashes) if parents is None else parents,
                checksums,
                np.full(len(hashes), DEFAULT_PRIORITY, dtype=np.uint8) if priorities is None else priorities,
            )
        with self._wearing:
            self._bytes_per_day.add(len(block_ids) * self.slot_nbytes)
        self._slab.note(has_data=True)

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Tell which slots hold whole blocks of these hashes, by their records: (num_blocks,) bool."""
        return self._slab.index.holds(block_ids, hashes)

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:
        """Void the records of slots whose bytes are bad."""
        self._refuse_forks()
        self.has_checksum[block_ids] = False
        self._slab.index.void(block_ids)
        self._slab.note(has_data=False)

    def forget(self, hashes: HashArray, block_ids: IdArray | None = None) -> None:
        """Void the records of these hashes, in these slots or wherever they lie, on the medium when it returns.

        Raises
        ------
        OSError
            The system refused: a restart may find them.
        """
        self._refuse_forks()
        self._slab.index.forget(hashes, block_ids)

    def clear(self) -> None:
        """Void every record, on the medium when it returns; raises `OSError` as `forget` does."""
        self._refuse_forks()
        self._slab.index.clear()

    def touch(self, block_ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        """Note that blocks were used, oldest first, and their priorities."""
        self._refuse_forks()
        self._slab.index.touch(block_ids, hashes, priorities)
        self._slab.note(has_data=False)

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        """Give ids, hashes, parents and priorities of the blocks that the slab holds, used longest ago first."""
        slots, records = self._slab.index.live()
        names = (np.ascontiguousarray(records[field]) for field in ("hash", "parent", "priority"))
        return slots, *names  # type: ignore[return-value]

    def sync(self) -> None:
        """Bring everything that was written before to the medium; failures are logged and counted."""
        self._refuse_forks()
        self._slab.sync()

    def close(self, timeout: float | None = None) -> None:
        """Let queued I/O end, stop the threads, and give the directory free; may be called again.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; None waits for as long as it takes.

        Raises
        ------
        TransferTimeout
            I/O is still under way; nothing new is taken, the files are closed when it ends, and closing again waits
            for it again.

        Notes
        -----
        In a callback of one of its transfers it does not wait: the files are closed soon after the callback.
        """
        super().close(timeout)
        if os.getpid() != self._pid:  # the threads are the parent's
            self._slab.files.close()
            return
        give_up = None if timeout is None else time.monotonic() + timeout
        self._engine.close(timeout)
        if not self._slab.wait_until_closed(None if give_up is None else max(0.0, give_up - time.monotonic())):
            raise TransferTimeout(f"the last sync has not ended after {timeout} s ({self.path})")

    def _begin(self, block_ids: IdArray) -> IdArray:
        self._refuse_forks()
        return super()._begin(block_ids)

    def _refuse_forks(self) -> None:
        if os.getpid() != self._pid:
            text = f"this storage was opened by process {self._pid}: a forked process must open its own directory"
            raise StorageError(errno.EPERM, text, str(self.path))

    def _refuse_to_wait_for_itself(self) -> None:
        if self._engine.is_worker:
            text = "read and write cannot wait in a callback of a transfer: use submit_read and submit_write there"
            raise StorageError(errno.EDEADLK, text, str(self.path))

    def _finish(self, batch: SubmittedBatch, ids: IdArray) -> None:
        good = batch.transfer.result()
        if good.all():
            return
        verb, error = "read" if batch.is_read else "write", batch.error
        wrong = ids[~good].tolist()
        code = errno.EIO if error is None else error.errno or errno.EIO
        names = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        text = f"could not {verb} {len(wrong)} of {len(ids)} blocks ({names}): {os.strerror(code).lower()}"
        raise StorageError(code, text, str(self.path)) from error
