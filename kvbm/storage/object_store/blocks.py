"""Moving one block: upload from its row, or download, verification and copy into its row."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.storage.object_store.batch import Batch, Lease
from kvbm.storage.object_store.client import Fetched, ObjectClient
from kvbm.storage.object_store.format import HEADER_NBYTES, ForeignError, GarbageError, ObjectHeader, check_header
from kvbm.storage.object_store.requests import ObjectCounters, Requests

_log = logging.getLogger("kvbm.storage.object_store")

_T = TypeVar("_T")
_PATHS = 1 << 16  # that are remembered; the oldest are forgotten


class ReplacedError(GarbageError):
    """The parts that were read are not of one object; what lies there now may be good."""


class BlockMover:
    """Moves blocks between rows and objects.

    Parameters
    ----------
    client : ObjectClient
    requests : Requests
    root : str
        What comes before the hash in a key.
    block_nbytes, part_nbytes : int
        Blocks longer than a part move in several requests.
    parts_at_once : int
        Of one block.
    checksums, has_checksum : (num_blocks,) arrays
        Of the storage; what a header tells goes there.
    """

    def __init__(
        self,
        client: ObjectClient,
        requests: Requests,
        *,
        root: str,
        block_nbytes: int,
        part_nbytes: int,
        parts_at_once: int,
        checksums: npt.NDArray[np.uint64],
        has_checksum: npt.NDArray[np.bool_],
    ) -> None:
        self._client = client
        self._requests = requests
        self._root = root
        self._block_nbytes = block_nbytes
        self._nbytes = HEADER_NBYTES + block_nbytes
        self._part_nbytes = part_nbytes
        self._parts_at_once = parts_at_once
        self._checksums = checksums
        self._has_checksum = has_checksum
        self._uploads: dict[str, set[asyncio.Future[None]]] = {}  # under way, by path
        self._garbage: OrderedDict[str, None] = OrderedDict()  # paths of what is no block and may be there still
        self._deletions: dict[str, asyncio.Task[None]] = {}  # of garbage, under way, by path
        self.num_deletions = 0  # that have ended: a question notes it before it is sent, see `is_gone`
        self._deleted: OrderedDict[str, int] = OrderedDict()  # paths, and which deletion it was

    @property
    def counters(self) -> ObjectCounters:
        """What was done so far; the live object."""
        return self._requests.counters

    @property
    def object_nbytes(self) -> int:
        """Length of a whole object."""
        return self._nbytes

    def path_of(self, sequence_hash: bytes) -> str:
        """Give a block's key."""
        return f"{self._root}/{sequence_hash.hex()}"

    async def move(self, batch: Batch, i: int) -> None:
        """Move a block; trouble is a False in the mask."""
        try:
            if batch.is_read:
                await self._download(batch, i)
            else:
                await self._upload(batch, i)
        except FileNotFoundError:
            self.counters.num_misses += 1
        except ReplacedError as error:
            self.counters.num_misses += 1
            _log.debug("block did not move path=%s reason=%s", self.path_of(batch.hash_of(i)), error)
        except GarbageError as error:
            self.counters.num_garbage += 1
            level = logging.DEBUG if self.counters.num_garbage > 1 else logging.WARNING
            path = self.path_of(batch.hash_of(i))
            _log.log(level, "object is garbage path=%s reason=%s", path, error)
            self._remove_garbage(path, is_foreign=isinstance(error, ForeignError))
        except StorageError as error:
            _log.debug("block did not move path=%s reason=%s", self.path_of(batch.hash_of(i)), error)

    async def uploads_ended(self, paths: list[str] | None = None) -> None:
        """Wait for the uploads that are under way now; of these paths, or all."""
        chosen = self._uploads if paths is None else {path: self._uploads.get(path, set()) for path in paths}
        if futures := [future for futures in chosen.values() for future in futures]:
            await asyncio.wait(futures)

    def is_gone(self, path: str, since: int) -> bool:
        """Whether an answer that a block is there must not be believed.

        Parameters
        ----------
        path : str
        since : int
            `num_deletions` when the question was sent: the answer may be older than a deletion that has ended since.

        Notes
        -----
        Also where what lies there was found to be no block.
        """
        return path in self._garbage or self._deleted.get(path, 0) > since

    def note_deleted(self, paths: Iterable[str]) -> None:
        """Note that objects were deleted from here."""
        self.num_deletions += 1
        for path in paths:
            _remember(self._deleted, path, self.num_deletions)

    # -- private -----------------------------------------------------------------------------------------------

    def _remove_garbage(self, path: str, *, is_foreign: bool) -> None:
        """Delete what is no block, or at least let nobody here find it again; nobody waits for that."""
        _remember(self._garbage, path, None)
        if is_foreign or path in self._deletions:  # another release reads it
            return
        deletion = self._deletions[path] = asyncio.ensure_future(self._delete(path))
        deletion.add_done_callback(lambda _: self._deletions.pop(path, None))

    async def _delete(self, path: str) -> None:
        try:
            await self.uploads_ended([path])
            if path in self._garbage:  # nobody has replaced it meanwhile
                with contextlib.suppress(FileNotFoundError):
                    await self._requests.send("delete", lambda: self._client.delete([path]))
                self.note_deleted([path])
                self._garbage.pop(path, None)
        except StorageError as error:
            _log.debug("garbage stays path=%s reason=%s", path, error)

    async def _upload(self, batch: Batch, i: int) -> None:
        checksum = None if batch.checksums is None else batch.checksums[i]
        name = batch.hash_of(i)
        path, header = self.path_of(name), ObjectHeader(name, self._block_nbytes, checksum).encode()
        if deletion := self._deletions.get(path):  # it must not come after the upload
            await asyncio.wait([deletion])
        loop = asyncio.get_running_loop()
        lease = Lease(loop, batch.memory[batch.rows[i], : self._block_nbytes])
        upload: asyncio.Future[None] = loop.create_future()
        self._uploads.setdefault(path, set()).add(upload)
        limits = {"max_requests": self._parts_at_once, "part_nbytes": self._part_nbytes}
        try:
            await self._requests.send(
                "put",
                lambda: self._client.put(path, header, lease.lend(), **limits),
                is_wanted=lambda: not batch.is_over,
            )
            is_done = True
        except asyncio.CancelledError:
            is_done = False
        finally:
            upload.set_result(None)
            self._uploads[path].discard(upload)
            if not self._uploads[path]:
                del self._uploads[path]
            await lease.ended()
        if is_done:
            self._garbage.pop(path, None)
            self._deleted.pop(path, None)
            batch.is_good[i] = True
            self.counters.num_writes += 1
            self.counters.written_nbytes += self._block_nbytes

    async def _download(self, batch: Batch, i: int) -> None:
        name = batch.hash_of(i)
        path = self.path_of(name)
        bounds = range(0, self._nbytes, self._part_nbytes)
        if len(bounds) == 1:
            fetched = await self._fetch(batch, path, 0, self._nbytes)
            checksum = check_header(fetched.data, name, self._block_nbytes)
            is_there = batch.put_bytes(i, 0, memoryview(fetched.data)[HEADER_NBYTES:])
        else:
            checksum, is_there = await self._download_parts(batch, i, bounds)
        if is_there and batch.settle(i, self._checksums, self._has_checksum, checksum):
            self.counters.num_reads += 1
            self.counters.read_nbytes += self._block_nbytes

    async def _download_parts(self, batch: Batch, i: int, bounds: range) -> tuple[int | None, bool]:
        """Fetch the parts of a large block side by side, each going to its place when it comes."""
        name = batch.hash_of(i)
        path = self.path_of(name)
        todo = iter(bounds)
        versions: set[str | None] = set()
        checksums: list[int | None] = []
        is_there = True

        async def fetch() -> None:
            nonlocal is_there
            for begin in todo:
                end = min(begin + self._part_nbytes, self._nbytes)
                fetched = await self._fetch(batch, path, begin, end)
                versions.add(fetched.e_tag)
                data = memoryview(fetched.data)
                if not begin:
                    checksums.append(check_header(data, name, self._block_nbytes))
                    data = data[HEADER_NBYTES:]
                is_there &= batch.put_bytes(i, max(0, begin - HEADER_NBYTES), data)

        await run_together(fetch, min(self._parts_at_once, len(bounds)))
        if len(versions) > 1:
            raise ReplacedError("it was replaced while its parts were read")
        return checksums[0], is_there

    async def _fetch(self, batch: Batch, path: str, begin: int, end: int) -> Fetched:
        return await self._requests.send(
            "get", lambda: self._client.get(path, self._nbytes, begin, end), is_wanted=lambda: not batch.is_over
        )


async def run_together(make: Callable[[], Coroutine[Any, Any, None]], num_tasks: int) -> None:
    """Run the same work in several tasks; the first failure ends all."""
    tasks = [asyncio.ensure_future(make()) for _ in range(num_tasks)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remember(paths: OrderedDict[str, _T], path: str, value: _T) -> None:
    paths[path] = value
    paths.move_to_end(path)
    if len(paths) > _PATHS:
        paths.popitem(last=False)
