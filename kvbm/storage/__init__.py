"""Storages: memory or keys bound to a layout, moved in batches of blocks.

A storage knows bytes and checksums, never hashes' meaning, references or policies: those are the pool's.
"""

from kvbm.storage.base import Storage, StorageCapabilities
from kvbm.storage.cuda import CudaStorage
from kvbm.storage.cuda_views import CudaArrayView, CudaStorageBytes
from kvbm.storage.device import DeviceStorage
from kvbm.storage.host import HostStorage
from kvbm.storage.views import ArrayView, StorageBytes

__all__ = [
    "ArrayView",
    "CudaArrayView",
    "CudaStorage",
    "CudaStorageBytes",
    "DeviceStorage",
    "HostStorage",
    "Storage",
    "StorageBytes",
    "StorageCapabilities",
]
