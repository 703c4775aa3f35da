"""What we ask of a store, and obstore's answer: the one module that imports obstore, and only when a store is opened.

Each call is one request, or the parts of one upload: nothing here retries, waits for others or keeps books.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from kvbm.errors import ConfigError, PluginError
from kvbm.storage.object_store.address import check_options, check_url, safe_text
from kvbm.storage.object_store.format import GarbageError

_LIST_CHUNK = 1000
_MIN_CHUNK_NBYTES = 5 << 20  # S3 takes no smaller part but the last


@dataclass(frozen=True)
class Found:
    """An object that a listing or a look found; its path is relative to the store's URL."""

    path: str
    nbytes: int
    modified: datetime


@dataclass(frozen=True)
class Fetched:
    """Bytes of an object and the version they belong to."""

    data: Any
    e_tag: str | None


class ObjectClient(Protocol):
    """One store. A missing object is `FileNotFoundError`; awaitables may be cancelled at any time.

    `put` must let go of the block's buffer when its request has ended, and soon after it was cancelled: that is how
    the engine knows that a row may change.
    """

    def put(self, path: str, header: bytes, block: Any, *, max_requests: int, part_nbytes: int) -> Awaitable[Any]:
        """Upload header and block as one object that appears whole or not at all."""
        ...

    def get(self, path: str, nbytes: int, begin: int, end: int) -> Awaitable[Fetched]:
        """Download bytes begin..end-1 of an object; `GarbageError` where it has not just `nbytes` bytes."""
        ...

    def size(self, path: str) -> Awaitable[int]:
        """Give the bytes of an object."""
        ...

    def delete(self, paths: list[str]) -> Awaitable[Any]:
        """Delete objects; one that is not there may be an error."""
        ...

    def list(self, prefix: str) -> AsyncIterator[list[Found]]:
        """List what lies under a prefix, in chunks."""
        ...


def open_client(url: str, *, options: Mapping[str, Any], timeout_s: float, credentials: Any = None) -> ObjectClient:
    """Open a store through obstore; nothing is asked of it yet.

    Parameters
    ----------
    url : str
    options : dict
        See `address.OPTIONS`; ``allow_http`` lets through plain HTTP.
    timeout_s : float
        For one request; the engine's own timer is the rule, this one is behind it.
    credentials : callable, optional
        A credential provider of obstore's.

    Raises
    ------
    PluginError
        obstore is not installed.
    ConfigError
        The URL or an option is impossible.
    """
    parts = check_url(url)
    given = dict(options)
    can_use_http = bool(given.pop("allow_http", False))
    settings: dict[str, Any] = check_options(given)
    obstore = _import("obstore")
    stores = _import("obstore.store")
    try:
        if parts.scheme == "memory":
            return _ObstoreClient(obstore, stores.MemoryStore())
        if parts.scheme == "file":
            folder = Path(unquote(parts.path))
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a user's conversations: the owner's alone
            return _ObstoreClient(obstore, stores.LocalStore(folder))
        if credentials is not None:
            settings["credential_provider"] = credentials
        client_options = {
            "timeout": timedelta(seconds=2 * timeout_s),
            "connect_timeout": timedelta(seconds=timeout_s),
            **({"allow_http": True} if can_use_http else {}),
        }
        store = stores.from_url(url, client_options=client_options, retry_config={"max_retries": 0}, **settings)
    except Exception as error:
        raise ConfigError(f"the object store cannot be opened: {safe_text(error)}") from None
    return _ObstoreClient(obstore, store)


class _ObstoreClient:
    """obstore behind the calls above."""

    def __init__(self, obstore: Any, store: Any) -> None:
        self._obstore = obstore
        self._store = store

    def put(self, path: str, header: bytes, block: Any, *, max_requests: int, part_nbytes: int) -> Awaitable[Any]:
        # A function, not a coroutine: no frame of ours keeps the block once the request is made.
        if len(header) + len(block) <= part_nbytes:
            return self._obstore.put_async(self._store, path, [header, block], use_multipart=False)  # type: ignore[no-any-return]
        return self._obstore.put_async(  # type: ignore[no-any-return]
            self._store,
            path,
            [header, block],
            use_multipart=True,
            chunk_size=max(part_nbytes, _MIN_CHUNK_NBYTES),
            max_concurrency=max_requests,
        )

    async def get(self, path: str, nbytes: int, begin: int, end: int) -> Fetched:
        # A whole object is asked for without a range, so that one of no bytes is not an error of the server's.
        options = {"range": (begin, end)} if end - begin < nbytes else None
        try:
            answer = await self._obstore.get_async(self._store, path, options=options)
        except Exception as error:
            # A range that begins behind the end of a short object is an error, and stores say so in words of their own.
            if options and "range" in str(error).lower() and (size := await self.size(path)) != nbytes:
                raise GarbageError(f"it has {size} bytes, must have {nbytes}") from None
            raise
        meta = answer.meta
        if meta["size"] != nbytes:
            raise GarbageError(f"it has {meta['size']} bytes, must have {nbytes}")
        data = await answer.bytes_async()
        if len(data) != end - begin:
            raise OSError(f"the answer has {len(data)} bytes, {end - begin} were asked for")
        return Fetched(data, meta["e_tag"])

    async def size(self, path: str) -> int:
        meta = await self._obstore.head_async(self._store, path)
        return int(meta["size"])

    def delete(self, paths: list[str]) -> Awaitable[Any]:
        return self._obstore.delete_async(self._store, paths)  # type: ignore[no-any-return]

    async def list(self, prefix: str) -> AsyncIterator[list[Found]]:
        async for chunk in self._obstore.list(self._store, prefix, chunk_size=_LIST_CHUNK):
            yield [Found(meta["path"], meta["size"], meta["last_modified"]) for meta in chunk]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PluginError('an object store needs obstore: pip install "kvbm-native[s3]"') from error
