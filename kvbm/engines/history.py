"""What happened to recent requests: where they matched, why no further, what was loaded, what it cost.

The scheduler's thread writes, and nothing of it costs more than a request's due: no work per token, arrays are kept as
they come. Others read at any time without a lock: what a record holds is replaced, never changed, but for counters.
Bounded by requests and by bytes; the oldest request goes first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from msgspec.structs import replace

from kvbm.engines.groups import Group
from kvbm.engines.recorded import Load, Look, Lying, Miss, Record, Verdict, shorten
from kvbm.engines.removals import Removals
from kvbm.engines.requests import Part, Request
from kvbm.planner import Advice
from kvbm.types import HashArray, Tier

_LOOKS = 4  # kept of one request: the first and the last ones
_LOADS = 8  # kept of one request
_NOTES = 8
_NOTE = 500  # characters of one
_NBYTES = 16 << 20  # of arrays and ids, all requests together


class History:
    """Records of recent requests; its writers are called by the scheduler's thread, its readers by any.

    Parameters
    ----------
    groups : sequence of Group
    block_tokens : int
    num_requests : int
        Kept at most.
    clock : callable
        Gives seconds; monotonic.
    wall : callable
        Gives seconds since the epoch.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        block_tokens: int,
        num_requests: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.block_tokens = block_tokens
        self.windows = tuple(group.window_blocks for group in groups)
        self.tiers = tuple(dict.fromkeys(pool.tier for group in groups for pool in group.planner.pools))
        self.clock = clock
        self.since_epoch_s = wall() - clock()  # what turns moments of the clock into dates
        self._groups = tuple(groups)
        self._num_requests = num_requests
        self._removals = [[Removals(pool, group.planner) for pool in group.planner.pools] for group in groups]
        self._records: deque[Record] = deque()  # oldest first
        self._by_id: dict[str, Record] = {}  # the youngest of each id
        self._nbytes = 0
        self._needs: dict[str, int] = {}  # by request, blocks of the top tier that it needed in this step

    # -- what the scheduler's half tells -----------------------------------------------------------------------

    def asked(
        self,
        request_id: str,
        names: HashArray,
        *,
        num_computed: int,
        most: int,
        lying: Sequence[Lying] = (),
        closed: Sequence[Tier] = (),
        num_there: int,
        num_blocks: int,
        advice: Advice | None = None,
    ) -> None:
        """Note what was found of a request, and what was promised.

        Parameters
        ----------
        request_id : str
        names : (num_blocks, 2) uint64
            Of all full blocks of the request.
        num_computed, most : int
            Blocks that the engine has, and at most can use.
        lying : sequence of (tiers, (most - num_computed,) int8)
            For each group where the blocks lie, -1 where in none; kept, not to be changed later.
        closed : sequence of Tier
            That were left out.
        num_there, num_blocks : int
            Leading blocks that could be loaded, and that were promised, the computed ones included.
        advice : Advice, optional
            That the promise follows.
        """
        now = self.clock()
        record = self._by_id.get(request_id)
        if record is None or record.finished_at is not None:
            record = self._begin(request_id, now)
        if len(names):
            record.num_named = len(names)
            record.first_name, record.last_name = names[0].tobytes(), names[-1].tobytes()
        misses: tuple[Miss, ...] = ()
        if num_there < most:
            self._note_removals(now)
            misses = self._misses(names, num_computed, num_there, lying, closed)
        verdict = None
        if advice is not None:
            verdict = Verdict(
                advice.num_blocks, advice.load_s, advice.recompute_s, advice.queue_s, advice.reason
            )  # without its runs, which may be as many as blocks
        look = Look(
            first_at=now,
            at=now,
            num_times=1,
            num_computed=num_computed,
            most=most,
            num_there=num_there,
            num_blocks=num_blocks,
            lying=tuple(lying),
            closed=tuple(closed),
            verdict=verdict,
            misses=misses,
        )
        self._keep(record, look)

    def allocated(self, request_id: str, *, first: int, last: int) -> None:
        """Note that a load begins: of blocks `first` to `last`, the latter not included."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.loads = (*record.loads[1 - _LOADS :], Load(self.clock(), first, last))
            self._needs[request_id] = self._needs.get(request_id, 0) + last - first

    def staged(self, request_id: str, tiers: Mapping[str, int]) -> None:
        """Note where the blocks of one group lay when its load began: blocks by tier."""
        record = self._by_id.get(request_id)
        if record is not None and record.loads:
            load = record.loads[-1]
            load.sources = {
                tier: load.sources.get(tier, 0) + tiers.get(tier, 0) for tier in dict.fromkeys([*load.sources, *tiers])
            }

    def noted(self, request_id: str, what: str) -> None:
        """Note what else went wrong, in words."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.notes = (*record.notes[1 - _NOTES :], (self.clock(), what[:_NOTE]))

    def received(self, request: Request) -> None:
        """Note that the workers have reported a load."""
        record = self._by_id.get(request.request_id)
        if record is None or not record.loads:
            return
        load, now = record.loads[-1], self.clock()
        since = record.looks[-1].first_at if record.looks else load.at  # it was there then
        num_good, losses = load.last, []
        for part in request.parts:
            place, loss = self._loss_of(part, request, load, since)
            if loss:
                num_good = min(num_good, place)
                losses.append(loss)
        load.num_good, load.losses = num_good - load.first, tuple(losses)
        load.seconds = now - load.at

    def saved(self, request_id: str, num_blocks: int) -> None:
        """Note that blocks are being saved."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.num_saved += num_blocks
            self._needs[request_id] = self._needs.get(request_id, 0) + num_blocks

    def preempted(self, request_id: str) -> None:
        """Note that the engine took a request's blocks away."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.num_preempted += 1

    def finished(self, request_id: str) -> None:
        """Note that a request has ended."""
        record = self._by_id.get(request_id)
        if record is not None and record.finished_at is None:
            record.finished_at = self.clock()

    def step(self, *, is_quiet: bool = False) -> None:
        """Note what has left the tiers; once a step. In a quiet one nothing moved but what was told here."""
        if is_quiet and not self._needs:
            return
        self._note_removals(self.clock())
        self._needs.clear()

    def close(self) -> None:
        """Stop reading the pools' events; may be called twice."""
        for removals in self._removals:
            for one in removals:
                one.close()

    # -- what others read --------------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """Give the requests that are known, oldest first; their fields go on changing."""
        return list(self._records)

    def memory(self, group: int, tier: Tier) -> int | None:
        """About how many of the blocks that left a tier are remembered, the youngest; None: all of them."""
        return next((one.memory for one in self._removals[group] if one.tier is tier), None)

    # -- private -----------------------------------------------------------------------------------------------

    def _begin(self, request_id: str, now: float) -> Record:
        record = Record(request_id, now)
        if len(self._records) >= self._num_requests:
            self._forget_oldest()
        self._records.append(record)
        self._by_id[request_id] = record
        return record

    def _forget_oldest(self) -> None:
        oldest = self._records.popleft()
        self._nbytes -= oldest.nbytes
        if self._by_id.get(oldest.request_id) is oldest:
            del self._by_id[oldest.request_id]

    def _keep(self, record: Record, look: Look) -> None:
        """Put an answer into a record; one that says the same as the last takes its place."""
        looks = record.looks
        if looks:
            last = looks[-1]
            if (last.num_computed, last.most, last.num_there, last.num_blocks) == (
                look.num_computed, look.most, look.num_there, look.num_blocks
            ):  # fmt: skip
                look, looks = replace(look, first_at=last.first_at, num_times=last.num_times + 1), looks[:-1]
            else:  # only the last one is told block by block
                looks = (*looks[:-1][: _LOOKS - 2], replace(last, lying=()))
        record.looks = (*looks, look)
        nbytes = len(record.request_id) + sum([where.nbytes for _, where in look.lying])
        self._nbytes += nbytes - record.nbytes
        record.nbytes = nbytes
        while self._nbytes > _NBYTES and self._records[0] is not record:
            self._forget_oldest()

    def _misses(
        self, names: HashArray, num_computed: int, num_there: int, lying: Sequence[Lying], closed: Sequence[Tier]
    ) -> tuple[Miss, ...]:
        """Tell for each group that is to blame why the prefix that is there ends where it ends."""
        misses = []
        for index, (tiers, where) in enumerate(lying):
            end, window = num_there - num_computed + 1, self.windows[index]
            begin = max(0, end - window) if window else end - 1
            for place, at in enumerate(where[begin:end].tolist(), num_computed + begin):
                if at < 0 or tiers[at] in closed:
                    misses.append(self._miss(index, place, names[place], tiers[at] if at >= 0 else None))
                    break
        return tuple(misses)

    def _miss(self, index: int, place: int, name: HashArray, tier: Tier | None) -> Miss:
        if tier is not None:
            return Miss(index, place, name.tobytes(), tier, (), False)
        removals = tuple([(one.tier, one.find(name)) for one in self._removals[index]])
        is_saving = bool(self._groups[index].foreign.is_saving(name.reshape(1, 2))[0])
        return Miss(index, place, name.tobytes(), None, removals, is_saving)

    def _loss_of(self, part: Part, request: Request, load: Load, since: float) -> tuple[int, str]:
        """Give the first block of a part that did not come, and why; no words where all came."""
        num_wanted = len(part.slots)
        begin = load.last - num_wanted
        if part.has_loaded_all():
            return load.last, ""
        num_good, error = 0, None
        if part.copy is not None and part.copy.done():
            error = part.copy.exception(0)
            is_good = part.copy.result(0) if error is None else np.zeros(0, dtype=np.bool_)
            num_good = int(is_good.argmin()) if not is_good.all() else len(is_good)
        place = begin + num_good
        self._note_removals(self.clock())
        why = "it did not come in time" if num_good >= part.num_staged else "its copy to the engine failed"
        if error is not None:
            why = str(error)[:_NOTE]
        for removals in self._removals[part.group]:
            removal = removals.find(request.digests.names[place])
            if removal is not None and removal.at >= since:
                why = f"it left the {removals.tier.value} tier meanwhile ({' or '.join(removal.causes)})"
                break
        return place, f"group {part.group}: block {place} and those behind it: {why}"

    def _note_removals(self, now: float) -> None:
        for removals in self._removals:
            for level, one in enumerate(removals):
                one.note(now, partial(self._from_above, removals[level - 1].tier) if level else self._from_engine)

    @staticmethod
    def _from_above(tier: Tier) -> str:
        return f"blocks that came down from the {tier.value} tier"

    def _from_engine(self) -> str:
        """Say what needed room in the top tier in this step."""
        if not self._needs:
            return ""
        request_id = max(self._needs, key=self._needs.__getitem__)
        num_blocks, num_others = self._needs[request_id], len(self._needs) - 1
        others = f" and of {num_others} more" if num_others else ""
        return f"{num_blocks} blocks of request {shorten(request_id)}{others}"
