"""What several ranks found after a restart, brought to what all of them have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvbm.jobs import JobResult
from kvbm.types import HashArray, IdArray, Places

Inventory = tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]


def intersect(results: Mapping[int, JobResult], num_blocks: int) -> Inventory:
    """Keep what every rank found: the same hash in the same slot, each hash and slot once, in the first rank's order.

    Parameters
    ----------
    results : dict of rank to JobResult
        Of inventories.
    num_blocks : int
        Slots of the pool; what lies beyond does not count.

    Returns
    -------
    ids, hashes, parents, priorities
        (num_blocks,) int32, (num_blocks, 2) uint64 twice, (num_blocks,) uint8.
    """
    found = [_batches(results[rank]) for rank in sorted(results)]
    if not found or any(batches is None for batches in found):
        return _EMPTY
    first, *others = (batches for batches in found if batches is not None)
    is_kept = (first[0] >= 0) & (first[0] < num_blocks)
    for other in others:
        is_kept &= _is_in(first, other)
    places = _first_of_each(first[0], np.flatnonzero(is_kept))
    places = _first_of_each(first[1], places)
    ids, hashes, parents, priorities = first
    return ids[places], hashes[places], parents[places], priorities[places]


def _batches(result: JobResult) -> Inventory | None:
    ids, hashes, parents, priorities = result.ids, result.hashes, result.parents, result.priorities
    if ids is None or hashes is None or parents is None or priorities is None:
        return None
    return ids, hashes, parents, priorities


def _is_in(one: Inventory, other: Inventory) -> npt.NDArray[np.bool_]:
    """Tell which (slot, hash) of one inventory are in another: (num_blocks,) bool."""
    if not len(other[0]):
        return np.zeros(len(one[0]), dtype=np.bool_)
    order = np.argsort(other[0], kind="stable")
    slots, hashes = other[0][order], other[1][order]
    is_found = np.zeros(len(one[0]), dtype=np.bool_)
    first = np.searchsorted(slots, one[0], side="left")
    last = np.searchsorted(slots, one[0], side="right")
    for step in range(int((last - first).max(initial=0))):  # as a rule one: a slot is named once
        at = np.minimum(first + step, len(slots) - 1)
        is_found |= (first + step < last) & (hashes[at] == one[1]).all(axis=1)
    return is_found


def _first_of_each(values: npt.NDArray[np.generic], places: Places) -> Places:
    """Of places with equal values, keep the first."""
    keys = values[places]
    ordered = np.sort(keys if keys.ndim == 1 else keys[:, 0])
    if not (ordered[1:] == ordered[:-1]).any():  # as a rule; two sorts are saved
        return places
    order = np.argsort(keys, kind="stable") if keys.ndim == 1 else np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_repeated = np.zeros(len(keys), dtype=np.bool_)
    differs = ordered[1:] == ordered[:-1]
    is_repeated[1:] = differs if keys.ndim == 1 else differs.all(axis=1)
    return places if not is_repeated.any() else places[np.sort(order[~is_repeated])]


_EMPTY: Inventory = (
    np.empty(0, dtype=np.int32),
    np.empty((0, 2), dtype=np.uint64),
    np.empty((0, 2), dtype=np.uint64),
    np.empty(0, dtype=np.uint8),
)
