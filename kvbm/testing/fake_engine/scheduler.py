"""The scheduler of a fake engine: it does what vLLM's does around a connector, in the same order.

What it decides for a step is a `Step`; `settle` takes what the workers said of it. Every answer of the connector is
held against the contract; a breach raises AssertionError with the request and what it was.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from kvbm.testing.fake_engine.requests import (
    CachedRequestData,
    ConnectorOutput,
    FakeRequest,
    KVCacheBlocks,
    KVConnectorBlockState,
    NewRequestData,
    Pass,
    SchedulerOutput,
    Status,
    Step,
)
from kvbm.testing.fake_engine.shape import EngineShape
from kvbm.testing.fake_engine.tables import Tables


class Scheduler:
    """Requests, their blocks, and the scheduler's half of a connector.

    Parameters
    ----------
    shape : EngineShape
    connector : object
        The scheduler's half.

    Attributes
    ----------
    requests : dict of str to FakeRequest
        All that hold blocks, or may.
    waiting, running : list of FakeRequest
    lost : dict of FakeRequest to set of int
        Blocks of the load under way that were reported as not loaded.
    received : list of FakeRequest
        Whose load has just been reported; somebody looks at their bytes.
    """

    def __init__(self, shape: EngineShape, connector: Any) -> None:
        self._shape = shape
        self._connector = connector
        self.tables = Tables(shape)
        self.requests: dict[str, FakeRequest] = {}
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.lost: dict[FakeRequest, set[int]] = {}
        self.received: list[FakeRequest] = []
        self._awaited: dict[str, set[str]] = {}  # request -> what is to be reported of it
        self._finished_ids: set[str] = set()
        self._preempted_ids: set[str] = set()
        self._received_ids: set[str] = set()
        self._failed_ids: set[str] = set()

    # -- what users do -----------------------------------------------------------------------------------------

    def add(self, request: FakeRequest) -> None:
        """Take a request in."""
        request.tables = [[] for _ in self._shape.windows]
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self._call("on_new_request", request)

    def finish(self, request: FakeRequest, status: Status) -> None:
        """End a request, wherever it is."""
        is_loading = request.status is Status.WAITING_FOR_REMOTE_KVS and request.request_id not in self._received_ids
        self._received_ids.discard(request.request_id)
        self._failed_ids.discard(request.request_id)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.status = status
        self.tables.leave_window(request, request.num_computed_tokens)
        is_held = self.tell_finished(request, self.tables.cut(request))
        self._finished_ids.add(request.request_id)
        awaited = {"received"} if is_loading else set()
        awaited |= {"sent"} if is_held else set()
        if awaited:
            self._awaited[request.request_id] = awaited
        else:
            self._free(request)

    def tell_finished(self, request: FakeRequest, tables: Sequence[list[int]]) -> bool:
        """Say that a request has ended; return whether the connector holds its blocks."""
        if hasattr(self._connector, "request_finished_all_groups"):
            answer = self._connector.request_finished_all_groups(request, tuple(tables))
        else:
            answer = self._connector.request_finished(request, tables[0])
        is_held, _ = answer
        assert isinstance(is_held, bool), f"{request}: request_finished gave {answer!r}"
        return is_held

    def preempt(self, request: FakeRequest) -> None:
        """Take a running request's blocks away; it begins again."""
        assert request.status is Status.RUNNING, request
        self.running.remove(request)
        self.tables.release(request)
        request.status = Status.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.insert(0, request)
        self._preempted_ids.add(request.request_id)

    # -- a step ------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide what the next step computes, and have the connector add its metadata."""
        step = Step()
        new: list[NewRequestData] = []
        cached = CachedRequestData()
        budget, was_full = self._go_on(step, cached)
        if not was_full:
            budget = self._admit(step, new, cached, budget)
        numbers = {one.request.request_id: len(one.tokens) for one in step.passes}
        output = SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=numbers,
            total_num_scheduled_tokens=sum(numbers.values()),
            preempted_req_ids=self._preempted_ids,
            finished_req_ids=self._finished_ids,
            has_sync_kv_loads=any(one.sync_tokens for one in step.passes),
        )
        before = pickle.dumps(output)
        resolve = {one.request.request_id: tuple(one.tables) for one in step.passes}
        output.kv_connector_block_state = KVConnectorBlockState(set(numbers), resolve.__getitem__)
        metadata = self._connector.build_connector_meta(output)
        output.kv_connector_block_state = None
        assert pickle.dumps(output) == before, "build_connector_meta changed the scheduler's output"
        output.kv_connector_metadata = metadata
        step.output = output
        for one in step.passes:
            one.request.num_computed_tokens += len(one.tokens)
        self._finished_ids, self._preempted_ids = set(), set()
        self.tables.pool.step += 1
        return step

    def _go_on(self, step: Step, cached: CachedRequestData) -> tuple[int, bool]:
        """Schedule running requests; give what is left of the budget, and whether somebody was preempted."""
        budget, was_full = self._shape.budget_tokens, False
        for request in list(self.running):
            num_new = min(request.num_tokens - request.num_computed_tokens, budget)
            if request.status is not Status.RUNNING or num_new <= 0:
                continue
            before = [len(table) for table in request.tables]
            while (fresh := self.tables.allocate(request, num_new)) is None:
                was_full = True
                victim = self.running[-1]
                self.preempt(victim)
                if victim is request:
                    break
            if fresh is None:
                continue
            new_ids = tuple(table[num:] for table, num in zip(request.tables, before, strict=True))
            self._enter(step, request, num_new, fresh)
            self._append(cached, request, new_ids if any(new_ids) else None)
            budget -= num_new
        return budget, was_full

    def _admit(self, step: Step, new: list[NewRequestData], cached: CachedRequestData, budget: int) -> int:
        """Schedule waiting requests, those that hold blocks first; give what is left of the budget."""
        for request in sorted(self.waiting, key=lambda one: not (_is_loading(one) or any(one.tables))):
            if len(self.running) >= self._shape.max_running or not budget:
                break
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                if request.request_id not in self._received_ids:
                    continue
                self._promote(request)
            local: list[list[int]] | None = None
            num_external, is_async = 0, False
            if not request.num_computed_tokens:
                most = (request.num_tokens - 1) // self._shape.block_tokens
                local = self.tables.pool.find(request.block_hashes, most)
                answer = self.ask(request, len(local[0]) * self._shape.block_tokens, self._shape.num_asks)
                if answer is None:
                    continue
                num_external, is_async = answer
            num_local = len(local[0]) * self._shape.block_tokens if local is not None else request.num_computed_tokens
            num_computed = num_local + num_external
            num_new = 0 if is_async else min(request.num_tokens - num_computed, budget)
            reserved = sum(map(self.tables.num_missing, filter(_is_loading, self.waiting))) if is_async else None
            fresh = self.tables.allocate(request, num_new, local, num_computed, reserved=reserved)
            if fresh is None:
                break
            self._tell_allocated(request, num_external)
            if is_async:
                request.status = Status.WAITING_FOR_REMOTE_KVS
                request.num_computed_tokens = num_computed
                self._promise(request, num_local, num_external)
                step.stale += [block for block in fresh if self.tables.pool.was_free_before(block)]
                step.opened += fresh
                continue
            self.waiting.remove(request)
            self.running.append(request)
            request.num_computed_tokens = num_computed
            if request.status is Status.WAITING:
                new.append(_new_data(request))
            else:
                cached.resumed_req_ids.add(request.request_id)
                self._append(cached, request, tuple(list(table) for table in request.tables))
            request.status = Status.RUNNING
            self._enter(step, request, num_new, fresh)
            if num_external:
                self._promise(request, num_local, num_external)
                step.passes[-1].sync_tokens = range(num_local, num_computed)
            budget -= num_new
        return budget

    def _enter(self, step: Step, request: FakeRequest, num_new: int, fresh: list[int]) -> None:
        first = request.num_computed_tokens
        tables = [list(table) for table in request.tables]
        step.passes.append(Pass(request, range(first, first + num_new), tables))
        step.fresh += fresh

    def _append(self, cached: CachedRequestData, request: FakeRequest, new_ids: tuple[list[int], ...] | None) -> None:
        cached.req_ids.append(request.request_id)
        cached.new_block_ids.append(new_ids)
        cached.num_computed_tokens.append(request.num_computed_tokens)
        cached.num_output_tokens.append(request.num_output_tokens)

    # -- the connector -----------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call what a connector may have."""
        method = getattr(self._connector, name, None)
        return None if method is None else method(*arguments)

    def ask(self, request: FakeRequest, num_local: int, num_asks: int) -> tuple[int, bool] | None:
        """Ask how much can be loaded, again and again; None where it is to be asked later."""
        first: tuple[int, bool] | None = None
        for _ in range(num_asks):
            num_tokens, is_async = answer = self._connector.get_num_new_matched_tokens(request, num_local)
            if num_tokens is None:
                return None
            assert num_tokens >= 0, f"{request}: {num_tokens} matched tokens"
            assert num_tokens or not is_async, f"{request}: 0 tokens cannot come later"
            assert num_local + num_tokens < request.num_tokens, f"{request}: no token is left to compute of {answer}"
            assert first in (None, answer), f"{request}: asked again it says {answer}, not {first}"
            first = num_tokens, bool(is_async)
        return first

    def _tell_allocated(self, request: FakeRequest, num_external: int) -> None:
        self._connector.update_state_after_alloc(request, KVCacheBlocks(request.tables), num_external)
        if num_external:
            sources = self._call("get_external_cache_hit_sources", request, num_external)
            assert sources is None or sum(sources.values()) == num_external, f"{request}: {sources} of {num_external}"

    def _promise(self, request: FakeRequest, num_local: int, num_external: int) -> None:
        request.promised = num_local, num_local + num_external
        request.num_external_computed_tokens = num_external
        self.lost[request] = set()

    def _promote(self, request: FakeRequest) -> None:
        """Let a request go on whose load was reported."""
        if request.request_id in self._failed_ids and not request.num_computed_tokens:
            self.tables.release(request)
        else:
            self.tables.cache(request, request.num_computed_tokens)
        self._failed_ids.discard(request.request_id)
        self._received_ids.remove(request.request_id)
        self.lost.pop(request, None)
        request.status = Status.PREEMPTED if request.num_preemptions else Status.WAITING

    # -- what came of it ---------------------------------------------------------------------------------------

    def settle(self, step: Step, output: ConnectorOutput) -> None:
        """Take what the workers said of a step."""
        failed = self._take_failures(step, output)
        for one in step.passes:
            request = one.request
            if request in failed or request.status is not Status.RUNNING:
                continue
            if request.num_computed_tokens == request.num_tokens:
                if request.num_output_tokens < request.max_tokens:
                    request.generate()
                if request.num_output_tokens == request.max_tokens:
                    self.finish(request, Status.FINISHED_STOPPED)
        if self._shape.policy == "fail":
            for request in failed:
                if not request.is_finished():
                    self.finish(request, Status.FINISHED_ERROR)
        self._call("update_connector_output", output)
        for request_id in output.finished_recving or ():
            self._take_received(request_id)
        for request_id in output.finished_sending or ():
            self._end_wait(request_id, "sent")
        self._call("take_events")
        self._call("get_kv_connector_stats")

    def _take_failures(self, step: Step, output: ConnectorOutput) -> list[FakeRequest]:
        """Set requests back to what was loaded of them; give those whose output of this step is void."""
        invalid = set(output.invalid_block_ids)
        assert not invalid or self._shape.num_groups == 1, (
            f"blocks {sorted(invalid)} say nothing where several groups of layers share ids: report failed_recving"
        )
        loading = [one for one in self.requests.values() if one.request_id in self._awaited or _is_loading(one)]
        known = [table for one in loading for table in one.tables]
        known += [table for one in step.passes if one.sync_tokens for table in one.tables]
        unknown = invalid.difference(*known)
        assert not unknown, f"blocks {sorted(unknown)} are reported as not loaded, but no load of them is under way"
        for one in step.passes:
            for table in one.tables if invalid else ():  # it is computed again, or nobody's any more
                bad = [index for index, block in enumerate(table) if block in invalid]
                self.tables.pool.uncache(table[bad[0] :] if bad else ())
        void: list[FakeRequest] = []
        scheduled = {one.request: len(one.tokens) for one in step.passes}
        for request in [*self.waiting, *self.running]:
            if request.request_id in output.failed_recving and _is_loading(request):
                self.lost[request] |= {block for table in request.tables for block in table}
                self._set_back(request, 0, void)
                continue
            if not invalid or not (_is_loading(request) or request.status is Status.RUNNING):
                continue
            (table,) = request.tables
            num_computed = request.num_computed_tokens - scheduled.get(request, 0)
            num_blocks = -(-num_computed // self._shape.block_tokens)
            bad = [index for index, block in enumerate(table[:num_blocks]) if block in invalid]
            self.lost.setdefault(request, set()).update(invalid & set(table))
            if bad:
                self._set_back(request, bad[0] * self._shape.block_tokens, void)
        return void

    def _set_back(self, request: FakeRequest, num_tokens: int, void: list[FakeRequest]) -> None:
        request.num_computed_tokens = num_tokens
        if request.status is Status.RUNNING or self._shape.policy == "fail":
            void.append(request)
        else:
            self._failed_ids.add(request.request_id)

    def _take_received(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        assert request is not None, f"{request_id!r} is reported as received, but there is no such request"
        if request.is_finished():
            self._end_wait(request_id, "received")
            return
        assert _is_loading(request), f"{request} is reported as received, but it does not wait"
        assert request_id not in self._received_ids, f"{request} is reported as received twice"
        self._received_ids.add(request_id)
        self.received.append(request)

    def _end_wait(self, request_id: str, what: str) -> None:
        awaited = self._awaited.get(request_id, set())
        assert awaited == {what}, f"{request_id!r} is reported as {what}, the engine waits for {sorted(awaited)}"
        self._free(self.requests[request_id])
        del self._awaited[request_id]

    def _free(self, request: FakeRequest) -> None:
        self.tables.release(request)
        self.lost.pop(request, None)
        del self.requests[request.request_id]

    @property
    def has_requests(self) -> bool:
        """Whether the engine goes on stepping."""
        return bool(self.requests or self._finished_ids or self._call("has_pending_push_work"))


def _is_loading(request: FakeRequest) -> bool:
    return request.status is Status.WAITING_FOR_REMOTE_KVS


def _new_data(request: FakeRequest) -> NewRequestData:
    tables = tuple(list(table) for table in request.tables)
    return NewRequestData(request.request_id, list(request.prompt_token_ids), tables, request.num_computed_tokens)
