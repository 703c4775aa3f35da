"""An engine without a model: it drives a connector through vLLM's interface, and knows what every byte must be."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvbm.testing.fake_engine.requests import FakeRequest, Status, Step
from kvbm.testing.fake_engine.scheduler import Scheduler
from kvbm.testing.fake_engine.shape import EngineShape, make_cache_config, make_vllm_config
from kvbm.testing.fake_engine.workers import Workers

_SHORT_S = 0.001  # between steps in which nothing happened
_MOST_IDLE_STEPS = 200
_numbers = itertools.count()  # of this process's engines


class MakeConnector(Protocol):
    """Makes one half of a connector."""

    def __call__(self, vllm_config: Any, role: str, kv_cache_config: Any) -> Any:
        """Make the half for a role, "SCHEDULER" or "WORKER"; ``vllm_config.parallel_config.rank`` is the rank."""


class FakeEngine:
    """One engine with one connector: a scheduler's half, and a half for each worker.

    Parameters
    ----------
    make_connector : callable
        See `MakeConnector`.
    shape : EngineShape, optional
    extra : mapping, optional
        ``kv_connector_extra_config``.

    Attributes
    ----------
    scheduler_half, worker_halves : object, list of object
        What `make_connector` gave.
    num_loaded : int
        Tokens that connectors brought.
    num_computed : int
        Tokens that were computed, those again that were lost included.

    Notes
    -----
    One thread. Every method raises AssertionError where the connector breaks the contract; the engine is of no use then
    but for `close`.

    Examples
    --------
    A connector that knows nothing, on an engine that computes everything:

    >>> class Nothing:
    ...     def __init__(self, vllm_config, role, kv_cache_config):
    ...         self._metadata = None
    ...     def register_kv_caches(self, kv_caches): pass
    ...     def bind_connector_metadata(self, metadata): self._metadata = metadata
    ...     def clear_connector_metadata(self): self._metadata = None
    ...     def has_connector_metadata(self): return self._metadata is not None
    ...     def start_load_kv(self, forward_context, **kwargs): pass
    ...     def wait_for_layer_load(self, layer_name): pass
    ...     def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): pass
    ...     def wait_for_save(self): pass
    ...     def get_finished(self, finished_req_ids): return None, None
    ...     def get_num_new_matched_tokens(self, request, num_computed_tokens): return 0, False
    ...     def update_state_after_alloc(self, request, blocks, num_external_tokens): pass
    ...     def build_connector_meta(self, scheduler_output): return "nothing"
    ...     def request_finished(self, request, block_ids): return False, None
    >>> engine = FakeEngine(Nothing)
    >>> _ = engine.add("a", [1, 2, 3, 4, 5])
    >>> engine.run()
    >>> engine.num_computed, engine.num_loaded
    (5, 0)
    """

    def __init__(self, make_connector: MakeConnector, shape: EngineShape | None = None, *, extra: Any = None) -> None:
        self.shape = shape or EngineShape()
        cache = make_cache_config(self.shape)
        ranks = range(self.shape.num_ranks)
        engine_id = f"fake-{os.getpid()}-{next(_numbers)}"
        self.worker_halves: list[Any] = []  # vLLM makes them first
        self.scheduler_half: Any = None
        self.num_loaded = 0
        self.num_computed = 0
        for rank in ranks:
            config = make_vllm_config(self.shape, rank=rank, extra=extra, engine_id=engine_id)
            self.worker_halves.append(make_connector(config, "WORKER", cache))
        self.workers = Workers(self.shape, self.worker_halves)
        self.workers.register()
        self.scheduler_half = make_connector(
            make_vllm_config(self.shape, extra=extra, engine_id=engine_id), "SCHEDULER", cache
        )
        self.scheduler = Scheduler(self.shape, self.scheduler_half)
        self._shake_hands()

    def _shake_hands(self) -> None:
        found = [getattr(half, "get_handshake_metadata", lambda: None)() for half in self.worker_halves]
        told = {(0, rank): one for rank, one in enumerate(found) if one is not None}
        aware = getattr(self.scheduler_half, "set_xfer_handshake_metadata_pp_aware", None)
        if told and aware is not None:
            aware(told)
        elif told:
            self.scheduler_half.set_xfer_handshake_metadata({rank: one for (_, rank), one in told.items()})

    # -- what users do -----------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[FakeRequest]:
        """Requests that have not ended, those that came first in front."""
        return [one for one in self.scheduler.requests.values() if not one.is_finished()]

    def is_known(self, request_id: str) -> bool:
        """Tell whether there is a request of this name, one that has ended and holds its blocks included."""
        return request_id in self.scheduler.requests

    def add(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int = 1, salt: str | None = None
    ) -> FakeRequest:
        """Take a request in.

        Raises
        ------
        ValueError
            Its name is in use, it has no token, or the memory has no room for it.
        """
        if self.is_known(request_id) or not prompt or len(prompt) + max_tokens > self.shape.most_tokens:
            raise ValueError(
                f"request {request_id!r} has {len(prompt)} + {max_tokens} tokens: take 1 to {self.shape.most_tokens} "
                "and a name that is not in use"
            )
        size = self.shape.block_tokens
        request = FakeRequest(request_id, prompt, max_tokens=max_tokens, salt=salt, block_tokens=size)
        self.scheduler.add(request)
        return request

    def ask(self, request: FakeRequest, num_asks: int = 100) -> int | None:
        """Ask the connector for a waiting request's matched tokens, again and again, and do nothing about it.

        Returns
        -------
        int or None
            What it says each time; None where it is to be asked later.
        """
        most = (request.num_tokens - 1) // self.shape.block_tokens
        (table, *_) = self.scheduler.tables.pool.find(request.block_hashes, most)
        answer = self.scheduler.ask(request, len(table) * self.shape.block_tokens, num_asks)
        return None if answer is None else answer[0]

    def abort(self, request: FakeRequest) -> None:
        """End a request, wherever it is."""
        self.scheduler.finish(request, Status.FINISHED_ABORTED)

    def finish_unknown(self, request_id: str) -> None:
        """End a request that the connector has never heard of."""
        size = self.shape.block_tokens
        request = FakeRequest(request_id, [1], max_tokens=1, salt=None, block_tokens=size)
        request.status = Status.FINISHED_ABORTED
        is_held = self.scheduler.tell_finished(request, [[] for _ in self.shape.windows])
        assert not is_held, f"the connector holds blocks of {request_id!r}, which has none"

    def preempt(self, request: FakeRequest) -> None:
        """Take a running request's blocks away, now; it may be scheduled again in the next step."""
        self.scheduler.preempt(request)

    def forget_prefixes(self) -> bool:
        """Forget what the engine's own memory holds; return whether nothing was in use."""
        return self.scheduler.tables.pool.reset()

    def reset(self) -> bool:
        """Change the weights: preempt what runs, forget all, have the connector forget all.

        Returns
        -------
        bool
            Whether both have; then the same tokens give other bytes from now on.
        """
        for request in reversed(self.scheduler.running):
            self.scheduler.preempt(request)
        is_empty = self.forget_prefixes()
        is_reset = getattr(self.scheduler_half, "reset_cache", lambda: None)()
        assert is_reset in (None, True, False), f"reset_cache gave {is_reset!r}"
        if is_empty and is_reset:
            for memory in self.workers.memories:
                memory.epoch += 1
        return bool(is_empty and is_reset)

    # -- steps -------------------------------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """Whether the engine goes on stepping; a connector that needs steps says so by `has_pending_push_work`."""
        return self.scheduler.has_requests

    def step(
        self, *, begun: Callable[[], None] | None = None, executed: Callable[[], None] | None = None
    ) -> Step | None:
        """Make a step, if there is a reason to.

        Parameters
        ----------
        begun, executed : callable, optional
            Called before the forward pass and behind it: there, users abort requests, and copies go on.

        Returns
        -------
        Step or None
        """
        if not self.has_requests:
            return None
        step = self.scheduler.schedule()
        output = self.workers.execute(step, begun)
        if executed is not None:
            executed()
        self.num_computed += sum(len(one.tokens) for one in step.passes)
        self.scheduler.settle(step, output)
        for request in self.scheduler.received:
            self.workers.take_received(request, self.scheduler.lost[request])
            self.num_loaded += max(0, request.num_computed_tokens - request.promised[0])
        self.scheduler.received.clear()
        self.num_loaded += sum(len(one.sync_tokens) for one in step.passes)
        for request in self.scheduler.running:
            self.workers.check(request, request.num_computed_tokens)
        return step

    def run(self, go_on: Callable[[], object] | None = None, *, timeout_s: float = 30.0) -> None:
        """Step until there is nothing left to do.

        Parameters
        ----------
        go_on : callable, optional
            Called behind each step: copies go on. Without, the engine waits a moment behind a step that did nothing.
        timeout_s : float
            Seconds without progress after which it gives up, but not before 200 steps.

        Raises
        ------
        AssertionError
            The engine does not come to an end.
        """
        last, num_idle, until = None, 0, time.monotonic() + timeout_s
        while (step := self.step()) is not None:
            if go_on is not None:
                go_on()
            state = self.num_computed, len(self.scheduler.requests), len(self.scheduler.waiting)
            if step.passes or state != last:
                last, num_idle, until = state, 0, time.monotonic() + timeout_s
                continue
            if go_on is None:
                time.sleep(_SHORT_S)
            num_idle += 1
            is_over = num_idle > _MOST_IDLE_STEPS and time.monotonic() > until
            assert not is_over, f"the engine does not come to an end: {list(self.scheduler.requests.values())}"

    def check_idle(self) -> None:
        """See that no request is left and every block is free.

        Raises
        ------
        AssertionError
            Something is left.
        """
        assert not self.scheduler.requests, f"requests are left: {list(self.scheduler.requests.values())}"
        num_lost = self.shape.num_blocks - 1 - self.scheduler.tables.pool.num_free
        assert not num_lost, f"{num_lost} blocks are leaked"
        self.workers.look()

    def close(self) -> None:
        """Shut the connector's halves down, the workers' first."""
        for half in (*self.worker_halves, self.scheduler_half):
            getattr(half, "shutdown", lambda: None)()
