"""The object tier's storage: blocks under keys of S3, GCS, Azure, a directory or memory, through obstore.

`obstore` (extra ``s3``) is imported when a store is opened, not before.
"""

from kvbm.storage.object_store.breaker import CircuitBreaker
from kvbm.storage.object_store.client import Fetched, Found, ObjectClient
from kvbm.storage.object_store.format import GarbageError, ObjectHeader
from kvbm.storage.object_store.requests import ObjectCounters, RetryLimits
from kvbm.storage.object_store.storage import ObjectStorage

__all__ = [
    "CircuitBreaker",
    "Fetched",
    "Found",
    "GarbageError",
    "ObjectClient",
    "ObjectCounters",
    "ObjectHeader",
    "ObjectStorage",
    "RetryLimits",
]
