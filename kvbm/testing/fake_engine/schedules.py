"""Schedules for a connector: lists of things that users, engines and copies do, in any order, with every byte checked.

A schedule is a list of (operation, number). Whatever it does: no request reads a wrong byte, no call of vLLM's contract
is answered wrongly, and in the end nobody holds a block and nothing waits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from kvbm.testing.fake_engine.engine import FakeEngine
from kvbm.testing.fake_engine.requests import FakeRequest, Status
from kvbm.testing.fake_engine.shape import EngineShape

OPERATIONS = (
    "add", "add", "add", "add_salted", "step", "step", "steps", "steps", "steps", "serve", "serve",
    "go_on", "go_on", "step_with_copies", "abort", "abort_in_flight", "ghost", "finish_unknown", "ask",
    "preempt", "preempt_all", "forget", "forget", "reset", "fail", "spoil", "evict", "pass_time",
)  # fmt: skip
"""What a schedule is made of; those that do more for a connector's author come more than once."""

Schedule = Sequence[tuple[str, int]]

_FAMILIES = 6
_MOST_REQUESTS = 6
_SHORT_S = 0.001


class ConnectorSchedules:
    """Runs schedules on a connector; subclass it and override `make_connector`, and what else your connector can.

    Parameters
    ----------
    shape : EngineShape, optional
    extra : mapping, optional
        ``kv_connector_extra_config``.

    Attributes
    ----------
    engine : FakeEngine
    timeout_s : float
        Seconds without progress that are taken for no end; 0 where copies wait for `go_on`.

    Notes
    -----
    A connector whose copies run on threads passes or fails as its threads go. Let its copies wait until `go_on` lets
    one end, and a schedule that fails fails again.

    Examples
    --------
    In a test, for a connector class `MyConnector`::

        class MySchedules(ConnectorSchedules):
            def make_connector(self, vllm_config, role, kv_cache_config):
                return MyConnector(vllm_config, KVConnectorRole[role], kv_cache_config)

        @given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255)), max_size=60))
        def test_no_schedule_gives_a_wrong_byte(schedule):
            MySchedules().run(schedule)
    """

    timeout_s = 30.0

    def __init__(self, shape: EngineShape | None = None, *, extra: Any = None) -> None:
        self.engine = FakeEngine(self.make_connector, shape, extra=extra)
        self._number = 0

    # -- what a subclass says ----------------------------------------------------------------------------------

    def make_connector(self, vllm_config: Any, role: str, kv_cache_config: Any) -> Any:
        """Make one half of the connector; role is "SCHEDULER" or "WORKER"."""
        raise NotImplementedError("a subclass makes its connector here")

    def go_on(self, number: int) -> None:
        """Let one of the copies that wait end; nothing where copies run on threads."""

    def let_all_end(self) -> None:
        """Let all copies that wait end; a connector with threads gets a moment for them."""
        time.sleep(_SHORT_S)

    def fail(self, number: int) -> None:
        """Let one of the copies that wait fail."""

    def spoil(self, number: int) -> None:
        """Change bytes below the engine's memory, in what the connector keeps."""

    def evict(self, number: int) -> None:
        """Make the connector forget some of what it keeps."""

    def pass_time(self, number: int) -> None:
        """Let some seconds pass on the connector's clock."""

    def check(self) -> None:
        """See that the connector's invariants hold; asked behind every operation."""

    def check_idle(self) -> None:
        """See that the connector holds nothing for a request; asked when all have ended."""

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, schedule: Schedule) -> None:
        """Do what a schedule says, let everything end, and look at what is kept; then shut the connector down.

        Raises
        ------
        AssertionError
            A wrong byte, a call that breaks the contract, a leaked block, or no end.
        """
        try:
            for operation, number in schedule:
                getattr(self, f"do_{operation}")(number)
                self.check()
            self.end()
            self.engine.forget_prefixes()
            for family in range(_FAMILIES):  # the longest prompts: all blocks that may be kept
                self.add(family + 4 * _FAMILIES, f"last{family}")
            self.end()
        finally:
            self.engine.close()

    def run_on(self) -> None:
        """Let everything end."""
        self.engine.run(self.let_all_end, timeout_s=self.timeout_s)

    def end(self) -> None:
        """Let everything end, and see that nothing is left."""
        self.run_on()
        self.engine.check_idle()
        self.check()
        self.check_idle()

    def add(self, number: int, request_id: str | None = None, *, salt: str | None = None) -> FakeRequest | None:
        """Take a request in, unless its name is in use or there are many."""
        if request_id is None:
            request_id = f"r{number % _MOST_REQUESTS}"
        if self.engine.is_known(request_id):
            return None
        max_tokens = 1 + number // 7 % 3
        prompt = prompt_of(number, self.engine.shape.block_tokens)[: self.engine.shape.most_tokens - max_tokens]
        return self.engine.add(request_id, prompt, max_tokens=max_tokens, salt=salt)

    # -- users -------------------------------------------------------------------------------------------------

    def do_add(self, number: int) -> None:
        """Take a request in."""
        self.add(number)

    def do_add_salted(self, number: int) -> None:
        """Take a request in that shares blocks with its own tenant only."""
        self.add(number, salt=f"tenant{number % 2}")

    def do_ghost(self, number: int) -> None:
        """Take a request in, ask for it, and end it before it was ever scheduled."""
        request = self.add(number)
        if request is not None:
            self.engine.ask(request, number % 4)
            self.engine.abort(request)

    def do_abort(self, number: int) -> None:
        """End a request, wherever it is."""
        request = _pick(self.engine.requests, number)
        if request is not None:
            self.engine.abort(request)

    def do_abort_in_flight(self, number: int) -> None:
        """End a request when a step has computed it, and before the engine has looked at that."""
        self.engine.step(executed=lambda: self.do_abort(number))

    def do_finish_unknown(self, number: int) -> None:
        """End a request that the connector has never heard of."""
        self.engine.finish_unknown(f"unknown{number}")

    # -- the engine --------------------------------------------------------------------------------------------

    def do_step(self, number: int) -> None:
        """Make a step."""
        self.engine.step()

    def do_steps(self, number: int) -> None:
        """Make some steps, and let no copy end."""
        for _ in range(1 + number % 4):
            self.engine.step()

    def do_step_with_copies(self, number: int) -> None:
        """Make a step; copies end before its forward pass, and behind it."""
        self.engine.step(begun=lambda: self.go_on(number), executed=lambda: self.go_on(number // 3))

    def do_serve(self, number: int) -> None:
        """Let everything end, forget the engine's own prefixes, and take a request in."""
        self.run_on()
        self.engine.forget_prefixes()
        self.add(number)

    def do_ask(self, number: int) -> None:
        """Ask a hundred times for a request that waits."""
        waiting = [one for one in self.engine.requests if not one.num_computed_tokens and _waits(one)]
        request = _pick(waiting, number)
        if request is not None:
            self.engine.ask(request, 100)

    def do_preempt(self, number: int) -> None:
        """Take a running request's blocks away."""
        request = _pick(self.engine.scheduler.running, number)
        if request is not None:
            self.engine.preempt(request)

    def do_preempt_all(self, number: int) -> None:
        """Take the blocks of all running requests away, those that came last first."""
        for request in reversed(self.engine.scheduler.running):
            self.engine.preempt(request)

    def do_forget(self, number: int) -> None:
        """Forget what the engine's own memory holds."""
        self.engine.forget_prefixes()

    def do_reset(self, number: int) -> None:
        """Change the weights, seldom."""
        if number % 2:
            self.engine.reset()

    # -- the connector's copies ----------------------------------------------------------------------------------

    def do_go_on(self, number: int) -> None:
        """Let a copy end."""
        self.go_on(number)

    def do_fail(self, number: int) -> None:
        """Let a copy fail."""
        self.fail(number)

    def do_spoil(self, number: int) -> None:
        """Change what is kept."""
        self.spoil(number)

    def do_evict(self, number: int) -> None:
        """Forget some of what is kept."""
        self.evict(number)

    def do_pass_time(self, number: int) -> None:
        """Let time pass."""
        self.pass_time(number)


def prompt_of(number: int, block_tokens: int) -> list[int]:
    """Give one of many prompts: all begin alike, pairs go on alike, and they end within a block or at its end.

    Parameters
    ----------
    number : int
        Which: its remainder by 6 is the family, what is above it the length.
    block_tokens : int
        Tokens of a block.
    """
    family = number % _FAMILIES
    num_blocks, num_more = 1 + number // _FAMILIES % 5, number % 3
    names = [0, 1 + family // 2, *(10 + family for _ in range(2, num_blocks + 1))]
    tokens = [100 * name + place % block_tokens for place, name in _places(names, block_tokens)]
    return tokens[: num_blocks * block_tokens + num_more]


def random_schedule(seed: int, num_operations: int = 60) -> Schedule:
    """Give a schedule, the same for the same seed."""
    rng = random.Random(seed)
    return [(rng.choice(OPERATIONS), rng.randrange(256)) for _ in range(num_operations)]


def _places(names: Sequence[int], block_tokens: int) -> list[tuple[int, int]]:
    return [(index, name) for index, name in enumerate(name for name in names for _ in range(block_tokens))]


def _waits(request: FakeRequest) -> bool:
    return request.status in (Status.WAITING, Status.PREEMPTED)


def _pick(requests: Sequence[FakeRequest], number: int) -> FakeRequest | None:
    return requests[number % len(requests)] if requests else None
