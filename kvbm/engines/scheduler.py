"""The scheduler's half of a connector: it knows what lies where, and decides what is loaded and saved in each step.

An engine asks how much of a request is cached (`matched_tokens`: any number of times, free of side effects), says where
it has room (`allocated`), what a step computes (`computed`), and that a request has ended (`finished`). What is to be
done goes to the workers with the orders of the next step; what they did comes back with their reports. No thread, no
waiting: everything happens in calls of the engine's scheduler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvbm.blocks import ImmutableBlocks
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group, longest_hit
from kvbm.engines.messages import HoldOrder, LoadOrder, StepOrders, StepReport
from kvbm.engines.requests import Part, Request, RequestState
from kvbm.engines.speed import PrefillSpeed, TierGuard
from kvbm.errors import ConfigError, NotEnoughBlocksAvailable
from kvbm.jobs import Transfer, encode
from kvbm.jobs.messages import decode_result
from kvbm.planner import EngineCopy
from kvbm.types import HashArray, IdArray

_log = logging.getLogger("kvbm.engines")
_ANSWER_S = 0.05  # an answer holds so long, unless the engine's own share of the prefix changes


class SchedulerCore:
    """What a connector does in an engine's scheduler.

    Parameters
    ----------
    groups : sequence of Group
        Of layers; one, unless the model is a hybrid. Block i of a request is the same tokens in each.
    block_tokens : int
        Tokens of a block.
    allow_weak_hashes : bool
        See `Digests`.
    timeout_s : float
        Of a load; what has not come by then is computed.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    speed : PrefillSpeed
        To be told of the engine's steps.
    guard : TierGuard
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        block_tokens: int,
        allow_weak_hashes: bool = False,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not groups or block_tokens < 1:
            raise ConfigError(
                f"need a group of layers and blocks of 1 token or more, got {len(groups)}, {block_tokens}"
            )
        self._groups = tuple(groups)
        self._block_tokens = block_tokens
        self._allow_weak_hashes = allow_weak_hashes
        self._timeout_s = timeout_s
        self._clock = clock
        self.speed = PrefillSpeed()
        self.guard = TierGuard(clock)
        self._requests: dict[str, Request] = {}
        self._staging: dict[str, Request] = {}
        self._loads: list[LoadOrder] = []
        self._holds: list[HoldOrder] = []
        self._has_fence = False  # in the next orders
        self._needs_fence = False  # in those behind them: an engine frees what a window has left at any step

    # -- what an engine asks -----------------------------------------------------------------------------------

    def matched_tokens(
        self, request_id: str, digests: Sequence[bytes], *, num_tokens: int, num_computed_tokens: int
    ) -> int:
        """Count the tokens behind the computed ones that can be loaded; asked any number of times, changes nothing.

        Parameters
        ----------
        request_id : str
        digests : sequence of bytes
            Of the request's full blocks, in order.
        num_tokens : int
            Of the request; at least one of them is left to compute.
        num_computed_tokens : int
            That the engine has itself; whole blocks, or nothing is loaded.

        Returns
        -------
        int
            A multiple of the block's tokens, 0 where nothing is worth loading.
        """
        if num_computed_tokens % self._block_tokens or num_tokens < 1:
            return 0
        request = self._request(request_id)
        if request.has_failed:
            return 0
        now, answer = self._clock(), request.answer
        if answer is not None and answer[0] == num_computed_tokens and now < answer[2]:
            return answer[1]
        names = request.digests.extend(digests)
        num_computed = num_computed_tokens // self._block_tokens
        most = min(len(names), (num_tokens - 1) // self._block_tokens)
        length = self._worth_loading(names, num_computed, most) if most > num_computed else num_computed
        num_found = (length - num_computed) * self._block_tokens
        request.answer = num_computed_tokens, num_found, now + _ANSWER_S
        return num_found

    def allocated(
        self, request_id: str, slots: Sequence[Sequence[int]], *, num_computed_tokens: int, num_external_tokens: int
    ) -> None:
        """Begin to load what was promised, into slots that the engine has found; called again with 0 it does nothing.

        Parameters
        ----------
        request_id : str
        slots : sequence of sequence of int
            For each group the slot of every block of the request so far.
        num_computed_tokens, num_external_tokens : int
            That the engine has, and that are to be loaded behind them.
        """
        if not num_external_tokens:
            return
        request = self._request(request_id)
        if request.state is RequestState.RUNNING:
            self.preempted(request_id)  # vLLM says so of a request that it takes up again at once only in this step
        request.go(RequestState.STAGING)
        request.answer = None
        first = num_computed_tokens // self._block_tokens
        last = first + num_external_tokens // self._block_tokens
        names = request.digests.names
        if len(names) < last:
            raise ConfigError(f"request {request_id!r}: {last} blocks were promised, {len(names)} are named")
        request.parts = []
        for index, group in enumerate(self._groups):
            begin = group.first_needed(first, last)
            part = Part(index, np.asarray(slots[index][begin:last], dtype=np.int32))
            request.parts.append(part)
            part.staged = self._stage(request, group, names[begin:last])
        request.began_at, request.num_loading = self._clock(), num_external_tokens
        self._staging[request_id] = request
        self._go_on(request)

    def computed(
        self, request_id: str, digests: Sequence[bytes], slots: Sequence[Sequence[int]], *, num_tokens: int
    ) -> None:
        """Save the blocks that the next step fills.

        Parameters
        ----------
        request_id : str
        digests : sequence of bytes
            Of the request's full blocks, in order, as far as they are known.
        slots : sequence of sequence of int
            For each group the slot of every block of the request so far.
        num_tokens : int
            Of the request that are computed once the step is over.
        """
        request = self._request(request_id)
        if request.state is RequestState.NEW:
            request.go(RequestState.RUNNING)
        names = request.digests.extend(digests)
        num_full = min(len(names), num_tokens // self._block_tokens)
        for index, group in enumerate(self._groups):
            first, request.num_offered[index] = request.num_offered[index], max(request.num_offered[index], num_full)
            if first >= num_full:
                continue
            mine: IdArray = np.asarray(slots[index][first:num_full], dtype=np.int32)
            (places,) = (mine != group.null_slot).nonzero()
            if not len(places):
                continue
            parents = np.zeros((num_full - first, 2), dtype=np.uint64)
            parents[1:] = names[first : num_full - 1]
            if first:
                parents[0] = names[first - 1]
            copy = group.foreign.save(mine[places], names[first:num_full][places], parents[places])
            if copy.job_ids:
                request.saves.append((index, copy))
                self._needs_fence |= bool(group.window_blocks)

    def preempted(self, request_id: str) -> None:
        """Note that a request's blocks are given to others: what is being saved of them ends first."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self._has_fence |= bool(request.open_saves())
        if request.state is RequestState.RUNNING:
            request.go(RequestState.NEW)
            request.answer = None

    def finished(self, request_id: str) -> bool:
        """Note that a request has ended, however; return whether its blocks are still being saved.

        Then they are the engine's to reuse when the workers report it as sent. Unknown requests are nothing new.
        """
        request = self._requests.get(request_id)
        if request is None or request.is_ended:
            return False
        request.is_ended = True
        if request.state in (RequestState.STAGING, RequestState.LOADING):
            return False  # the engine waits until the workers report it as received
        saves = request.open_saves()
        if not saves:
            self._forget(request)
            return False
        request.go(RequestState.HELD)
        self._holds.append(HoldOrder(request_id=request_id, job_ids=_ids_of(saves)))
        return True

    # -- steps -------------------------------------------------------------------------------------------------

    def orders(self) -> StepOrders:
        """Give what the workers are to do in the next step."""
        for group in self._groups:
            group.planner.pump()
        for request in list(self._staging.values()):
            self._go_on(request)  # looks at the deadlines, too
        orders = StepOrders(
            jobs=[[encode(job) for job in group.channels.take_jobs()] for group in self._groups],
            loads=self._loads,
            holds=self._holds,
            has_fence=self._has_fence,
        )
        self._loads, self._holds = [], []
        self._has_fence, self._needs_fence = self._needs_fence, False
        return orders

    def reported(self, report: StepReport) -> None:
        """Take a worker's report."""
        for group, results in zip(self._groups, report.results, strict=True):
            group.channels.receive(report.rank, [decode_result(result) for result in results])

    def received(self, request_ids: Iterable[str]) -> None:
        """Note that every worker has reported these requests as received."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.state is RequestState.LOADING:
                request.has_failed = not request.has_loaded_all()
                request.go(RequestState.RUNNING)
                computing_s = self.speed.seconds(request.num_loading)
                if request.lowest is not None and computing_s is not None:
                    self.guard.observe(request.lowest, self._clock() - request.began_at, computing_s)
                if request.is_ended:
                    self._forget(request)

    def sent(self, request_ids: Iterable[str]) -> None:
        """Note that every worker has reported these requests as sent."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.state is RequestState.HELD:
                self._forget(request)

    @property
    def has_work(self) -> bool:
        """Whether steps are needed although the engine has nothing to compute."""
        has_jobs = any(group.channels.has_jobs for group in self._groups)
        return bool(has_jobs or self._loads or self._holds or self._staging)

    @property
    def num_requests(self) -> int:
        """Requests that are followed."""
        return len(self._requests)

    # -- private -----------------------------------------------------------------------------------------------

    def _worth_loading(self, names: HashArray, num_computed: int, most: int) -> int:
        """Give the longest prefix, in blocks, that is there and sooner loaded than computed."""
        present, lying = [], []
        for group in self._groups:
            tiers, where = group.where(names[num_computed:most])
            closed = [index for index, tier in enumerate(tiers) if not self.guard.is_open(tier)]
            mask = np.zeros(most, dtype=np.bool_)
            mask[num_computed:] = (where >= 0) & ~np.isin(where, closed)
            present.append(mask)
            lying.append((tiers, where))
        length = longest_hit(self._groups, present, num_computed, most)
        tokens_per_s = self.speed.tokens_per_s
        if tokens_per_s is None:
            return length
        for group, (tiers, where) in zip(self._groups, lying, strict=True):
            if length > num_computed and group.block_nbytes and not group.window_blocks:  # windows are short
                advice = group.planner.advisor.plan(
                    tiers,
                    where[: length - num_computed],
                    tokens_per_s,
                    block_tokens=self._block_tokens,
                    block_nbytes=group.block_nbytes,
                )
                length = longest_hit(self._groups, present, num_computed, num_computed + advice.num_blocks)
        return length

    def _request(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            digests = Digests(allow_weak=self._allow_weak_hashes)
            request = self._requests[request_id] = Request(request_id, digests, [0] * len(self._groups))
        return request

    def _forget(self, request: Request) -> None:
        request.go(RequestState.GONE)
        del self._requests[request.request_id]

    def _stage(self, request: Request, group: Group, names: HashArray) -> Transfer[ImmutableBlocks]:
        """Bring what still is there of a prefix to the host tier."""
        hit = group.planner.match(names)
        found = [pool.tier for pool in group.planner.pools if pool.tier.value in hit.tiers]
        request.lowest = found[-1] if found else request.lowest
        try:
            return group.planner.onboard(hit, self._timeout_s)
        except NotEnoughBlocksAvailable:  # the host tier is in use: what lies there already can be had
            tiers, where = hit.tier_of_blocks()
            is_below = np.array([tier is not group.planner.pools[0].tier for tier in tiers] or [False])[where]
            hit.truncate(int(is_below.argmax()) if is_below.any() else len(hit))
            return group.planner.onboard(hit, self._timeout_s)

    def _go_on(self, request: Request) -> None:
        """Take what has been staged on to the engine; order the load when all of it has been."""
        for part in request.parts:
            if part.staged is not None and part.staged.done():
                staged, part.staged = part.staged, None
                self._take_on(request, part, staged)
        if any(part.staged is not None for part in request.parts):
            return
        del self._staging[request.request_id]
        copies = [(part.group, part.copy) for part in request.parts if part.copy is not None]
        lost = [slot for part in request.parts for slot in part.slots[part.num_staged :].tolist()]
        lost = [] if request.is_ended else lost  # nobody reads them
        request.go(RequestState.LOADING)
        self._loads.append(LoadOrder(request_id=request.request_id, job_ids=_ids_of(copies), lost_slots=lost))
        if lost:
            _log.info("load shortened request_id=%s num_lost=%d", request.request_id, len(lost))

    def _take_on(self, request: Request, part: Part, staged: Transfer[ImmutableBlocks]) -> None:
        error = staged.exception(0)
        if error is not None:
            _log.warning("load failed request_id=%s error=%r", request.request_id, error)
            return
        blocks = staged.result(0)
        if request.is_ended or not len(blocks):
            blocks.release()
            return
        part.num_staged = len(blocks)
        foreign = self._groups[part.group].foreign
        part.copy = foreign.load(blocks, part.slots[: len(blocks)], timeout_s=self._timeout_s)


def _ids_of(copies: Iterable[tuple[int, EngineCopy]]) -> list[tuple[int, int]]:
    return [(group, job_id) for group, copy in copies for job_id in copy.job_ids]
