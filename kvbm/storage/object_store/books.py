"""What is asked of a store beside bytes: which blocks it has, deleting some or all, and a listing, each in its time.

Coroutines of the engine's loop; requests go through the same `Requests` as bytes do, so the same bounds hold.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.storage.object_store.blocks import BlockMover, run_together
from kvbm.storage.object_store.client import Found, ObjectClient
from kvbm.storage.object_store.format import GarbageError, hash_in
from kvbm.storage.object_store.requests import Requests, TimeLimit, TimeLimitReached

_log = logging.getLogger("kvbm.storage.object_store")

_DELETE_CHUNK = 1000  # S3 takes as many in one request
_MAX_LISTINGS = 5  # that are begun, where one breaks off


class ObjectBooks:
    """Looks, deletions and listings under one root.

    Parameters
    ----------
    client : ObjectClient
    requests : Requests
    mover : BlockMover
        Knows the keys and what is being uploaded.
    root : str
    max_requests : int
    """

    def __init__(
        self, client: ObjectClient, requests: Requests, mover: BlockMover, *, root: str, max_requests: int
    ) -> None:
        self._client = client
        self._requests = requests
        self._mover = mover
        self._root = root
        self._max_requests = max_requests

    async def look(self, names: list[bytes], timeout_s: float) -> npt.NDArray[np.bool_]:
        """Tell which blocks are there with all their bytes; False where there was no answer in time."""
        is_there = np.zeros(len(names), dtype=np.bool_)
        todo = iter(range(len(names)))

        async def look_at_some() -> None:
            for i in todo:
                path = self._mover.path_of(names[i])
                since = self._mover.num_deletions
                with contextlib.suppress(FileNotFoundError, GarbageError, StorageError):
                    nbytes = await self._requests.send("head", lambda path=path: self._client.size(path))  # type: ignore[misc]
                    is_there[i] = nbytes == self._mover.object_nbytes and not self._mover.is_gone(path, since)

        with contextlib.suppress(TimeLimitReached), TimeLimit(timeout_s):
            await run_together(look_at_some, min(self._max_requests, len(names)))
        return is_there

    async def delete(self, names: list[bytes], timeout_s: float) -> None:
        """Delete blocks, after uploads of the same that are under way; `StorageError` where some may be left."""
        paths = [self._mover.path_of(name) for name in names]
        with _in_time("delete", timeout_s):
            await self._mover.uploads_ended(paths)
            await self._delete_paths(paths)

    async def delete_quietly(self, names: list[bytes], timeout_s: float) -> None:
        """Delete blocks for whom nobody waits."""
        try:
            await self.delete(names, timeout_s)
        except StorageError as error:
            _log.warning("could not delete damaged blocks num_blocks=%d reason=%s", len(names), error)

    async def delete_all(self, timeout_s: float) -> None:
        """Delete everything under the root; `StorageError` where some may be left."""
        num_deleted = 0
        with _in_time("clear", timeout_s):
            await self._mover.uploads_ended()
            while True:
                found = await self._list(_DELETE_CHUNK)
                if not found:
                    break
                await self._delete_paths([entry.path for entry in found])
                num_deleted += len(found)
        _log.info("object store cleared root=%s num_objects=%d", self._root, num_deleted)

    async def inventory(self, max_blocks: int, timeout_s: float) -> list[bytes]:
        """List blocks, oldest first: at most that many, and those that came within the time."""
        found: dict[str, Found] = {}
        since = self._mover.num_deletions

        def is_block(entry: Found) -> bool:
            is_whole = entry.nbytes == self._mover.object_nbytes and hash_in(entry.path) is not None
            return is_whole and not self._mover.is_gone(entry.path, since)

        try:
            with TimeLimit(timeout_s):
                await self._list(max_blocks, is_wanted=is_block, into=found)
        except (StorageError, TimeLimitReached) as error:
            _log.warning("listing ended early root=%s num_objects=%d reason=%s", self._root, len(found), error)
        oldest_first = sorted(found.values(), key=lambda entry: entry.modified)
        return [name for entry in oldest_first if (name := hash_in(entry.path)) is not None]

    # -- private -----------------------------------------------------------------------------------------------

    async def _delete_paths(self, paths: list[str]) -> None:
        for start in range(0, len(paths), _DELETE_CHUNK):
            chunk = paths[start : start + _DELETE_CHUNK]
            try:
                await self._requests.send("delete", lambda chunk=chunk: self._client.delete(chunk))  # type: ignore[misc]
            except FileNotFoundError:  # one was not there, and how many others are gone is not said
                await self._delete_each(chunk)
            self._mover.note_deleted(chunk)

    async def _delete_each(self, paths: list[str]) -> None:
        todo = iter(paths)

        async def delete_some() -> None:
            for path in todo:
                with contextlib.suppress(FileNotFoundError):
                    await self._requests.send("delete", lambda path=path: self._client.delete([path]))  # type: ignore[misc]

        await run_together(delete_some, min(self._max_requests, len(paths)))

    async def _list(
        self,
        max_objects: int,
        *,
        is_wanted: Callable[[Found], bool] = lambda _: True,
        into: dict[str, Found] | None = None,
    ) -> list[Found]:
        """List up to so many objects; what came before a failure, or the end of the caller's time, is in `into`.

        Each page is a request, with a request's time: a long listing is no failure of the store, a page that does not
        come is. A listing that breaks off is begun anew.
        """
        found: dict[str, Found] = {} if into is None else into
        pages: AsyncIterator[list[Found]] | None = None
        num_begun = 0

        async def next_page() -> list[Found] | None:
            nonlocal pages, num_begun
            if pages is None:
                if num_begun == _MAX_LISTINGS:
                    raise StorageError(f"the listing broke off {num_begun} times")
                num_begun += 1
                pages = self._client.list(self._root)
            try:
                return await pages.__anext__()
            except StopAsyncIteration:
                return None
            except BaseException:
                pages = None
                raise

        with contextlib.suppress(FileNotFoundError):  # a folder that nobody wrote to
            while len(found) < max_objects:
                page = await self._requests.send("list", next_page)
                if page is None:
                    break
                for entry in page:
                    if len(found) < max_objects and is_wanted(entry):
                        found[entry.path] = entry
        return list(found.values())


@contextlib.contextmanager
def _in_time(verb: str, timeout_s: float) -> Iterator[None]:
    """Bound the body's time."""
    try:
        with TimeLimit(timeout_s):
            yield
    except TimeLimitReached:
        raise StorageError(f"{verb} did not end within {timeout_s:g} s: some objects may be left") from None
