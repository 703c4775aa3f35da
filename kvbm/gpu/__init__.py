"""What there is of a GPU: the module that drives it, streams and arrays of other packages, pinned and device memory.

Importing this asks no driver; `find_gpu` does, once. Nothing here knows blocks.
"""

from kvbm.gpu.arrays import Region, region_of
from kvbm.gpu.memory import DeviceMemory
from kvbm.gpu.pinned import PinnedMemory
from kvbm.gpu.runtime import Gpu, describe_gpu, find_gpu
from kvbm.gpu.streams import as_stream, stream_handle

__all__ = [
    "DeviceMemory",
    "Gpu",
    "PinnedMemory",
    "Region",
    "as_stream",
    "describe_gpu",
    "find_gpu",
    "region_of",
    "stream_handle",
]
