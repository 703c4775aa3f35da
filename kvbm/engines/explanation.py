"""A request's record as an answer to "why was this slow": what travels to ``kvbm explain``, and how it is worked out.

Made when somebody asks, in that thread, from values that do not change. Every list is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
import numpy as np

from kvbm.engines.history import History
from kvbm.engines.recorded import Load, Look, Lying, Miss, Record, shorten
from kvbm.engines.removals import Removal
from kvbm.types import Tier

_RUNS = 64  # of neighbours in one tier that are told; the rest is counted
_BELOW = (Tier.HOST, Tier.DISK, Tier.REMOTE)
_HOW = {"evicted": "evicted", "expired": "expired", "checksum": "dropped, its checksum was wrong", "reset": "reset"}


class Run(msgspec.Struct, frozen=True):
    """Neighbouring blocks in one tier; tier "engine" is the engine's own memory, "none" is nowhere."""

    first: int
    num_blocks: int
    tier: str


class Reason(msgspec.Struct, frozen=True):
    """Why one tier did not have a block.

    Attributes
    ----------
    tier : str
    why : str
        "never seen", "evicted", "expired", "checksum", "reset" or several with "or", "tier absent", "too slow",
        "being saved", "unreachable".
    text : str
        The same as a sentence.
    seconds_before : float, optional
        How long before the request was asked for it left.
    """

    tier: str
    why: str
    text: str
    seconds_before: float | None = None


class FirstMiss(msgspec.Struct, frozen=True):
    """The block where a prefix ended, in one group of layers."""

    group: int
    block: int
    hash: str
    reasons: list[Reason]


class GroupRuns(msgspec.Struct, frozen=True):
    """Where the blocks of one group lay; `num_runs` counts those that are not told, too."""

    group: int
    window_blocks: int
    runs: list[Run]
    num_runs: int


class Answer(msgspec.Struct, frozen=True):
    """What the engine was told when it asked; see `kvbm.engines.recorded.Look`.

    Attributes
    ----------
    end : str
        Why nothing more was promised, as a sentence.
    """

    at: float
    num_times: int
    engine_blocks: int
    usable_blocks: int
    there_blocks: int
    promised_blocks: int
    groups: list[GroupRuns]
    misses: list[FirstMiss]
    end: str
    predicted_load_s: float | None = None
    predicted_recompute_s: float | None = None


class Loaded(msgspec.Struct, frozen=True):
    """One load; seconds are None while it is under way."""

    at: float
    first: int
    promised_blocks: int
    loaded_blocks: int
    sources: dict[str, int]
    seconds: float | None
    losses: list[str]


class Note(msgspec.Struct, frozen=True):
    """What else was noted, `at` seconds since the epoch."""

    at: float
    text: str


class Summary(msgspec.Struct, frozen=True):
    """One line of the list of recent requests; `at` in seconds since the epoch."""

    request_id: str
    state: str
    at: float
    chain_blocks: int
    engine_blocks: int
    promised_blocks: int
    loaded_blocks: int
    sources: dict[str, int]
    load_s: float | None


class Explanation(msgspec.Struct, frozen=True):
    """Everything that is known of one request."""

    summary: Summary
    pid: int
    block_tokens: int
    first_hash: str
    last_hash: str
    saved_blocks: int
    preemptions: int
    finished_at: float | None
    answers: list[Answer]
    loads: list[Loaded]
    notes: list[Note]


def summarise(record: Record, history: History) -> Summary:
    """Give the line of a request.

    Parameters
    ----------
    record : Record
    history : History
        That it is of.
    """
    looks, loads = record.looks, record.loads
    sources: dict[str, int] = {}
    for load in loads:
        for tier, number in load.sources.items():
            sources[tier] = sources.get(tier, 0) + number
    times = [load.seconds for load in loads if load.seconds is not None]
    return Summary(
        request_id=shorten(record.request_id),
        state=_state_of(record),
        at=record.at + history.since_epoch_s,
        chain_blocks=record.num_named,
        engine_blocks=looks[0].num_computed if looks else 0,
        promised_blocks=sum(load.last - load.first for load in loads),
        loaded_blocks=sum(load.num_good for load in loads),
        sources=sources,
        load_s=sum(times) if times else None,
    )


def explain(record: Record, history: History, others: Sequence[Record] = ()) -> Explanation:
    """Tell what is known of a request.

    Parameters
    ----------
    record : Record
    history : History
        That it is of.
    others : sequence of Record
        In which to look for requests that missed the same block.
    """
    since = history.since_epoch_s
    return Explanation(
        summary=summarise(record, history),
        pid=os.getpid(),
        block_tokens=history.block_tokens,
        first_hash=record.first_name.hex(),
        last_hash=record.last_name.hex(),
        saved_blocks=record.num_saved,
        preemptions=record.num_preempted,
        finished_at=None if record.finished_at is None else record.finished_at + since,
        answers=[_answer(look, record, history, others) for look in record.looks],
        loads=[_loaded(load, since) for load in record.loads],
        notes=[Note(at + since, text) for at, text in record.notes],
    )


# -- private ---------------------------------------------------------------------------------------------------


def _state_of(record: Record) -> str:
    if record.finished_at is not None:
        return "finished"
    if record.loads and record.loads[-1].seconds is None:
        return "loading"
    return "running" if record.num_saved or record.loads else "asked"


def _loaded(load: Load, since: float) -> Loaded:
    return Loaded(
        at=load.at + since,
        first=load.first,
        promised_blocks=load.last - load.first,
        loaded_blocks=load.num_good,
        sources=dict(load.sources),
        seconds=load.seconds,
        losses=list(load.losses),
    )


def _answer(look: Look, record: Record, history: History, others: Sequence[Record]) -> Answer:
    misses = [_first_miss(miss, look, history, _earlier(miss, record, others)) for miss in look.misses]
    verdict = look.verdict
    return Answer(
        at=look.first_at + history.since_epoch_s,
        num_times=look.num_times,
        engine_blocks=look.num_computed,
        usable_blocks=look.most,
        there_blocks=look.num_there,
        promised_blocks=look.num_blocks,
        groups=[
            _runs(index, lying, look.num_computed, history.windows[index]) for index, lying in enumerate(look.lying)
        ],
        misses=misses,
        end=_end(look, record, misses),
        predicted_load_s=None if verdict is None else verdict.load_s,
        predicted_recompute_s=None if verdict is None else verdict.recompute_s,
    )


def _end(look: Look, record: Record, misses: Sequence[FirstMiss]) -> str:
    """Say why nothing more was promised."""
    if look.num_blocks < look.num_there and look.verdict is not None:
        return f"{look.num_there - look.num_blocks} more lie there and are sooner computed: {look.verdict.reason}"
    if look.num_computed >= look.most:
        return "the engine has every block that it can use"
    if look.num_blocks >= look.most:
        left = " (one token is left to compute)" if look.most < record.num_named else ""
        return f"every block that can be used was found{left}"
    told = [f"block {miss.block}: {'; '.join(reason.text for reason in miss.reasons)}" for miss in misses]
    return ". ".join(told) or "no prefix suits every group of layers"


def _runs(index: int, lying: Lying, num_computed: int, window_blocks: int) -> GroupRuns:
    tiers, where = lying
    runs = [Run(0, num_computed, "engine")] if num_computed else []
    starts = [0, *(np.flatnonzero(np.diff(where)) + 1).tolist()] if len(where) else []
    for start, end in list(zip(starts, [*starts[1:], len(where)], strict=False))[:_RUNS]:
        at = int(where[start])
        runs.append(Run(num_computed + start, end - start, tiers[at].value if at >= 0 else "none"))
    return GroupRuns(index, window_blocks, runs, len(starts) + bool(num_computed))


def _first_miss(miss: Miss, look: Look, history: History, earlier: str) -> FirstMiss:
    reasons: list[Reason] = []
    if miss.tier is not None:
        text = f"it lies in the {miss.tier.value} tier, which is left alone: its loads took longer than computing"
        return FirstMiss(miss.group, miss.place, miss.name.hex(), [Reason(miss.tier.value, "too slow", text)])
    if miss.is_saving:
        reasons.append(Reason(Tier.HOST.value, "being saved", "it was on its way into the host tier"))
    reached = [tier for tiers, _ in look.lying[miss.group : miss.group + 1] for tier in tiers]
    is_known = False
    for tier, removal in miss.removals:
        if removal is not None:
            is_known = True
            reasons.append(_gone(tier, removal, look.first_at, history))
        elif look.lying and tier not in reached:
            reasons.append(Reason(tier.value, "unreachable", f"the {tier.value} tier could not be reached"))
    for tier, removal in miss.removals:
        if removal is None and (not look.lying or tier in reached):
            reasons.append(Reason(tier.value, "never seen", _unseen(tier, history.memory(miss.group, tier))))
    reasons += [
        Reason(tier.value, "tier absent", f"there is no {tier.value} tier")
        for tier in _BELOW
        if tier not in history.tiers
    ]
    if earlier and not is_known:
        reasons.append(Reason(Tier.DEVICE.value, "missed before", earlier))
    return FirstMiss(miss.group, miss.place, miss.name.hex(), reasons)


def _unseen(tier: Tier, memory: int | None) -> str:
    if memory is None:
        return f"the {tier.value} tier has not had it since this process began"
    return f"the {tier.value} tier has not had it lately (about {memory:,} blocks that left it are remembered)"


def _gone(tier: Tier, removal: Removal, asked_at: float, history: History) -> Reason:
    before = asked_at - removal.at
    how = " or ".join(_HOW[cause] for cause in removal.causes)
    text = f"it left the {tier.value} tier {before:.3g} s before ({how}"
    if (batch := removal.batch) is not None:
        text += f", one of {batch.num_removed:,} in that step" if batch.num_removed > 1 else ""
        if batch.pressure and "evicted" in removal.causes:
            text += f", for {batch.pressure}; {batch.num_in_use:,} of {removal.total_blocks:,} blocks were in use"
    return Reason(tier.value, " or ".join(removal.causes), f"{text})", before)


def _earlier(miss: Miss, record: Record, others: Sequence[Record]) -> str:
    """Name the last request that looked for the same block before, in vain."""
    for other in reversed(others):
        if other is record or not other.looks or other.at > record.at:
            continue
        if any(known.group == miss.group and known.name == miss.name for known in other.looks[0].misses):
            ended = other.finished_at
            did = "had ended" if ended is not None and ended <= record.at else "was still being computed"
            return (
                f"request {shorten(other.request_id)} looked for it {record.at - other.at:.3g} s before, and {did}; "
                f"{other.num_saved} blocks of that were saved"
            )
    return ""
