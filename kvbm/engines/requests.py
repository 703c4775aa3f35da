"""One request of an engine, as the scheduler's half follows it: explicit states, explicit steps between them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbm.blocks import ImmutableBlocks
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.errors import BlockStateError
from kvbm.jobs import Transfer
from kvbm.planner import EngineCopy
from kvbm.planner.presence import Presence, Wish
from kvbm.types import HashArray, IdArray, Tier


class RequestState(str, enum.Enum):
    """How far a request is with what it loads."""

    NEW = "new"  # nothing is loaded for it, or not yet
    STAGING = "staging"  # blocks are brought to the host tier; no byte moves towards the engine
    LOADING = "loading"  # the workers have been told which jobs bring its blocks
    RUNNING = "running"  # the engine computes
    HELD = "held"  # it has ended, and its blocks are being saved
    GONE = "gone"


_NEXT = {
    RequestState.NEW: {RequestState.STAGING, RequestState.RUNNING, RequestState.HELD, RequestState.GONE},
    RequestState.STAGING: {RequestState.LOADING},  # also where nothing came: the workers say that it was received
    RequestState.LOADING: {RequestState.RUNNING, RequestState.GONE},
    RequestState.RUNNING: {RequestState.NEW, RequestState.HELD, RequestState.GONE},  # new again when preempted
    RequestState.HELD: {RequestState.GONE},
    RequestState.GONE: set(),
}


@dataclass
class Part:
    """What of a request's load comes from one group of layers.

    Attributes
    ----------
    group : int
    slots : (num_blocks,) int32
        Of the engine.
    staged : Transfer, optional
        Brings the blocks to the host tier, until it has ended.
    copy : EngineCopy, optional
        Brings them on to the engine.
    num_staged : int
        Leading blocks that came to the host tier.
    """

    group: int
    slots: IdArray
    staged: Transfer[ImmutableBlocks] | None = None
    copy: EngineCopy | None = None
    num_staged: int = 0

    def has_loaded_all(self) -> bool:
        """Tell whether every block came to the engine in time."""
        if self.num_staged < len(self.slots) or self.copy is None:
            return not len(self.slots)
        return self.copy.done() and self.copy.exception(0) is None and bool(self.copy.result(0).all())

    def has_ended(self) -> bool:
        """Whether no byte of it moves any more."""
        return self.staged is None and (self.copy is None or (self.copy.done() and not self.copy.is_draining))


class Answer(NamedTuple):
    """What was said of a request when the engine asked.

    Attributes
    ----------
    num_computed_tokens : int
        That the engine had.
    num_tokens : int
        That can be loaded behind them.
    is_sync : bool
        All of them lie in the host tier and may be loaded within the step.
    until : float
        Moment until which that holds.
    """

    num_computed_tokens: int
    num_tokens: int
    is_sync: bool
    until: float


class Left(NamedTuple):
    """What of one group could be loaded, and how much of it is worth it.

    Attributes
    ----------
    group : Group
    tiers : sequence of Tier
    where : (num_blocks,) int8
        For each block which of the tiers it lies in.
    names : (num_blocks, 2) uint64
    num_blocks : int
        Leading ones that are loaded.
    """

    group: Group
    tiers: Sequence[Tier]
    where: npt.NDArray[np.int8]
    names: HashArray
    num_blocks: int


@dataclass
class Request:
    """One request.

    Attributes
    ----------
    request_id : str
    digests : Digests
    num_offered : list of int
        For each group the leading blocks that were offered to be saved.
    parts : list of Part
        Of the load that is under way, or was the last.
    saves : list of (int, EngineCopy)
        Group and copy, of those that may not have landed.
    answer : Answer, optional
        What was said of it last.
    asks_until : float, optional
        Moment until which it waits for what a store says of its blocks, once that was asked.
    wishes : list of (Presence, Wish)
        Stores, and what each was asked for.
    sources : dict of Tier to int
        Tokens of the load by the tier that they lay in.
    lowest : Tier, optional
        The lowest tier that the load comes from.
    began_at : float
        Moment of the clock when it began.
    earliest_step : int
        Step whose report can bring it at the earliest.
    left : sequence of Left
        What of it lies below and was not worth loading, to be noted when it is computed.
    num_loading : int
        Tokens that it is to bring.
    timeout_s : float
        That it may take.
    is_ended : bool
        The engine has said so.
    has_failed : bool
        A load of it did not bring all: what is missing is computed, it does not wait again.
    is_sync : bool
        The load is over before the pass of the step that orders it.
    is_stale : bool
        Its blocks were computed from some that were forgotten since: they are not saved.
    """

    request_id: str
    digests: Digests
    num_offered: list[int]
    state: RequestState = RequestState.NEW
    parts: list[Part] = field(default_factory=list)
    saves: list[tuple[int, EngineCopy]] = field(default_factory=list)
    answer: Answer | None = None
    asks_until: float | None = None
    wishes: list[tuple[Presence, Wish]] = field(default_factory=list)
    sources: dict[Tier, int] = field(default_factory=dict)
    lowest: Tier | None = None
    began_at: float = 0.0
    earliest_step: int = 0
    left: Sequence[Left] = ()
    num_loading: int = 0
    timeout_s: float = 0.0
    is_ended: bool = False
    has_failed: bool = False
    is_sync: bool = False
    is_stale: bool = False

    def take_back(self, digests: Sequence[bytes]) -> None:
        """Forget names that the engine has taken back, and what was done under them; see `Digests.keep`."""
        num_known = len(self.digests)
        num_kept = self.digests.keep(digests)
        if num_kept < num_known:
            self.answer = None
            self.num_offered = [min(num, num_kept) for num in self.num_offered]

    def go(self, state: RequestState) -> None:
        """Take the step to another state.

        Raises
        ------
        BlockStateError
            There is no such step.
        """
        if state not in _NEXT[self.state]:
            raise BlockStateError(f"request {self.request_id!r} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def has_loaded_all(self) -> bool:
        """Tell whether the load that the workers have reported brought every block that was promised."""
        return all(part.has_loaded_all() for part in self.parts)

    def has_ended_load(self) -> bool:
        """Whether no byte of the load moves any more."""
        return all(part.has_ended() for part in self.parts)

    def open_saves(self) -> list[tuple[int, EngineCopy]]:
        """Give the saves whose bytes may still move, and forget the others."""
        self.saves = [(group, copy) for group, copy in self.saves if not copy.done() or copy.is_draining]
        return self.saves
