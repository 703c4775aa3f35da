"""A storage of your own: the host tier keeps its blocks compressed.

A storage reads and writes batches of whole blocks; what it inherits does the rest. This one has no addresses, so
blocks pass through a small staging ring on their way. The suite `kvbm.testing.storages.StorageTests` proves a storage;
``docs/extending.md`` shows how. Run it: ``python examples/custom_storage.py``.
"""

import os
import zlib

import numpy as np
import numpy.typing as npt

import kvbm
from kvbm.storage.base import Storage
from kvbm.types import IdArray, Tier

os.environ["KVBM_DEVICE"] = "cpu"  # NumPy looks into blocks here, and sees none in a GPU's memory


class CompressedStorage(Storage):
    """Blocks in host memory, each compressed by zlib."""

    def __init__(self, layout: kvbm.BlockLayout) -> None:
        super().__init__(layout)
        self._blocks: dict[int, bytes] = {}

    @property
    def kept_nbytes(self) -> int:
        return sum(map(len, self._blocks.values()))

    def read(self, block_ids: IdArray) -> npt.NDArray[np.uint8]:
        ids = self._begin(block_ids)  # refuses ids outside, and a closed storage
        data = np.zeros((len(ids), self.layout.block_nbytes), dtype=np.uint8)
        for row, block_id in zip(data, ids.tolist(), strict=True):
            if block_id in self._blocks:
                row[:] = np.frombuffer(zlib.decompress(self._blocks[block_id]), dtype=np.uint8)
        return data

    def write(self, block_ids: IdArray, data: npt.NDArray[np.uint8]) -> None:
        ids = self._begin(block_ids)
        data = self._checked_data(ids, data)  # refuses another shape or type, and an id given twice
        self.has_checksum[ids] = False  # whoever wrote the bytes says what they are, by `record`
        for row, block_id in zip(data, ids.tolist(), strict=True):
            self._blocks[block_id] = zlib.compress(row.tobytes(), level=1)

    def close(self, timeout: float | None = None) -> None:
        super().close(timeout)
        self._blocks.clear()


dimensions = {"num_layers": 4, "outer_dim": 2, "inner_dim": 64, "dtype": "float32"}
storage = CompressedStorage(kvbm.BlockLayout.fully_contiguous(num_blocks=64, block_size=16, **dimensions))
with kvbm.BlockManager(page_size=16, device_blocks=8, storages={Tier.HOST: storage}, **dimensions) as manager:
    rng = np.random.default_rng(0)
    sequence = manager.sequence(range(8 * 16))
    fresh = manager.allocate_blocks(8)
    for block in fresh:
        block.numpy()[...] = rng.integers(0, 16, (4, 2, 16, 64))
    expected = [block.numpy().copy() for block in fresh]
    manager.register_blocks(fresh.complete(sequence.hashes)).release()

    manager.flush()
    print(f"{8 * manager.layout.block_nbytes} bytes of blocks take {storage.kept_nbytes} bytes in the host tier")

    manager.reset_pool("device")
    hit = manager.match_sequence_hashes(sequence.hashes)
    print(f"found {hit.tiers}")
    with manager.onboard(hit).result() as blocks:
        assert len(blocks) == 8
        assert all(np.array_equal(block.numpy(), array) for block, array in zip(blocks, expected, strict=True))
    print("all bytes came back")
    manager.check()
