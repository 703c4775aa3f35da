"""A keyed storage over a dictionary that several managers can share, and that can be out of reach."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import StorageError
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.storage import Storage
from kvbm.storage.base import StorageCapabilities
from kvbm.types import HashArray, IdArray

Objects = dict[bytes, tuple[bytes, int]]  # name -> content, checksum


class ToyStore(Storage):
    """Objects by name; counts what it is asked."""

    capabilities = StorageCapabilities(is_persistent=True, is_keyed=True)

    def __init__(self, layout: BlockLayout, objects: Objects) -> None:
        super().__init__(layout)
        self.objects = objects
        self.is_away = False
        self.is_listable = True
        self.asked: list[int] = []  # names of each probe
        self.gate = threading.Event()
        self.gate.set()

    @property
    def is_available(self) -> bool:
        return not self.is_away

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        raise StorageError("a keyed storage needs the hashes")

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        raise StorageError("a keyed storage needs the hashes")

    def submit_read(self, block_ids: Any, memory: Any, rows: Any, *, hashes: Any = None) -> Any:
        good = np.zeros(len(block_ids), dtype=np.bool_)
        for i, name in enumerate(hashes):
            found = None if self.is_away else self.objects.get(name.tobytes())
            if found is not None:
                memory[rows[i], : self.layout.block_nbytes] = np.frombuffer(found[0], dtype=np.uint8)
                self.checksums[block_ids[i]], self.has_checksum[block_ids[i]] = found[1], True
                good[i] = True
        return Transfer.completed(good)

    def submit_write(self, block_ids: Any, memory: Any, rows: Any, *, hashes: Any = None, checksums: Any = None) -> Any:
        if self.is_away:
            return Transfer.completed(np.zeros(len(block_ids), dtype=np.bool_))
        for name, row, checksum in zip(hashes, rows, checksums, strict=True):
            self.objects[name.tobytes()] = memory[row, : self.layout.block_nbytes].tobytes(), int(checksum)
        return Transfer.completed(np.ones(len(block_ids), dtype=np.bool_))

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        self.gate.wait(60)
        self.asked.append(len(hashes))
        if self.is_away:
            raise StorageError("the store does not answer")
        return np.array([name.tobytes() in self.objects for name in hashes], dtype=np.bool_)

    def forget(self, hashes: HashArray, block_ids: Any = None) -> None:
        if self.is_away:
            raise StorageError("the store does not answer")
        for name in hashes:
            self.objects.pop(name.tobytes(), None)

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:
        self.forget(hashes)

    def clear(self) -> None:
        self.objects.clear()

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        found = list(self.objects) if self.is_listable else []
        hashes = np.array([np.frombuffer(name, dtype=np.uint64) for name in found], dtype=np.uint64).reshape(-1, 2)
        num_found = len(found)
        ids = np.arange(num_found, dtype=np.int32)
        return ids, hashes, np.zeros_like(hashes), np.full(num_found, 50, dtype=np.uint8)
