"""KV events of our tiers, as vLLM publishes them: what a router needs to know of host memory and of storage.

A block is announced in its new tier before it is taken back from the old one. vLLM names blocks in events by the last
eight bytes of their digests, as a number, which are the last eight of our hashes too; where it is told to name them by
whole digests (``VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0``) those that a request has named lately are known.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from vllm import envs
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored

from kvbm.engines.groups import Group
from kvbm.events import KvEvent, KvEventType, MergedSubscription
from kvbm.types import HASH_NBYTES, ZERO_HASH, Tier

_log = logging.getLogger("kvbm.engines")
_DIGESTS = 1 << 18  # that are known by name


class VllmEvents:
    """Turns what happens in our pools into vLLM's events.

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
        self._are_numbers = bool(envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()
        self._is_cleared = False

    def named(self, digests: Sequence[bytes]) -> None:
        """Learn the digests of a request's blocks, where events need them."""
        if self._are_numbers:
            return
        for digest in digests:
            self._digests[bytes(digest[-HASH_NBYTES:])] = bytes(digest)
        while len(self._digests) > _DIGESTS:
            self._digests.popitem(last=False)

    def cleared(self) -> None:
        """Announce that every block of every tier is gone, in place of the blocks one by one."""
        for subscription in self._subscriptions:
            subscription.poll()
        self._is_cleared = True

    def take(self) -> list[Any]:
        """Give the events since the last call."""
        events: list[Any] = [AllBlocksCleared()] if self._is_cleared else []
        self._is_cleared = False
        for index, subscription in enumerate(self._subscriptions):
            found = subscription.poll()
            for (kind, tier), run in groupby(found, key=lambda event: (event.event_type, event.tier)):
                if kind is KvEventType.GAP:
                    _log.warning("events were lost group=%d tier=%s: routers may know too little", index, tier.value)
                elif kind is KvEventType.CREATED:
                    events += self._stored(run, tier, index)
                elif kind is KvEventType.DELETED:
                    names = [
                        name for name in map(self._name, (event.sequence_hash for event in run)) if name is not None
                    ]
                    events += [BlockRemoved(block_hashes=names, medium=_medium(tier), group_idx=index)] if names else []
        return events

    def close(self) -> None:
        """Read no more."""
        for subscription in self._subscriptions:
            subscription.close()

    # -- private -----------------------------------------------------------------------------------------------

    def _stored(self, run: Iterable[KvEvent], tier: Tier, group: int) -> list[Any]:
        """Announce blocks, those that follow each other together."""
        events: list[Any] = []
        last = None
        for event in run:
            name = self._name(event.sequence_hash)
            if name is None:
                continue
            if last is not None and event.parent_hash == last:
                events[-1].block_hashes.append(name)
            else:
                parent = None if event.parent_hash == ZERO_HASH else self._name(event.parent_hash)
                events.append(
                    BlockStored(
                        block_hashes=[name],
                        parent_block_hash=parent,
                        token_ids=[],  # known to the event that told of the block in the engine's own memory
                        block_size=self._block_tokens,
                        lora_id=None,
                        medium=_medium(tier),
                        lora_name=None,
                        group_idx=group,
                    )
                )
            last = event.sequence_hash
        return events

    def _name(self, name: bytes) -> int | bytes | None:
        if self._are_numbers:
            return int.from_bytes(name[-8:], "big")
        return self._digests.get(bytes(name))


def _medium(tier: Tier) -> str:
    return str(MEDIUM_CPU if tier is Tier.HOST else MEDIUM_STORAGE)
