"""What is kept of one request: plain values, written by the scheduler's thread, read by any.

Structs of msgspec, for they are made in half the time of dataclasses.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.engines.removals import Removal
from kvbm.types import Tier

Lying = tuple[Sequence[Tier], npt.NDArray[np.int8]]

_SHOWN = 200  # characters of an id


def shorten(request_id: str) -> str:
    """Give the beginning of an id that a client may have made as long as he liked."""
    return request_id if len(request_id) <= _SHOWN else f"{request_id[:_SHOWN]}..."


class Miss(msgspec.Struct, frozen=True):
    """Why a group of layers had no more of a request.

    Attributes
    ----------
    group : int
    place : int
        Of the first block that could not be had.
    name : bytes
        Its hash.
    tier : Tier, optional
        Where it lies all the same: a tier that is left alone.
    removals : tuple of (Tier, Removal or None)
        For each tier of the group how it left, None where it was never seen there.
    is_saving : bool
        It was on its way into the tiers.
    """

    group: int
    place: int
    name: bytes
    tier: Tier | None
    removals: tuple[tuple[Tier, Removal | None], ...]
    is_saving: bool


class Verdict(msgspec.Struct, frozen=True):
    """What loading was thought to cost; see `kvbm.planner.Advice`."""

    num_blocks: int
    load_s: float
    recompute_s: float
    queue_s: float
    reason: str


class Look(msgspec.Struct, frozen=True):
    """One answer to how much of a request is cached.

    Attributes
    ----------
    first_at, at : float
        Moments of the clock when this answer was given first and last.
    num_times : int
        It was worked out; answers that were only given again are not counted.
    num_computed, most, num_there, num_blocks : int
        Blocks that the engine has, at most can use, that lie there with no gap, and that were promised; all of them
        counted from the begin of the request.
    lying : tuple of (tiers, (num_blocks,) int8)
        For each group where the blocks behind the computed ones lie, -1 where in none; empty where none was looked for.
    closed : tuple of Tier
        Left alone because its loads took longer than computing.
    verdict : Verdict, optional
    misses : tuple of Miss
    """

    first_at: float
    at: float
    num_times: int
    num_computed: int
    most: int
    num_there: int
    num_blocks: int
    lying: tuple[Lying, ...]
    closed: tuple[Tier, ...]
    verdict: Verdict | None
    misses: tuple[Miss, ...]


class Load(msgspec.Struct):
    """One load.

    Attributes
    ----------
    at : float
        Moment of the clock when it began.
    first, last : int
        Blocks that were promised.
    sources : dict of str to int
        Blocks by the tier they were found in when it began, of all groups.
    num_good : int
        Leading blocks that every group has got.
    seconds : float, optional
        None while it is under way.
    losses : tuple of str
        What did not come, and why.
    """

    at: float
    first: int
    last: int
    sources: dict[str, int] = {}
    num_good: int = 0
    seconds: float | None = None
    losses: tuple[str, ...] = ()


class Record(msgspec.Struct):
    """One request; a field's value is replaced, not changed."""

    request_id: str
    at: float  # when it was asked for first
    num_named: int = 0
    first_name: bytes = b""
    last_name: bytes = b""
    looks: tuple[Look, ...] = ()
    loads: tuple[Load, ...] = ()
    notes: tuple[tuple[float, str], ...] = ()
    num_saved: int = 0
    num_preempted: int = 0
    finished_at: float | None = None
    nbytes: int = 0
