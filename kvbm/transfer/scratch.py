"""Memory that submissions need beside their blocks: descriptors and checksums in pinned and device memory, and staging.

A submission takes a piece and gives it back when it is done, from any thread. What does not fit makes a further arena
rather than a wait: the number of submissions in flight is bounded, so the arenas are.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError, KvbmError
from kvbm.gpu import DeviceMemory, Gpu, PinnedMemory

_log = logging.getLogger("kvbm.transfer")
_ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Scratch:
    """A piece of an arena: as many bytes on the device as in pinned memory.

    Attributes
    ----------
    device_address, pinned_address, nbytes : int
    pinned : (nbytes,) uint8, host
    """

    arena: _Arena
    offset: int
    nbytes: int

    @property
    def device_address(self) -> int:
        """Where the piece lies on the device."""
        return self.arena.device.address + self.offset

    @property
    def pinned_address(self) -> int:
        """Where it lies on the host."""
        return self.arena.pinned.address + self.offset

    @property
    def pinned(self) -> npt.NDArray[np.uint8]:
        """Its bytes on the host: (nbytes,) uint8."""
        return self.arena.pinned.memory[self.offset : self.offset + self.nbytes]


class _Arena:
    """One piece of device memory and one of pinned memory, cut alike; free spans stand in order of their offset."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self.device = DeviceMemory(gpu, nbytes)
        self.pinned = PinnedMemory(gpu, nbytes, slice_nbytes=nbytes, in_background=False)
        if not self.pinned.is_complete:
            raise ConfigError(f"cannot pin {nbytes} bytes for a copy's descriptors: {self.pinned.failure}")
        self.nbytes = nbytes
        self.free: list[tuple[int, int]] = [(0, nbytes)]

    def take(self, nbytes: int) -> int | None:
        for i, (offset, size) in enumerate(self.free):
            if size >= nbytes:
                self.free[i : i + 1] = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        spans = sorted([*self.free, (offset, nbytes)])
        self.free = []
        for start, size in spans:
            if self.free and sum(self.free[-1]) == start:
                self.free[-1] = self.free[-1][0], self.free[-1][1] + size
            else:
                self.free.append((start, size))


class ScratchPool:
    """Gives out scratch.

    Parameters
    ----------
    gpu : Gpu
    arena_nbytes : int
        Of each arena; a larger request has one of its own size.
    """

    def __init__(self, gpu: Gpu, *, arena_nbytes: int = 4 << 20) -> None:
        if arena_nbytes < _ALIGNMENT:
            raise ConfigError(f"an arena of {arena_nbytes} bytes is too small, give {_ALIGNMENT} or more")
        self._gpu = gpu
        self._arena_nbytes = arena_nbytes
        self._arenas: list[_Arena] = []
        self._lock = threading.Lock()
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        """Pieces that nobody has given back."""
        return self._num_taken

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas, on each side."""
        return sum(arena.nbytes for arena in self._arenas)

    def take(self, nbytes: int) -> Scratch:
        """Take a piece of at least this many bytes, aligned to 256; raises `StorageError` where there is no memory."""
        size = max(_ALIGNMENT, -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        with self._lock:
            for arena in self._arenas:
                if (offset := arena.take(size)) is not None:
                    break
            else:
                arena = _Arena(self._gpu, max(size, self._arena_nbytes))
                self._arenas.append(arena)
                offset = arena.take(size)
            assert offset is not None, "an empty arena takes what it was made for"
            self._num_taken += 1
            return Scratch(arena, offset, size)

    def prepare(self) -> None:
        """Make the first arena now; where that fails, the first who takes is told why."""
        with self._lock:
            try:
                self._arenas.append(_Arena(self._gpu, self._arena_nbytes))
            except KvbmError as error:
                _log.debug("scratch was not made beforehand nbytes=%d error=%s", self._arena_nbytes, error)

    def give(self, scratch: Scratch) -> None:
        """Give a piece back; nothing on the device uses it any more."""
        with self._lock:
            scratch.arena.give(scratch.offset, scratch.nbytes)
            self._num_taken -= 1

    def close(self) -> None:
        """Let go of the arenas; a piece that is still in use keeps its own."""
        with self._lock:
            self._arenas = []
