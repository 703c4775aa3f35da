"""The scheduler's half of a connector: it knows what lies where, and decides what is loaded and saved in each step.

An engine asks how much of a request is cached (`matched_tokens`: any number of times, free of side effects), says where
it has room (`allocated`), what a step computes (`computed`), and that a request has ended (`finished`). What is to be
done goes to the workers with the orders of the next step; what they did comes back with their reports. No thread, no
waiting: everything happens in calls of the engine's scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvbm.engines.asking import StoreQuestions
from kvbm.engines.choosing import Chooser, note_left
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.history import History
from kvbm.engines.judge import LoadJudge
from kvbm.engines.messages import HoldOrder, StepOrders, StepReport
from kvbm.engines.requests import Answer, Request, RequestState
from kvbm.engines.staging import Stager, ids_of
from kvbm.errors import ConfigError
from kvbm.jobs import encode
from kvbm.jobs.messages import decode_result
from kvbm.planner import PlannerSteps
from kvbm.types import IdArray, Tier

_FORGET_S = 30.0  # that an engine without requests goes on for a reset's sake; a disk may hang
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
        Of a load at most; what has not come by then is computed. Less where computing it is known to take less.
    loads_always : bool
        Load whatever is there, even where computing is sooner: for tests, and for models that are tiny.
    loads_in_step : bool
        Load what lies in the host tier within the step that computes the rest; with one group of layers.
    clock : callable
        Gives seconds; monotonic.

    Attributes
    ----------
    speed : PrefillSpeed
        To be told of the engine's steps.
    guard : TierGuard
    history : History
        What became of recent requests.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        block_tokens: int,
        allow_weak_hashes: bool = False,
        timeout_s: float = 10.0,
        loads_always: bool = False,
        loads_in_step: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not groups or block_tokens < 1:
            raise ConfigError(
                f"need a group of layers and blocks of 1 token or more, got {len(groups)}, {block_tokens}"
            )
        self._groups = tuple(groups)
        self._block_tokens = block_tokens
        self._allow_weak_hashes = allow_weak_hashes
        self._loads_in_step = loads_in_step and len(self._groups) == 1  # of several, lost blocks cannot be named there
        self._clock = clock
        top = self._groups[0].planner.pools[0].tier
        self._judge = LoadJudge(top=top, timeout_s=timeout_s, loads_always=loads_always, clock=clock)
        self.speed, self.guard = self._judge.speed, self._judge.guard
        self.history = History(self._groups, block_tokens=block_tokens, clock=clock)
        self._chooser = Chooser(
            self._groups,
            block_tokens=block_tokens,
            speed=self.speed,
            guard=self.guard,
            history=self.history,
            loads_always=loads_always,
        )
        self._stager = Stager(
            self._groups,
            block_tokens=block_tokens,
            history=self.history,
            timeout_of=self._judge.timeout_of,
            clock=clock,
        )
        self._pumps = [PlannerSteps(group.planner, clock=clock) for group in self._groups]
        self._questions = StoreQuestions(self._groups, self._pumps, waits_always=loads_always, clock=clock)
        self._has_pumped = False  # since the last step
        self._forgets_until = 0.0
        self._requests: dict[str, Request] = {}
        self._in_step: dict[str, Request] = {}  # whose load is over before the pass
        self._holds: list[HoldOrder] = []
        self._has_fence = False  # in the next orders
        self._needs_fence = False  # in those behind them: an engine frees what a window has left at any step

    # -- what an engine asks -----------------------------------------------------------------------------------

    def matched_tokens(
        self, request_id: str, digests: Sequence[bytes], *, num_tokens: int, num_computed_tokens: int, variant: int = 0
    ) -> tuple[int | None, bool]:
        """Count the tokens behind the computed ones that can be loaded; asked any number of times, changes nothing.

        Parameters
        ----------
        request_id : str
        digests : sequence of bytes
            Of the request's full blocks, in order.
        num_tokens : int
            Of the request; at least one of them is left to compute. 0: nothing may be loaded.
        num_computed_tokens : int
            That the engine has itself; whole blocks, or nothing is loaded.
        variant : int
            See `Digests`; the first call for a request decides.

        Returns
        -------
        num_tokens : int or None
            A multiple of the block's tokens, 0 where nothing is worth loading; None: ask again with the next step, a
            store is being asked.
        is_async : bool
            Whether they come while the engine goes on with others.
        """
        request = self._request(request_id, variant)
        request.take_back(digests)
        if request.has_failed or num_computed_tokens % self._block_tokens or num_tokens < 1:
            return 0, False
        if self._questions.is_waiting(request):
            return None, False
        now, answer = self._clock(), request.answer
        if answer is not None and answer.num_computed_tokens == num_computed_tokens and now < answer.until:
            return answer.num_tokens, answer.num_tokens > 0 and not answer.is_sync
        if len(digests) > num_tokens // self._block_tokens:
            raise ConfigError(
                f"request {request_id!r} has {num_tokens} tokens and {len(digests)} names, need one for each "
                f"{self._block_tokens} tokens"
            )
        names = request.digests.extend(digests)
        num_computed = num_computed_tokens // self._block_tokens
        most = min(len(names), (num_tokens - 1) // self._block_tokens)
        others = (one for one in self._requests.values() if one is not request)
        waits = not self._loads_in_step and any(one.state is RequestState.RUNNING for one in others)
        least_s = self.speed.step_s if waits else 0.0  # others' step ends before anybody hears of a load
        choice = self._chooser.choose(request_id, names, num_computed, most, least_s=least_s)
        computing_s = self.speed.seconds((most - choice.num_there) * self._block_tokens)
        self._questions.ask(request, names[:most], choice.num_there, computing_s=computing_s, step_s=least_s)
        if self._questions.is_waiting(request):
            return None, False
        num_found = (choice.num_blocks - num_computed) * self._block_tokens
        is_sync = self._loads_in_step and choice.is_on_top
        request.answer = Answer(num_computed_tokens, num_found, is_sync, now + _ANSWER_S)
        request.left = choice.left
        return num_found, num_found > 0 and not is_sync

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
        is_sync = request.answer is not None and request.answer.is_sync
        if request.state is RequestState.RUNNING:
            self.preempted(request_id)  # vLLM says so of a request that it takes up again at once only in this step
        request.is_sync, request.answer = is_sync, None
        first = num_computed_tokens // self._block_tokens
        last = first + num_external_tokens // self._block_tokens
        if len(request.digests) < last:
            raise ConfigError(f"request {request_id!r}: {last} blocks were promised, {len(request.digests)} are named")
        self._stager.begin(request, slots, first, last)
        self._judge.begin(request)
        if request.is_sync:
            self._in_step[request_id] = request

    def sources(self, request_id: str, num_tokens: int) -> dict[Tier, int]:
        """Divide the tokens of a request's load by the tier that they lie in; the sum is `num_tokens`."""
        request = self._requests.get(request_id)
        found, left = {}, num_tokens
        for tier, num_there in ({} if request is None else request.sources).items():
            found[tier] = min(num_there, left)
            left -= found[tier]
        if left:  # what was there when the engine asked, and is no more
            found[Tier.HOST] = found.get(Tier.HOST, 0) + left
        return {tier: n for tier, n in found.items() if n}

    def computed(
        self, request_id: str, digests: Sequence[bytes], slots: Sequence[Sequence[int]], *, num_tokens: int
    ) -> int:
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

        Returns
        -------
        int
            Computed tokens from which on it is worth telling again, unless the request is preempted.
        """
        request = self._request(request_id)
        if request.state is RequestState.NEW:
            request.go(RequestState.RUNNING)
        if request.left:
            note_left(request.left)
            request.left = ()
        request.take_back(digests)
        if num_tokens // self._block_tokens <= min(request.num_offered):
            return (min(request.num_offered) + 1) * self._block_tokens
        names = request.digests.extend(digests)
        num_full = min(len(names), num_tokens // self._block_tokens)
        is_unsaved = request.is_stale or request_id in self._in_step  # what is computed from a bad block
        for index, group in enumerate(self._groups):
            first = request.num_offered[index]
            if is_unsaved and not group.window_blocks:
                continue  # a later step offers them
            request.num_offered[index] = max(first, num_full)
            # What a window has left is the engine's to fill anew: not offered later.
            if is_unsaved or first >= num_full:
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
                self.history.saved(request_id, len(places))
                self._needs_fence |= bool(group.window_blocks)
        return (min(request.num_offered) + 1) * self._block_tokens

    def preempted(self, request_id: str) -> None:
        """Note that a request's blocks are given to others: what is being saved of them ends first."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self.history.preempted(request_id)
        self._has_fence |= bool(request.open_saves())
        request.is_stale = False  # all of it is computed again, or loaded, in other slots
        request.num_offered = [0] * len(self._groups)
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
        self.history.finished(request_id)
        if request.state in (RequestState.STAGING, RequestState.LOADING):
            return False  # the engine waits until the workers report it as received
        saves = request.open_saves()
        if not saves:
            self._forget(request)
            return False
        request.go(RequestState.HELD)
        self._holds.append(HoldOrder(request_id=request_id, job_ids=ids_of(saves)))
        return True

    def reset(self) -> bool:
        """Forget every block of every tier, whoever computed it; return whether that was done.

        It is not while requests load blocks. Those that run go on, and what they compute is not saved. Tiers that
        outlive the process are told with the next steps, see `has_work`.
        """
        planners = [group.planner for group in self._groups]
        if self._stager.has_work or self._in_step or not all(planner.forgetter.can_forget() for planner in planners):
            return False
        for planner in planners:
            planner.forgetter.forget_all()
        self.history.step()
        self._forgets_until = self._clock() + _FORGET_S
        for request in self._requests.values():
            request.answer = None
            request.is_stale = request.state in (RequestState.LOADING, RequestState.RUNNING)
        return True

    @property
    def is_forgetting(self) -> bool:
        """Whether tiers that outlive the process have yet to be told of a reset, or to answer."""
        return any(group.planner.forgetter.is_forgetting for group in self._groups)

    # -- steps -------------------------------------------------------------------------------------------------

    def orders(self) -> StepOrders:
        """Give what the workers are to do in the next step."""
        have_pumped = [pump.step() for pump in self._pumps]
        self.history.step(is_quiet=not (any(have_pumped) or self._has_pumped))
        self._has_pumped = False
        self._judge.begin_step()
        self._stager.step()
        orders = StepOrders(
            jobs=[[encode(job) for job in group.channels.take_jobs()] for group in self._groups],
            loads=self._stager.take_orders(),
            holds=self._holds,
            has_fence=self._has_fence,
        )
        self._holds = []
        self._has_fence, self._needs_fence = self._needs_fence, False
        return orders

    def reported(self, report: StepReport) -> None:
        """Take a worker's report."""
        for group, pump, results in zip(self._groups, self._pumps, report.results, strict=True):
            if results:
                group.channels.receive(report.rank, [decode_result(result) for result in results])
                # What has come goes down: while that has not been sent, steps are needed.
                self._has_pumped |= pump.step()

    def received(self, request_ids: Iterable[str]) -> None:
        """Note that a step is over, and that every worker has reported these requests as received."""
        self._judge.end_step()
        if self._in_step:
            self._end_loads([name for name, request in self._in_step.items() if request.has_ended_load()])
        self._end_loads(request_ids)

    def _end_loads(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self._requests.get(request_id)
            self._in_step.pop(request_id, None)
            if request is not None and request.state is RequestState.LOADING:
                self.history.received(request)
                request.has_failed = not request.has_loaded_all()
                request.go(RequestState.RUNNING)
                self._judge.end(request)
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
        is_forgetting = self.is_forgetting and self._clock() < self._forgets_until
        return bool(has_jobs or is_forgetting or self._holds or self._stager.has_work)

    @property
    def num_requests(self) -> int:
        """Requests that are followed."""
        return len(self._requests)

    # -- private -----------------------------------------------------------------------------------------------

    def _request(self, request_id: str, variant: int = 0) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            digests = Digests(allow_weak=self._allow_weak_hashes, variant=variant)
            request = self._requests[request_id] = Request(request_id, digests, [0] * len(self._groups))
        return request

    def _forget(self, request: Request) -> None:
        request.go(RequestState.GONE)
        del self._requests[request.request_id]
