"""Between arrays and lists: the reference store works on Python lists and answers in arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvbm.errors import id_out_of_range, length_mismatch
from kvbm.types import HASH_NBYTES, HashArray, IdArray, hash_array, id_array


def names_of(hashes: HashArray) -> list[bytes]:
    """Give each hash of a batch as 16 bytes."""
    data = hash_array(hashes).tobytes()
    return [data[i : i + HASH_NBYTES] for i in range(0, len(data), HASH_NBYTES)]


def to_id_array(ids: list[int]) -> IdArray:
    """Give ids as a fresh (n,) int32 array."""
    return np.array(ids, dtype=np.int32)


def to_hash_array(names: list[bytes]) -> HashArray:
    """Give hashes as a fresh (n, 2) uint64 array."""
    hashes: HashArray = np.frombuffer(b"".join(names), dtype="<u8").reshape(-1, 2).copy()
    return hashes


def ids_in(num_blocks: int, ids: IdArray, **batches: Sequence[object]) -> list[int]:
    """Give ids as a list after checking their form, then the lengths of the batches beside them, then their range."""
    block_ids: list[int] = id_array(ids).tolist()
    for name, batch in batches.items():
        if len(batch) != len(block_ids):
            raise length_mismatch(name, len(batch), len(block_ids))
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise id_out_of_range(block_id, num_blocks)
    return block_ids
