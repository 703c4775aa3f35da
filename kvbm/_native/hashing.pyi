from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray

def blake2b(data: bytes, *, digest_size: int, key: bytes = ..., person: bytes = ...) -> bytes: ...
def hash_blocks(
    key: bytes,
    parent: bytes,
    tokens: npt.NDArray[np.uint32],
    block_size: int,
    extras: Sequence[bytes] | None = ...,
) -> HashArray: ...
