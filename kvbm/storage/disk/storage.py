"""DiskStorage: blocks in one preallocated file, moved by threads of its own.

This form forgets at opening what the file held: it makes room, it does not restore. Bytes are in the file when a write
has ended, on the medium when the operating system puts them there.
"""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, StorageError, wrong_num_threads
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.storage.base import Storage
from kvbm.storage.disk.engine import DiskCounters, DiskEngine
from kvbm.storage.disk.files import DIRECT_NBYTES, LOCK_NAME, DiskFiles, OsCalls, aligned_empty
from kvbm.storage.disk.mover import Batch
from kvbm.types import HashArray, IdArray


class DiskStorage(Storage):
    """Blocks in a file.

    Parameters
    ----------
    layout : BlockLayout
        A block takes its bytes, rounded up to 4096, in logical order.
    directory : path
        Where the file lies; made, for the owner only, where its parent exists. One storage at a time holds it.
    num_threads : int
        Threads that read and write.
    use_direct_io : bool
        Go around the page cache where an aligned probe shows that this works; see `io_mode`.
    file_name : str
        Without a folder.
    max_queued_nbytes : int
        Bytes of reads, and as many of writes, that may be under way before a submitter waits.
    os_calls : OsCalls, optional
        The operating system; tests give another.

    Raises
    ------
    StorageError
        With errno and path: the directory is in use, cannot be made or written, is a symbolic link, or has no room
        for all blocks. Nothing is left behind.
    ConfigError
        An impossible setting.

    Notes
    -----
    Blocks go straight between disk and memory where a row starts on a multiple of 4096 bytes and holds a whole slot;
    otherwise, under direct I/O, through a buffer of the thread. Adjacent blocks move in one call. Reads go before
    writes that wait; two calls that name the same block, one of them a write, must not be under way together. A failed
    block is False in its mask, counted and logged. The file stays when the storage is closed. A forked child cannot
    use the storage of its parent.

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

    def __init__(
        self,
        layout: BlockLayout,
        directory: str | os.PathLike[str],
        *,
        num_threads: int = 4,
        use_direct_io: bool = True,
        file_name: str = "blocks.kvbm",
        max_queued_nbytes: int = 256 << 20,
        os_calls: OsCalls | None = None,
    ) -> None:
        if num_threads < 1:
            raise wrong_num_threads(num_threads)
        if max_queued_nbytes < 1:
            raise ConfigError(f"max_queued_nbytes is {max_queued_nbytes}, give 1 or more bytes")
        if not os.fspath(directory) or "\0" in os.fspath(directory):
            raise ConfigError(f"directory {os.fspath(directory)!r} is impossible, give the path of a directory")
        if file_name in ("", ".", "..", LOCK_NAME) or Path(file_name).name != file_name or "\0" in file_name:
            raise ConfigError(f"file_name {file_name!r} is impossible, give a plain name other than {LOCK_NAME}")
        super().__init__(layout)
        self.slot_nbytes = -(-layout.block_nbytes // DIRECT_NBYTES) * DIRECT_NBYTES
        calls = os_calls or OsCalls()
        nbytes = layout.num_blocks * self.slot_nbytes
        self._files = DiskFiles(
            Path(directory).absolute(), file_name, nbytes, use_direct_io=use_direct_io, os_calls=calls
        )
        self._engine = DiskEngine(
            self._files,
            block_nbytes=layout.block_nbytes,
            slot_nbytes=self.slot_nbytes,
            num_threads=num_threads,
            max_queued_nbytes=max_queued_nbytes,
            os_calls=calls,
        )
        self._pid = os.getpid()
        weakref.finalize(self, self._engine.stop).atexit = False

    @property
    def path(self) -> Path:
        """The data file."""
        return self._files.path

    @property
    def io_mode(self) -> str:
        """How the file is read and written: "direct" or "buffered"."""
        return self._files.io_mode

    @property
    def io_mode_reason(self) -> str:
        """Why it is done that way."""
        return self._files.io_mode_reason

    @property
    def is_sparse(self) -> bool:
        """Whether the file system could not preallocate: a write may then still find the disk full."""
        return self._files.is_sparse

    @property
    def counters(self) -> DiskCounters:
        """What was done so far; the live object."""
        return self._engine.counters

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
        self._finish(self._engine.submit(False, ids, data, np.arange(len(ids))), ids)

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
        """
        super().close(timeout)
        if os.getpid() != self._pid:  # the threads are the parent's
            self._files.close()
            return
        self._engine.close(timeout)

    def _begin(self, block_ids: IdArray) -> IdArray:
        if os.getpid() != self._pid:
            text = f"this storage was opened by process {self._pid}: a forked process must open its own directory"
            raise StorageError(errno.EPERM, text, str(self.path))
        return super()._begin(block_ids)

    def _refuse_to_wait_for_itself(self) -> None:
        if self._engine.is_worker:
            text = "read and write cannot wait in a callback of a transfer: use submit_read and submit_write there"
            raise StorageError(errno.EDEADLK, text, str(self.path))

    def _finish(self, batch: Batch, ids: IdArray) -> None:
        good = batch.transfer.result()
        if good.all():
            return
        verb, error = "read" if batch.is_read else "write", batch.error
        wrong = ids[~good].tolist()
        code = errno.EIO if error is None else error.errno or errno.EIO
        names = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        text = f"could not {verb} {len(wrong)} of {len(ids)} blocks ({names}): {os.strerror(code).lower()}"
        raise StorageError(code, text, str(self.path)) from error
