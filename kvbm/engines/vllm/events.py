"""KV events of our tiers, as vLLM publishes them: what a router needs to know of host memory and of storage.

A block is announced in its new tier before it is taken back from the old one. vLLM names blocks in events by the last
eight bytes of their digests, as a number, which are the last eight of our hashes too, whatever adapter they belong to.

What a disk or a store holds when an engine starts is announced as well, some thousand blocks with each step. Where
vLLM is told to name blocks by whole digests (``VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0``) that cannot be: our hashes have
sixteen bytes of a digest. Such a block is announced once a request has named it, and never taken back before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from vllm import envs
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored

from kvbm.engines.groups import Group
from kvbm.engines.vllm.event_names import EventNames, key_of
from kvbm.events import KvEvent, KvEventType, MergedSubscription
from kvbm.pool import BlockPool
from kvbm.types import ZERO_HASH, HashArray, IdArray, Tier

_log = logging.getLogger("kvbm.engines")
_AT_ONCE = 1024  # blocks of before that are announced with a step, in about a millisecond

Row = tuple[int, bytes, bytes]  # slot, name, parent's name


@dataclass
class _Backlog:
    """Blocks of a pool that have yet to be announced, and how many of them were."""

    names: HashArray
    parents: HashArray
    num_done: int = 0


class VllmEvents:
    """Turns what happens in our pools, and what they hold already, into vLLM's events.

    Parameters
    ----------
    groups : sequence of Group
    block_tokens : int
        Tokens of a block.
    """

    def __init__(self, groups: Sequence[Group], *, block_tokens: int) -> None:
        self._subscriptions = [
            MergedSubscription([pool.subscribe_events() for pool in group.planner.pools]) for group in groups
        ]
        self._block_tokens = block_tokens
        self._pools: list[tuple[int, BlockPool]] = [
            (index, pool) for index, group in enumerate(groups) for pool in group.planner.pools
        ]
        self._names: EventNames | None = None  # numbers need none
        if not envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES:
            self._names = EventNames([pool.total_blocks for _, pool in self._pools])
        self._backlogs: dict[int, _Backlog] = {}  # by index of the pool
        for place in range(len(self._pools)):
            self._announce_all(place)
        self._is_cleared = False

    def named(self, digests: Sequence[bytes], *, is_new: bool = False) -> None:
        """Learn the digests of a request's blocks, where events need them.

        Parameters
        ----------
        digests : sequence of bytes
            Of all its full blocks so far, in order.
        is_new : bool
            It was not named since it got its blocks.
        """
        if self._names is not None:
            self._names.learn(digests, is_new=is_new)

    def cleared(self) -> None:
        """Announce that every block of every tier is gone, in place of the blocks one by one."""
        for subscription in self._subscriptions:
            subscription.poll()
        self._backlogs.clear()
        if self._names is not None:
            self._names.clear()
        self._is_cleared = True

    def take(self) -> list[Any]:
        """Give the events since the last call."""
        events: list[Any] = [AllBlocksCleared()] if self._is_cleared else []
        self._is_cleared = False
        for index, subscription in enumerate(self._subscriptions):
            found = subscription.poll()
            for (kind, tier), run in groupby(found, key=lambda event: (event.event_type, event.tier)):
                place = self._place_of(index, tier)
                if kind is KvEventType.GAP:
                    _log.warning("events were lost group=%d tier=%s: all is announced anew", index, tier.value)
                    self._announce_all(place)
                elif kind is KvEventType.CREATED:
                    events += self._stored(place, map(_row_of, run))
                elif kind is KvEventType.DELETED:
                    events += self._removed(place, map(_row_of, run))
        if self._names is not None:
            found_late = self._names.take_found()
            for place, late in groupby(found_late, key=lambda one: one[0]):
                events += self._stored(place, self._still_there(place, [one[1:] for one in late]))
        if self._backlogs:
            place = next(iter(self._backlogs))
            events += self._stored(place, self._next_of_backlog(place))
        return events

    def close(self) -> None:
        """Read no more."""
        for subscription in self._subscriptions:
            subscription.close()

    # -- private -----------------------------------------------------------------------------------------------

    def _place_of(self, group: int, tier: Tier) -> int:
        """Give the index of a group's pool."""
        return next(place for place, (index, pool) in enumerate(self._pools) if index == group and pool.tier is tier)

    def _announce_all(self, place: int) -> None:
        """Have all that a pool holds now announced by and by."""
        _, names, parents, _ = self._pools[place][1].registered()
        self._backlogs.pop(place, None)
        if len(names):
            self._backlogs[place] = _Backlog(names, parents)
        if self._names is not None:
            self._names.overlook(place)

    def _next_of_backlog(self, place: int) -> Iterator[Row]:
        """Take the next of what a pool held, without what has left it since."""
        backlog = self._backlogs[place]
        part = slice(backlog.num_done, backlog.num_done + _AT_ONCE)
        names, parents = backlog.names[part], backlog.parents[part]
        backlog.num_done = part.stop
        if backlog.num_done >= len(backlog.names):
            del self._backlogs[place]
        ids = self._pools[place][1].lookup(names)
        return _rows(ids[ids >= 0], names[ids >= 0], parents[ids >= 0])

    def _still_there(self, place: int, blocks: Sequence[tuple[int, int]]) -> Iterator[Row]:
        """Give those of some blocks, by slot and key, that are still in their slots."""
        ids: IdArray = np.array([slot for slot, _ in blocks], dtype=np.int32)
        names, parents, _ = self._pools[place][1].describe_blocks(ids)
        rows = _rows(ids, names, parents)
        return (row for row, (_, key) in zip(rows, blocks, strict=True) if key_of(row[1]) == key)

    def _stored(self, place: int, rows: Iterable[Row]) -> list[Any]:
        """Announce blocks, those that follow each other together."""
        group, pool = self._pools[place]
        events: list[Any] = []
        last = None
        for slot, name, parent in rows:
            key = key_of(name)
            shown = key if self._names is None else self._names.store(place, slot, key)
            if shown is None:
                continue
            if parent == last:
                events[-1].block_hashes.append(shown)
            else:
                events.append(
                    BlockStored(
                        block_hashes=[shown],
                        parent_block_hash=None if parent == ZERO_HASH else self._shown(parent),
                        token_ids=[],  # known to the event that told of the block in the engine's own memory
                        block_size=self._block_tokens,
                        lora_id=None,
                        medium=_medium(pool.tier),
                        lora_name=None,
                        group_idx=group,
                    )
                )
            last = name
        return events

    def _removed(self, place: int, rows: Iterable[Row]) -> list[Any]:
        """Take blocks back."""
        group, pool = self._pools[place]
        shown: list[Any] = []
        for slot, name, _ in rows:
            key = key_of(name)
            one = key if self._names is None else self._names.remove(place, slot, key)
            if one is not None:
                shown.append(one)
        return [BlockRemoved(block_hashes=shown, medium=_medium(pool.tier), group_idx=group)] if shown else []

    def _shown(self, name: bytes) -> int | bytes | None:
        return key_of(name) if self._names is None else self._names.get(key_of(name))


def _row_of(event: KvEvent) -> Row:
    return event.block_id, event.sequence_hash, event.parent_hash


def _rows(ids: IdArray, names: HashArray, parents: HashArray) -> Iterator[Row]:
    for slot, name, parent in zip(ids.tolist(), names, parents, strict=True):
        yield slot, name.tobytes(), parent.tobytes()


def _medium(tier: Tier) -> str:
    return str(MEDIUM_CPU if tier is Tier.HOST else MEDIUM_STORAGE)
