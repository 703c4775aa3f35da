"""Only blocks that were of use twice go down: most blocks of most traces never are."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.policies.base import Candidates, OffloadPolicy
from kvbm.types import HashArray


class SecondUsePolicy(OffloadPolicy):
    """Offloads a block at its second use: found by a request, or computed again after it had been evicted.

    Parameters
    ----------
    max_blocks : int
        Hashes remembered; the one used longest ago is forgotten first. About 100 bytes each.
    """

    def __init__(self, max_blocks: int = 65536) -> None:
        if max_blocks < 1:
            raise ConfigError(f"max_blocks is {max_blocks}, give 1 or more")
        self._max_blocks = max_blocks
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those seen before."""
        return self._count(blocks.hashes)

    def used(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those seen before, which is all of them unless they were forgotten."""
        return self._count(blocks.hashes)

    def _count(self, hashes: HashArray) -> npt.NDArray[np.bool_]:
        again = np.zeros(len(hashes), dtype=np.bool_)
        for i, name in enumerate(map(bytes, hashes.view(np.uint8).reshape(-1, 16))):
            again[i] = name in self._seen
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > self._max_blocks:
            self._seen.popitem(last=False)
        return again
