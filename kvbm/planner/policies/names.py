"""NameTable: the names used last, in a table of fixed size; stands in for an LRU list where batches are large.

A name may lie only in the eight places of its set, and the oldest of those makes room for it. That keeps about what a
list over all would keep, and every call works on a whole batch. It never locks; its memory never grows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.planner.policies.sketch import Words, mix_words

_NUM_WAYS = 8

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


class NameTable:
    """Remembers names and when they were used.

    Parameters
    ----------
    num_names : int
        1 or more; rounded up to whole sets of eight.

    Notes
    -----
    24 bytes a name.
    """

    def __init__(self, num_names: int) -> None:
        self._num_sets = -(-num_names // _NUM_WAYS)
        self._names = np.zeros((self._num_sets * _NUM_WAYS, 2), dtype=np.uint64)
        self._used_at = np.zeros(self._num_sets * _NUM_WAYS, dtype=np.int64)  # 0 where nothing is
        self._now = 0

    def __len__(self) -> int:
        """Count the names."""
        return int(np.count_nonzero(self._used_at))

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the same for ever."""
        return self._names.nbytes + self._used_at.nbytes

    def find(self, names: Words) -> tuple[Places, Mask]:
        """Look names up.

        Parameters
        ----------
        names : (n, 2) uint64
            Mixed, so that their bits are as good as random.

        Returns
        -------
        places : (n,) int64
            Where each name is; of one that is absent, where its set's oldest name is, or the next oldest where others
            of the batch are absent from that set too.
        is_there : (n,) bool
        """
        word = mix_words(names[:, 0] ^ (names[:, 1] >> np.uint64(1)))
        sets = (((word >> np.uint64(32)) * np.uint64(self._num_sets)) >> np.uint64(32)).astype(np.int64)
        ways = sets[:, None] * _NUM_WAYS + np.arange(_NUM_WAYS)
        used_at = self._used_at[ways]
        same = (self._names[ways] == names[:, None]).all(axis=2) & (used_at > 0)
        is_there = same.any(axis=1)
        by_age = used_at.argsort(axis=1)
        place = np.arange(len(names))
        way = np.where(is_there, same.argmax(axis=1), by_age[place, _ranks(sets, ~is_there) % _NUM_WAYS])
        return ways[place, way], is_there

    def names_at(self, places: Places) -> tuple[Words, Mask]:
        """Give the names at places, and where there are any."""
        return self._names[places], self._used_at[places] > 0

    def put(self, places: Places, names: Words) -> None:
        """Note a use of names at the places that `find` gave, now or newly there."""
        self._now += 1
        self._names[places] = names
        self._used_at[places] = self._now


def _ranks(sets: Places, chosen: Mask) -> Places:
    """Give each chosen one its number within its set: (n,) int64, 0 for the others."""
    ranks = np.zeros(len(sets), dtype=np.int64)
    (places,) = chosen.nonzero()
    order = places[sets[places].argsort(kind="stable")]
    ordered = sets[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    number = np.arange(len(order))
    ranks[order] = number - np.maximum.accumulate(np.where(is_first, number, 0))
    return ranks
