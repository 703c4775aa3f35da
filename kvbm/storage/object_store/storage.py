"""ObjectStorage: blocks under keys of an object store, found by sequence hash by every worker of the same model."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, StorageError
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.storage.base import Storage, StorageCapabilities
from kvbm.storage.object_store.address import check_prefix, check_url, safe_url
from kvbm.storage.object_store.batch import Batch
from kvbm.storage.object_store.blocks import BlockMover
from kvbm.storage.object_store.books import ObjectBooks
from kvbm.storage.object_store.breaker import CircuitBreaker
from kvbm.storage.object_store.client import ObjectClient, open_client
from kvbm.storage.object_store.engine import ObjectEngine
from kvbm.storage.object_store.format import HEADER_NBYTES, digest_of
from kvbm.storage.object_store.requests import ObjectCounters, Requests, RetryLimits
from kvbm.types import DEFAULT_PRIORITY, HashArray, IdArray, hash_array, hash_list

_NO_IDS: IdArray = np.empty(0, dtype=np.int32)


class ObjectStorage(Storage):
    """Blocks in an object store.

    Parameters
    ----------
    layout : BlockLayout
        Of the blocks; its number of blocks is the number of rows: what the planner keeps of what is known.
    url : str
        ``s3://bucket/folder``, ``gs://``, ``az://``, ``file:///directory`` or ``memory://``; no credentials, no query.
    fingerprint : str
        What the bytes depend on beside the tokens. Stores with another one do not see each other's blocks.
    prefix : str
        Folder under the URL.
    max_concurrency : int
        Requests under way.
    max_in_flight_nbytes : int
        Bytes under way; at least one request goes.
    part_nbytes : int
        Longer blocks move in parts of this size, side by side.
    timeout_s : float
        Of one request.
    deadline_s : float
        Of a transfer, from submitting on, and of `holds` and `forget`.
    listing_timeout_s : float
        Of `inventory` and `clear`.
    max_failures : int
        Requests that fail in a row before the store is left alone.
    cool_down_s : float
        Before it is probed; doubled after each probe that fails, up to 60 s or this, whichever is longer.
    options : dict, optional
        Settings of the store such as endpoint and region, see `address.OPTIONS`; ``allow_http``: plain HTTP will do.
    credentials : callable, optional
        A credential provider of obstore's, such as ``obstore.auth.boto3.Boto3CredentialProvider()``; without it, the
        environment and the machine's role say.
    retries : RetryLimits, optional
        Attempts and backoff; its `timeout_s` gives way to that of the storage.
    client : ObjectClient, optional
        Instead of what the URL opens; the URL is then a name.

    Raises
    ------
    ConfigError
        An impossible setting, or credentials where they do not belong.
    PluginError
        obstore is not installed.

    Notes
    -----
    Nothing is asked of the store before the first call. A block that is not there, or is not what its key says, is
    False in the mask of a read. One thread of its own; all calls may come from any thread, and only the books
    (`holds`, `forget`, `clear`, `inventory`) wait for the store. A forked child cannot use the storage of its parent.

    Examples
    --------
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    ... )
    >>> ids, rows = np.array([2], dtype=np.int32), np.array([0], dtype=np.int32)
    >>> hashes, memory = np.array([[1, 2]], dtype=np.uint64), np.full((1, layout.block_nbytes), 7, dtype=np.uint8)
    >>> with ObjectStorage(layout, "memory://", fingerprint="tiny") as storage:
    ...     storage.submit_write(ids, memory, rows, hashes=hashes).result()
    array([ True])
    """

    capabilities = StorageCapabilities(is_persistent=True, is_keyed=True)

    def __init__(
        self,
        layout: BlockLayout,
        url: str,
        *,
        fingerprint: str,
        prefix: str = "kvbm",
        max_concurrency: int = 32,
        max_in_flight_nbytes: int = 256 << 20,
        part_nbytes: int = 16 << 20,
        timeout_s: float = 5.0,
        deadline_s: float = 30.0,
        listing_timeout_s: float = 60.0,
        max_failures: int = 8,
        cool_down_s: float = 5.0,
        options: Mapping[str, Any] | None = None,
        credentials: Any = None,
        retries: RetryLimits | None = None,
        client: ObjectClient | None = None,
    ) -> None:
        _check_positive(
            max_concurrency=max_concurrency,
            max_in_flight_nbytes=max_in_flight_nbytes,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            listing_timeout_s=listing_timeout_s,
            max_failures=max_failures,
            cool_down_s=cool_down_s,
        )
        if part_nbytes <= HEADER_NBYTES:
            raise ConfigError(f"part_nbytes is {part_nbytes}, give more than the {HEADER_NBYTES} bytes of a header")
        super().__init__(layout)
        self.url = safe_url(check_url(url))
        self.root = "/".join(part for part in (check_prefix(prefix), digest_of(fingerprint, layout)) if part)
        self._deadline_s = deadline_s
        self._listing_timeout_s = listing_timeout_s
        if client is None:
            client = open_client(url, options=options or {}, timeout_s=timeout_s, credentials=credentials)
        object_nbytes = HEADER_NBYTES + layout.block_nbytes
        max_requests = max(1, min(max_concurrency, max_in_flight_nbytes // min(part_nbytes, object_nbytes)))
        parts_at_once = min(max_requests, -(-object_nbytes // part_nbytes))
        self._breaker = CircuitBreaker(
            max_failures=max_failures, cool_down_s=cool_down_s, max_cool_down_s=max(60.0, cool_down_s)
        )
        limits = retries or RetryLimits()
        known_client, probe_path = client, f"{self.root}/probe"
        requests = Requests(
            RetryLimits(**{**vars(limits), "timeout_s": timeout_s}),
            self._breaker,
            max_requests=max_requests,
            probe=lambda: known_client.size(probe_path),
            name=self.url,
        )
        mover = BlockMover(
            client,
            requests,
            root=self.root,
            block_nbytes=layout.block_nbytes,
            part_nbytes=part_nbytes,
            parts_at_once=parts_at_once,
            checksums=self.checksums,
            has_checksum=self.has_checksum,
        )
        self._books = ObjectBooks(client, requests, mover, root=self.root, max_requests=max_requests)
        self._engine = ObjectEngine(mover, max_blocks=max(1, max_requests // parts_at_once), deadline_s=deadline_s)
        self._counters = requests.counters
        self._pid = os.getpid()
        weakref.finalize(self, self._engine.stop).atexit = False  # the engine sees to that itself

    # -- whether the store answers -----------------------------------------------------------------------------

    @property
    def is_available(self) -> bool:
        """Whether the store is asked; False from `max_failures` in a row until a probe was answered."""
        return self._breaker.is_available

    def on_availability(self, listener: Callable[[bool], None]) -> None:
        """Call with False when the store is given up and with True when it is back.

        At once where it is gone now, later in the storage's thread: the listener must return soon and must not wait
        for this storage.
        """
        self._breaker.listen(listener)

    @property
    def counters(self) -> ObjectCounters:
        """What was done so far; the live object."""
        return self._counters

    # -- bytes -------------------------------------------------------------------------------------------------

    def submit_read(
        self, block_ids: IdArray, memory: npt.NDArray[np.uint8], rows: IdArray, *, hashes: HashArray | None = None
    ) -> Transfer[npt.NDArray[np.bool_]]:
        """Begin to copy blocks out; see `Storage.submit_read`.

        Notes
        -----
        Needs hashes. Returns at once. Ends at the deadline, and no row changes after it ended or was cancelled.
        `checksums` and `has_checksum` of the ids are set before it ends.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=True)
        names = self._named(ids, hashes)
        batch = Batch(True, ids, memory, places, hashes=names, checksums=None)
        self._engine.submit(batch)
        return batch.transfer

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
        Needs hashes. Returns at once. Ends at the deadline; rows are read where they lie, and the end waits, for up
        to 2 s longer, until nobody reads them any more.
        """
        ids, places = self._begin_submit(block_ids, memory, rows, is_read=False)
        names = self._named(ids, hashes)
        if checksums is not None and (checksums.shape != ids.shape or checksums.dtype != np.uint64):
            raise StorageError(
                f"checksums must be {len(ids)} uint64, one for each block, got {checksums.shape} {checksums.dtype}"
            )
        batch = Batch(False, ids, memory, places, hashes=names, checksums=checksums)
        self._engine.submit(batch)
        return batch.transfer

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        """Refuse: an id finds nothing here; raises `StorageError`."""
        self._begin(block_ids)
        raise StorageError(errno.ENOTSUP, "an object store finds blocks by hash: use submit_read with hashes", self.url)

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        """Refuse: an id names nothing here; raises `StorageError`."""
        self._checked_data(self._begin(block_ids), data)
        raise StorageError(
            errno.ENOTSUP, "an object store keeps blocks by hash: use submit_write with hashes", self.url
        )

    # -- books -------------------------------------------------------------------------------------------------

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        """Ask the store which blocks it has, with all their bytes: (num_blocks,) bool.

        Notes
        -----
        Ids are not looked at. One request a block, concurrent; False where there was no answer before the deadline.
        """
        self._begin(_NO_IDS)
        names = hash_array(hashes)
        if not len(names) or not self.is_available:
            return np.zeros(len(names), dtype=np.bool_)
        return self._engine.call(self._books.look(list(map(bytes, hash_list(names))), self._deadline_s))

    def forget(self, hashes: HashArray, block_ids: IdArray | None = None) -> None:
        """Delete blocks, for every worker that shares them; uploads of the same that are under way end before.

        Ids are not looked at.

        Raises
        ------
        StorageError
            Some may be left.
        """
        self._begin(_NO_IDS)
        names = hash_array(hashes)
        if len(names):
            self._engine.call(self._books.delete(list(map(bytes, hash_list(names))), self._deadline_s))

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:
        """Delete blocks that did not match their checksums, so that no worker reads them again; does not wait."""
        self._begin(_NO_IDS)
        names = hash_array(hashes)
        if len(names) and self.is_available:
            self._engine.post(self._books.delete_quietly(list(map(bytes, hash_list(names))), self._deadline_s))

    def clear(self) -> None:
        """Delete everything of this fingerprint, for every worker that shares it.

        Raises
        ------
        StorageError
            Some may be left.
        """
        self._begin(_NO_IDS)
        self._engine.call(self._books.delete_all(self._listing_timeout_s))

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        """List blocks that are there, oldest first, at most as many as there are rows.

        Returns
        -------
        ids : (num_blocks,) int32
            0 to n - 1: nothing in the store has an id.
        hashes, parents : (num_blocks, 2) uint64
            Parents are zero: a key does not tell them.
        priorities : (num_blocks,) uint8
            50.

        Notes
        -----
        What came within `listing_timeout_s`; what comes first in the store's order of keys, where there are more.
        """
        self._begin(_NO_IDS)
        names = self._engine.call(self._books.inventory(self.num_blocks, self._listing_timeout_s))
        hashes = np.array(hash_array(names)) if names else np.empty((0, 2), dtype=np.uint64)
        return (
            np.arange(len(names), dtype=np.int32),
            hashes,
            np.zeros_like(hashes),
            np.full(len(names), DEFAULT_PRIORITY, dtype=np.uint8),
        )

    def close(self, timeout: float | None = None) -> None:
        """Let transfers end, by their deadlines at the latest, and stop the thread; may be called again.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; None waits for as long as it takes.

        Raises
        ------
        TransferTimeout
            Transfers still move; nothing new is taken, and closing again waits for them again.
        """
        super().close(timeout)
        if os.getpid() == self._pid:  # the thread is the parent's
            self._engine.close(timeout)

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"ObjectStorage({self.url}, {self.num_blocks} rows, blocks of {self.layout.block_nbytes} bytes{state})"

    # -- private -----------------------------------------------------------------------------------------------

    def _begin(self, block_ids: IdArray) -> IdArray:
        if os.getpid() != self._pid:
            text = f"this storage was opened by process {self._pid}: a forked process must open its own"
            raise StorageError(errno.EPERM, text, self.url)
        return super()._begin(block_ids)

    def _named(self, ids: IdArray, hashes: HashArray | None) -> HashArray:
        if hashes is None:
            raise StorageError(errno.EINVAL, "an object store finds blocks by hash: give hashes", self.url)
        names = hash_array(hashes)
        if len(names) != len(ids):
            raise StorageError(
                errno.EINVAL, f"hashes must be {len(ids)}, one for each block, got {len(names)}", self.url
            )
        return names


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}, give more than 0")
