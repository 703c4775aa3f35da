"""The device tier's memory: host memory that stands in for a GPU, so that everything runs where there is none."""

from __future__ import annotations

from kvbm.storage.base import StorageCapabilities
from kvbm.storage.host import HostStorage


class DeviceStorage(HostStorage):
    """Blocks of the device tier (G1) where there is no GPU; `CudaStorage` holds them where there is one.

    An engine writes into it at any time, so a checksum kept for a slot would say nothing.
    """

    capabilities = StorageCapabilities(is_addressable=True, is_device=True)
    keeps_checksums = False
