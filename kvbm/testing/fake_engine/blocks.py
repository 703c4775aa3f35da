"""The block ids of a fake engine: reference counts, what is free in the order in which it is reused, and prefixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvbm.testing.fake_engine.requests import NULL_BLOCK
from kvbm.testing.fake_engine.shape import EngineShape


class BlockPool:
    """Which blocks are used, and which hold a prefix that may be found again.

    Parameters
    ----------
    shape : EngineShape

    Attributes
    ----------
    step : int
        Number of the step that is next or under way.
    """

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._num_uses = [0] * shape.num_blocks
        self._free = OrderedDict.fromkeys(block for block in range(shape.num_blocks) if block != NULL_BLOCK)
        self._cached: dict[tuple[int, bytes], int] = {}
        self._key_of: dict[int, tuple[int, bytes]] = {}
        self._freed_at = [-1] * shape.num_blocks
        self.step = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def get_num_free_blocks(self) -> int:
        """Give the same, as vLLM's block pool names it."""
        return len(self._free)

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses any."""
        return len(self._free) == self._shape.num_blocks - 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, those first that were freed first; what they held is forgotten."""
        ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in ids:
            self._num_uses[block] = 1
        self.uncache(ids)
        return ids

    def is_free(self, block: int) -> bool:
        """Tell whether nobody uses a block."""
        return block in self._free

    def was_free_before(self, block: int) -> bool:
        """Tell whether a block was free already when the step before this one began its work."""
        return self._freed_at[block] < self.step

    def touch(self, block_ids: Iterable[int]) -> None:
        """Use blocks that hold something."""
        for block in block_ids:
            if block != NULL_BLOCK:
                self._num_uses[block] += 1
                self._free.pop(block, None)

    def release(self, block_ids: Sequence[int]) -> None:
        """Let go of blocks; the last of them is reused first."""
        for block in reversed(block_ids):
            if block == NULL_BLOCK:
                continue
            assert self._num_uses[block] > 0, f"block {block} is freed twice"
            self._num_uses[block] -= 1
            if not self._num_uses[block]:
                self._free[block] = None
                self._freed_at[block] = self.step

    # -- prefixes ----------------------------------------------------------------------------------------------

    def cache(self, group: int, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Let blocks be found, one for each hash; a hash keeps the block it has."""
        if not self._shape.has_prefix_cache:
            return
        for digest, block in zip(hashes, block_ids, strict=True):
            key = group, digest
            if block != NULL_BLOCK and key not in self._cached and block not in self._key_of:
                self._cached[key] = block
                self._key_of[block] = key

    def uncache(self, block_ids: Iterable[int]) -> None:
        """Let blocks not be found any more."""
        for block in block_ids:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._cached[key]

    def find(self, hashes: Sequence[bytes], most: int) -> list[list[int]]:
        """Give for each group the blocks of the longest prefix that all groups have, at most so many blocks."""
        windows = [self.num_window_blocks(group) for group in range(self._shape.num_groups)]
        for num_blocks in range(min(most, len(hashes)), 0, -1):
            tables = []
            for group, window in enumerate(windows):
                first = max(0, num_blocks - window) if window is not None else 0
                found = [self._cached.get((group, digest)) for digest in hashes[first:num_blocks]]
                held = [block for block in found if block is not None]
                if len(held) < num_blocks - first:
                    break
                tables.append([NULL_BLOCK] * first + held)
            else:
                return tables
        return [[] for _ in windows]

    def num_window_blocks(self, group: int) -> int | None:
        """Give the blocks that computing the next token reads in a group behind whole blocks; None for all."""
        window = self._shape.windows[group]
        return -(-(window - 1) // self._shape.block_tokens) if window else None

    def reset(self) -> bool:
        """Forget all prefixes, where nobody uses a block; return whether that was so."""
        if self.is_idle:
            self._cached.clear()
            self._key_of.clear()
        return self.is_idle
