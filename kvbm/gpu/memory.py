"""Device memory of our own: allocated at once, freed when the last who uses it lets go, in any order.

Whoever moves bytes there keeps the object, so that closing a storage never frees memory under a copy. What is left when
the interpreter exits is the driver's to free, once nothing runs any more: threads may still queue copies from it. A
child made by fork leaves it alone.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING

from kvbm.errors import ConfigError, CudaError, StorageError
from kvbm.gpu.runtime import Gpu

if TYPE_CHECKING:
    from kvbm._backend import Device

_log = logging.getLogger("kvbm.gpu")


class DeviceMemory:
    """Bytes on a GPU.

    Parameters
    ----------
    gpu : Gpu
    nbytes : int
        1 or more.

    Attributes
    ----------
    address : int
        Aligned to 256 bytes.
    nbytes : int

    Raises
    ------
    StorageError
        The device has no such memory left; says how much it has.
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        if nbytes < 1:
            raise ConfigError(f"device memory of {nbytes} bytes is impossible, give 1 or more")
        self.gpu = gpu
        self.nbytes = nbytes
        try:
            self.address = gpu.device.allocate(nbytes)
        except CudaError as error:
            raise StorageError(
                f"cannot have {nbytes} bytes on {gpu.device.name}, {_free_nbytes(gpu.device)} are free: give fewer "
                f"blocks ({error})"
            ) from error
        self._finalizer = weakref.finalize(self, _free, gpu.device, self.address, os.getpid())
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"DeviceMemory({self.nbytes} bytes on {self.gpu.device.name})"


def _free_nbytes(device: Device) -> int | str:
    try:
        return device.memory_info()[0]
    except CudaError:
        return "an unknown number"


def _free(device: Device, address: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked child: the memory is its parent's
        return
    try:
        device.free(address)
    except Exception as error:  # nobody can be told, and a lost device has no memory
        _log.debug("device memory was not freed address=%#x error=%s", address, error)
