"""Bringing what was promised to an engine: from whatever tier to the host tier, and from there into its slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvbm.blocks import ImmutableBlocks
from kvbm.engines.groups import Group
from kvbm.engines.history import History
from kvbm.engines.messages import LoadOrder
from kvbm.engines.requests import Part, Request, RequestState
from kvbm.errors import NotEnoughBlocksAvailable
from kvbm.jobs import Transfer
from kvbm.planner import EngineCopy, Hit
from kvbm.types import HashArray, IdArray, Tier

_log = logging.getLogger("kvbm.engines")


class Stager:
    """Begins loads and takes them on as their blocks come; every load ends in one order for the workers.

    Parameters
    ----------
    groups : sequence of Group
    block_tokens : int
        Tokens of a block.
    history : History
    timeout_of : callable
        Gives seconds for a load of so many tokens; what has not come by then is computed.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        block_tokens: int,
        history: History,
        timeout_of: Callable[[int], float],
        clock: Callable[[], float],
    ) -> None:
        self._groups = tuple(groups)
        self._block_tokens = block_tokens
        self._history = history
        self._timeout_of = timeout_of
        self._clock = clock
        self._open: dict[str, Request] = {}
        self._orders: list[LoadOrder] = []

    def begin(self, request: Request, slots: Sequence[Sequence[int]], first: int, last: int) -> None:
        """Begin to load blocks `first` to `last` of a request into an engine's slots; see `SchedulerCore.allocated`."""
        request.go(RequestState.STAGING)
        names = request.digests.names
        request.parts, request.sources, request.lowest = [], {}, None
        request.num_loading = (last - first) * self._block_tokens
        request.timeout_s = self._timeout_of(request.num_loading)
        self._history.allocated(request.request_id, first=first, last=last)
        for index, group in enumerate(self._groups):
            begin = group.first_needed(first, last)
            mine: IdArray = np.asarray(slots[index][begin:last], dtype=np.int32)
            (nulls,) = (mine == group.null_slot).nonzero()
            if len(nulls):  # the group needs nothing before them
                begin, mine = begin + int(nulls[-1]) + 1, mine[int(nulls[-1]) + 1 :]
            part = Part(index, mine)
            request.parts.append(part)
            part.staged = self._stage(request, group, names[begin:last])
        request.began_at = self._clock()
        self._open[request.request_id] = request
        for part in request.parts:
            if request.is_sync and part.staged is not None and not part.staged.done() and part.staged.cancel():
                part.staged = None  # it does not come within this step
        self._go_on(request)

    def step(self) -> None:
        """Take every load on as far as its blocks have come, and look at the deadlines."""
        for request in list(self._open.values()):
            self._go_on(request)

    def take_orders(self) -> list[LoadOrder]:
        """Give the orders that are ready since the last call."""
        orders, self._orders = self._orders, []
        return orders

    @property
    def has_work(self) -> bool:
        """Whether a load waits for its blocks or for the next orders."""
        return bool(self._open or self._orders)

    # -- private -----------------------------------------------------------------------------------------------

    def _stage(self, request: Request, group: Group, names: HashArray) -> Transfer[ImmutableBlocks]:
        """Bring what still is there of a prefix to the host tier."""
        hit = group.planner.match(names, asks=False)  # that was done when the engine asked
        self._history.staged(request.request_id, hit.tiers)
        if request.is_sync:  # nobody waits in a step
            hit.truncate(self._num_on_top(group, hit))
        found = [pool.tier for pool in group.planner.pools if pool.tier.value in hit.tiers]
        known = [tier for tier in (*found, request.lowest) if tier is not None]
        request.lowest = max(known, key=list(Tier).index, default=None)  # of all groups
        if len(hit) * self._block_tokens > sum(request.sources.values()):  # of the group that needs most
            request.sources = {tier: hit.tiers[tier.value] * self._block_tokens for tier in found}
        try:
            return group.planner.onboard(hit, request.timeout_s)
        except NotEnoughBlocksAvailable:  # the host tier is in use: what lies there already can be had
            self._history.noted(
                request.request_id, "the host tier had no room for blocks from below: all of it was in use"
            )
            hit.truncate(self._num_on_top(group, hit))
            return group.planner.onboard(hit, request.timeout_s)

    def _num_on_top(self, group: Group, hit: Hit) -> int:
        """Count the leading blocks of a hit that lie in the top tier."""
        tiers, where = hit.tier_of_blocks()
        is_below = np.array([tier is not group.planner.pools[0].tier for tier in tiers] or [False])[where]
        return int(is_below.argmax()) if is_below.any() else len(hit)

    def _go_on(self, request: Request) -> None:
        """Take what has been staged on to the engine; order the load when all of it has been."""
        for part in request.parts:
            if part.staged is not None and part.staged.done():
                staged, part.staged = part.staged, None
                self._take_on(request, part, staged)
        if any(part.staged is not None for part in request.parts):
            return
        del self._open[request.request_id]
        copies = [(part.group, part.copy) for part in request.parts if part.copy is not None]
        lost = [slot for part in request.parts for slot in part.slots[part.num_staged :].tolist()]
        lost = [] if request.is_ended else lost  # nobody reads them
        request.go(RequestState.LOADING)
        self._orders.append(
            LoadOrder(request_id=request.request_id, job_ids=ids_of(copies), lost_slots=lost, is_sync=request.is_sync)
        )
        if lost:
            _log.info("load shortened request_id=%s num_lost=%d", request.request_id, len(lost))

    def _take_on(self, request: Request, part: Part, staged: Transfer[ImmutableBlocks]) -> None:
        error = staged.exception(0)
        if error is not None:
            self._history.noted(request.request_id, f"a load failed: {error}")
            _log.warning("load failed request_id=%s error=%r", request.request_id, error)
            return
        blocks = staged.result(0)
        if request.is_ended or not len(blocks):
            blocks.release()
            return
        part.num_staged = len(blocks)
        foreign = self._groups[part.group].foreign
        part.copy = foreign.load(blocks, part.slots[: len(blocks)], timeout_s=request.timeout_s)


def ids_of(copies: Iterable[tuple[int, EngineCopy]]) -> list[tuple[int, int]]:
    """Give group and number of every job of these copies."""
    return [(group, job_id) for group, copy in copies for job_id in copy.job_ids]
