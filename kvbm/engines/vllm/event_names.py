"""The whole digests of the blocks that events name, where an engine wants those and not their last eight bytes.

A name of ours holds no whole digest, so digests are learned from requests. They are found by their last eight bytes:
the first eight of a name may differ from the digest's, see `kvbm.engines.digests.Digests`. What lies in no tier is kept
for a while only, and what lies in one has a slot there: memory is bounded by the tiers. Used by one thread.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

_SPARE = 1 << 18  # digests of blocks that lie in no tier; of 16 tokens each they are four million tokens


class EventNames:
    """Knows by which digests blocks were announced, and which blocks wait for theirs.

    Parameters
    ----------
    sizes : sequence of int
        Blocks of every pool; pools are known by their index in it.
    max_spare : int
        Digests to keep of blocks that lie in no tier; of more, those named longest ago are forgotten.
    """

    def __init__(self, sizes: Sequence[int], *, max_spare: int = _SPARE) -> None:
        self._max_spare = max_spare
        self._spare: OrderedDict[int, bytes] = OrderedDict()
        self._digests: dict[int, bytes] = {}  # of announced blocks
        self._num_slots: dict[int, int] = {}  # that each of those has
        self._keys = [array("Q", bytes(8 * size)) for size in sizes]  # by pool and slot; 0: not announced
        self._unnamed: list[dict[int, int]] = [{} for _ in sizes]  # by pool, slots of blocks that wait
        self._found: list[tuple[int, int, int]] = []  # of those: pool, slot, key

    def __len__(self) -> int:
        """Digests that are known."""
        return len(self._spare) + len(self._digests)

    def learn(self, digests: Sequence[bytes], *, is_new: bool) -> None:
        """Take over a request's digests.

        Parameters
        ----------
        digests : sequence of bytes
            Of all its blocks so far, in order.
        is_new : bool
            Look at all of them; else at those behind the last one that is known.
        """
        for digest in reversed(digests):
            key = key_of(digest)
            if not is_new and (key in self._digests or key in self._spare):
                break
            if key in self._spare:
                self._spare.move_to_end(key)
            elif key not in self._digests:
                self._spare[key] = bytes(digest)
                for pool, slots in enumerate(self._unnamed):
                    if slots and (slot := slots.pop(key, -1)) >= 0:
                        self._found.append((pool, slot, key))
        self._trim()

    def get(self, key: int) -> bytes | None:
        """Give a digest; None where no request has named it lately."""
        return self._digests.get(key) or self._spare.get(key)

    def store(self, pool: int, slot: int, key: int) -> bytes | None:
        """Note a block that is announced, and give its digest; None where it waits until a request names it."""
        self._release(pool, slot)  # something else was there, and its end was overlooked
        digest = self.get(key)
        if digest is None:
            self._unnamed[pool][key] = slot
            return None
        self._spare.pop(key, None)
        self._digests[key] = digest
        self._num_slots[key] = self._num_slots.get(key, 0) + 1
        self._keys[pool][slot] = key
        return digest

    def remove(self, pool: int, slot: int, key: int) -> bytes | None:
        """Note a block that is gone, and give its digest; None where it was never announced."""
        if self._unnamed[pool].get(key) == slot:
            del self._unnamed[pool][key]
        if self._keys[pool][slot] != key:
            return None
        digest = self._digests[key]
        self._release(pool, slot)
        return digest

    def take_found(self) -> list[tuple[int, int, int]]:
        """Give pool, slot and key of the blocks that waited and were named since the last call, by pool."""
        found, self._found = self._found, []
        found.reverse()  # each request was read from its end
        return sorted(found, key=lambda one: one[0])

    def overlook(self, pool: int) -> None:
        """Note that it is not known any more what waits there; `store` is called anew for all that is there."""
        self._unnamed[pool].clear()

    def clear(self) -> None:
        """Note that nothing is in any tier."""
        self._found = []
        self._unnamed = [{} for _ in self._unnamed]
        self._keys = [array("Q", bytes(8 * len(keys))) for keys in self._keys]
        self._spare.update(self._digests)
        self._digests, self._num_slots = {}, {}
        self._trim()

    # -- private -----------------------------------------------------------------------------------------------

    def _release(self, pool: int, slot: int) -> None:
        key = self._keys[pool][slot]
        if not key:
            return
        self._keys[pool][slot] = 0
        self._num_slots[key] -= 1
        if not self._num_slots[key]:
            del self._num_slots[key]
            self._spare[key] = self._digests.pop(key)  # it may be saved again
            self._trim()

    def _trim(self) -> None:
        while len(self._spare) > self._max_spare:
            self._spare.popitem(last=False)


def key_of(name: bytes) -> int:
    """Give the last eight bytes of a digest, or of our name for it: as a number, as vLLM's events do."""
    return int.from_bytes(name[-8:], "big")
