"""How much of a request is worth loading: what is there, and what comes sooner than computing it would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvbm.engines.groups import Group, longest_hit
from kvbm.engines.history import History
from kvbm.engines.requests import Left
from kvbm.engines.speed import PrefillSpeed, TierGuard
from kvbm.types import HashArray, Tier


class Choice(NamedTuple):
    """What is to be loaded of a request.

    Attributes
    ----------
    num_blocks : int
        Leading blocks of the request, those that the engine has included.
    num_there : int
        Leading blocks that the engine has or that lie in some tier.
    is_on_top : bool
        All that is to be loaded lies in the top tier.
    left : sequence of Left
        Of groups whose blocks are not all worth loading.
    """

    num_blocks: int
    num_there: int
    is_on_top: bool
    left: Sequence[Left]


class Chooser:
    """Looks where a request's blocks lie and says up to which it pays to load them; holds and changes nothing.

    Parameters
    ----------
    groups : sequence of Group
    block_tokens : int
        Tokens of a block.
    speed : PrefillSpeed
    guard : TierGuard
    history : History
        Told of every choice.
    loads_always : bool
        Whatever is there, however long it takes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        block_tokens: int,
        speed: PrefillSpeed,
        guard: TierGuard,
        history: History,
        loads_always: bool = False,
    ) -> None:
        self._groups = tuple(groups)
        self._block_tokens = block_tokens
        self._speed = speed
        self._guard = guard
        self._history = history
        self._loads_always = loads_always

    def choose(
        self, request_id: str, names: HashArray, num_computed: int, most: int, *, least_s: float = 0.0
    ) -> Choice:
        """Give the longest prefix that is there and sooner loaded than computed.

        Parameters
        ----------
        request_id : str
        names : (num_blocks, 2) uint64
        num_computed, most : int
            Blocks that the engine has, and at most can use.
        least_s : float
            Seconds that any load takes: until the engine's step has ended.
        """
        closed: list[Tier] = []
        present, lying = [], []
        for group in self._groups if most > num_computed else ():
            tiers, where = group.where(names[num_computed:most])
            shut = [
                index for index, tier in enumerate(tiers) if not self._loads_always and not self._guard.is_open(tier)
            ]
            closed += [tiers[index] for index in shut]
            mask = np.zeros(most, dtype=np.bool_)
            mask[num_computed:] = (where >= 0) & ~np.isin(where, shut)
            present.append(mask)
            lying.append((tiers, where))
        num_there = length = longest_hit(self._groups, present, num_computed, most) if present else num_computed
        tokens_per_s = None if self._loads_always else self._speed.tokens_per_s
        advice, left = None, []
        for group, (tiers, where) in zip(self._groups, lying, strict=False):
            if tokens_per_s is not None and length > num_computed and group.block_nbytes and not group.window_blocks:
                advice = group.planner.advisor.plan(
                    tiers,
                    where[: length - num_computed],
                    tokens_per_s,
                    block_tokens=self._block_tokens,
                    block_nbytes=group.block_nbytes,
                    least_s=least_s,
                )
                num_asked = length - num_computed
                there, which = names[num_computed:length], where[:num_asked]
                left += [Left(group, tiers, which, there, advice.num_blocks)] if advice.num_blocks < num_asked else []
                length = longest_hit(self._groups, present, num_computed, num_computed + advice.num_blocks)
        self._history.asked(
            request_id,
            names,
            num_computed=num_computed,
            most=most,
            lying=lying,
            closed=closed,
            num_there=num_there,
            num_blocks=length,
            advice=advice,
        )
        is_on_top = all(
            not where[group.first_needed(num_computed, length) - num_computed : length - num_computed].any()
            for group, (_, where) in zip(self._groups, lying, strict=False)
        )
        return Choice(length, num_there, is_on_top, left)


def note_left(left: Sequence[Left]) -> None:
    """Note that blocks were left where they are: once in a while some are fetched, to measure their tier again."""
    for one in left:
        one.group.planner.advisor.note_left(one.tiers, one.where, one.names, one.num_blocks)
