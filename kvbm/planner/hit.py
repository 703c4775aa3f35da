"""Hit: what a look-up over the tiers found, each block held by one reference in the tier it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as as_index
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks
from kvbm.errors import BlockStateError
from kvbm.pool import BlockPool
from kvbm.types import HashArray, IdArray, Places, Tier


@dataclass
class HitPart:
    """The blocks of a hit that lie in one tier, and their places in the sequence, rising."""

    pool: BlockPool
    blocks: ImmutableBlocks
    places: Places


class Hit:
    """The longest cached prefix of a sequence over all tiers.

    Used up by `BlockManager.onboard`; otherwise released by `release`, ``with``, or the garbage collector.

    Attributes
    ----------
    num_blocks : int
    hashes : (num_blocks, 2) uint64, host
        Sequence hashes of the blocks found, read-only.
    """

    __slots__ = ("_parts", "hashes", "num_blocks")

    def __init__(self, parts: list[HitPart], hashes: HashArray) -> None:
        self._parts: list[HitPart] | None = parts
        self.num_blocks = len(hashes)
        self.hashes = hashes
        hashes.flags.writeable = False  # the planner goes by it

    @property
    def tiers(self) -> dict[str, int]:
        """Blocks found in each tier, by the tier's name."""
        counts: dict[str, int] = {}
        for part in self._parts or ():
            if len(part.places):
                tier = part.pool.tier.value
                counts[tier] = counts.get(tier, 0) + len(part.places)
        return counts

    def __len__(self) -> int:
        return self.num_blocks

    def truncate(self, num_blocks: int) -> None:
        """Keep the leading blocks and let go of those behind them, e.g. because they are sooner computed than loaded.

        Parameters
        ----------
        num_blocks : int
            0 or more; as many as there are, or more, changes nothing.

        Raises
        ------
        BlockStateError
            The hit is used up.
        """
        length = min(max(as_index(num_blocks), 0), self.num_blocks)
        parts = self.take()
        cut = [_cut(part, length) for part in parts]
        self.hashes, self.num_blocks = self.hashes[:length], length
        self.give_back([cut[0], *(part for part in cut[1:] if len(part.places))])

    def tier_of_blocks(self) -> tuple[list[Tier], npt.NDArray[np.intp]]:
        """Tell where each block lies: the tiers, and for each block, (num_blocks,) int, which of them.

        Raises
        ------
        BlockStateError
            The hit is used up.
        """
        parts = self.take()
        self.give_back(parts)
        tiers = list(dict.fromkeys(part.pool.tier for part in parts if len(part.places)))
        where: Places = np.zeros(self.num_blocks, dtype=np.intp)
        for part in parts:
            if len(part.places):
                where[part.places] = tiers.index(part.pool.tier)
        return tiers, where

    def release(self) -> None:
        """Give the blocks back without using them, the deeper ones first; a second call does nothing."""
        parts, self._parts = self._parts, None
        for part in reversed(parts or ()):
            part.blocks.release()

    def take(self) -> list[HitPart]:
        """Use up the hit and give its parts; for the planner.

        Raises
        ------
        BlockStateError
            It is used up already.
        """
        parts, self._parts = self._parts, None
        if parts is None:
            raise BlockStateError("this hit is used up: match again")
        return parts

    def give_back(self, parts: list[HitPart]) -> None:
        """Undo `take`."""
        self._parts = parts

    def __enter__(self) -> Hit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Hit({self.num_blocks} blocks, {self.tiers})" if self._parts is not None else "Hit(used up)"


def find_hit(pools: Sequence[BlockPool], hashes: HashArray) -> Hit:
    """Hold the longest prefix of a sequence whose blocks lie in any of these pools, each in the highest that has it.

    Parameters
    ----------
    pools : sequence of BlockPool
        From the top tier down.
    hashes : (num_blocks, 2) uint64, host
    """
    top = pools[0].match_sequence_hashes(hashes)
    num_top = len(top)
    parts = [HitPart(pools[0], top, np.arange(num_top))]
    if num_top == len(hashes) or len(pools) == 1:
        return Hit(parts, top.hashes)
    rest = hashes[num_top:]
    whole = _find_whole(pools, rest)
    if whole is not None:  # as a rule; it saves half the time of a small hit
        pool, ids = whole
        blocks, is_there = pool.hold_blocks(ids, rest.copy())
        num_blocks = len(hashes)
        if len(blocks) < len(rest):  # evicted since it was found
            kept = first_true(~is_there)
            num_blocks = num_top + kept
            blocks, beyond = blocks.split(kept)
            beyond.release()
        parts.append(HitPart(pool, blocks, np.arange(num_top, num_blocks)))
        return Hit(parts, hashes[:num_blocks].copy())
    where, ids = find_sources(pools, rest)
    length = first_true(where < 0)
    for index, pool in enumerate(pools):
        (places,) = (where[:length] == index).nonzero()
        if not len(places):
            continue
        blocks, is_there = pool.hold_blocks(ids.take(places), rest.take(places, axis=0))
        if len(blocks) < len(places):  # evicted since it was found
            length = min(length, int(places[first_true(~is_there)]))
            places = places[is_there]
        parts.append(HitPart(pool, blocks, places + num_top))
    length += num_top
    return Hit([_cut(part, length) for part in parts], hashes[:length].copy())


def find_sources(pools: Sequence[BlockPool], hashes: HashArray) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Tell for each hash the first pool that has it, -1 where none has, and its slot there; holds nothing."""
    ids = pools[0].lookup(hashes)
    where = -(ids < 0).view(np.int8)  # 0 where it is there, -1 where not
    for index, pool in enumerate(pools[1:], start=1):
        (missing,) = (where < 0).nonzero()
        if not len(missing):
            break
        found = pool.lookup(hashes.take(missing, axis=0))
        ids[missing] = found
        where[missing[found >= 0]] = index
    return where, ids


def _find_whole(pools: Sequence[BlockPool], hashes: HashArray) -> tuple[BlockPool, IdArray] | None:
    """Give the one pool that has all of these hashes where none above it has any, and the slots; None otherwise."""
    for pool in pools:
        ids = pool.lookup(hashes)
        num_found = np.count_nonzero(ids >= 0)
        if num_found:
            return (pool, ids) if num_found == len(hashes) and pool is not pools[0] else None
    return None


def first_true(mask: npt.NDArray[np.bool_]) -> int:
    """Give the place of the first true answer, the number of answers where none is."""
    place = int(mask.argmax()) if len(mask) else 0
    return place if place or (len(mask) and mask[0]) else len(mask)


def _cut(part: HitPart, length: int) -> HitPart:
    """Let go of the blocks of a part that lie behind the end of the hit."""
    if not len(part.places) or part.places[-1] < length:
        return part
    num_kept = int(np.searchsorted(part.places, length))
    kept, rest = part.blocks.split(num_kept)
    rest.release()
    return HitPart(part.pool, kept, part.places[:num_kept])
