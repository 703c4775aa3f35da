"""A store that others fill is asked for what a request misses, and nobody waits long for its answer."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.step_channel import StepChannels
from kvbm.jobs import InventoryJob, ProbeJob
from kvbm.jobs.messages import Outcome, answer_all, decode_job
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedClock
from kvbm.types import Tier

BLOCK_TOKENS, NUM_BLOCKS = 16, 32


def digests_of(prompt: str, num_blocks: int = NUM_BLOCKS) -> list[bytes]:
    return [hashlib.sha256(f"{prompt} {number}".encode()).digest() for number in range(num_blocks)]


DIGESTS = digests_of("a prompt")
OTHER = digests_of("another")
WAITS = (None, False)
NOTHING = (0, False)
ALL = (NUM_BLOCKS * BLOCK_TOKENS, True)


class Server:
    """A scheduler's half over a host tier and a store of which nothing is known."""

    def __init__(self, backend: Backend, *, num_rows: int = 64) -> None:
        self.clock = SteppedClock()
        self.channels = StepChannels(1, clock=self.clock)
        pools = [BlockPool(num_rows, name=tier.value, tier=tier, backend=backend) for tier in (Tier.HOST, Tier.REMOTE)]
        self.planner = planner = Planner(
            pools,
            self.channels.channels,
            recording_tiers=[Tier.REMOTE],
            keyed_tiers=[Tier.REMOTE],
            foreign_tier=Tier.DEVICE,
            clock=self.clock,
        )
        self.core = SchedulerCore(
            [Group(planner, self.channels, block_nbytes=1 << 10)], block_tokens=BLOCK_TOKENS, clock=self.clock
        )
        self.core.speed.tokens_per_s = 100.0  # 5.12 s for all of it: 0.15 s are worth waiting for an answer

    def ask(self, request_id: str, digests: list[bytes] = DIGESTS) -> tuple[int | None, bool]:
        num_tokens = len(digests) * BLOCK_TOKENS + 1
        return self.core.matched_tokens(request_id, digests, num_tokens=num_tokens, num_computed_tokens=0)

    def questions(self) -> list[ProbeJob]:
        """Give the questions that go out with the next step."""
        jobs = [decode_job(data) for data in self.core.orders().jobs[0]]
        return [job for job in jobs if isinstance(job, ProbeJob)]

    def answer(self, jobs: list[ProbeJob], outcome: Outcome, *, is_away: bool = False) -> None:
        for job in jobs:
            self.channels.receive(0, [replace(answer_all(job, outcome, "away" if is_away else ""), is_away=is_away)])


@pytest.fixture
def server(backend: Backend) -> Server:
    return Server(backend)


def test_what_another_has_stored_meanwhile_is_found(server: Server) -> None:
    assert server.ask("a") == WAITS
    assert server.ask("a") == WAITS
    (question,) = server.questions()
    assert len(question.hashes) == NUM_BLOCKS
    server.clock.advance(0.1)
    assert server.ask("a") == WAITS
    assert not server.questions(), "once for a request"
    server.answer([question], Outcome.OK)
    assert server.ask("a") == ALL


def test_what_is_not_there_is_not_asked_for_again_so_soon(server: Server) -> None:
    assert server.ask("a") == WAITS
    server.answer(server.questions(), Outcome.FAILED)
    assert server.ask("a") == NOTHING
    assert server.ask("b") == NOTHING
    assert not server.questions()


def test_an_answer_is_waited_for_no_longer_than_it_is_worth_and_known_to_those_behind(server: Server) -> None:
    assert server.ask("a") == WAITS
    questions = server.questions()
    server.clock.advance(0.16)
    assert server.ask("a") == NOTHING
    server.answer(questions, Outcome.OK)
    server.clock.advance(0.1)
    assert server.ask("b") == ALL


def test_a_store_that_cannot_be_reached_is_not_waited_for(server: Server) -> None:
    assert server.ask("a") == WAITS
    server.answer(server.questions(), Outcome.FAILED, is_away=True)
    server.clock.advance(0.16)
    assert server.ask("a") == NOTHING
    assert server.ask("b") == NOTHING


def test_a_request_beside_long_steps_does_not_wait_for_one_but_the_store_is_asked(server: Server) -> None:
    server.core.speed.step_s = 0.2
    server.core.computed("other", [], [[]], num_tokens=1)
    assert server.ask("a") == NOTHING
    (question,) = server.questions()
    server.answer([question], Outcome.OK)
    server.clock.advance(0.1)
    assert server.ask("b") == ALL


def test_no_question_where_everything_is_there_or_nothing_is_named(server: Server) -> None:
    assert server.core.matched_tokens("a", [], num_tokens=5, num_computed_tokens=0) == NOTHING
    assert server.ask("b") == WAITS
    server.answer(server.questions(), Outcome.OK)
    assert server.ask("b") == ALL
    assert server.ask("c") == ALL
    assert not any(isinstance(decode_job(data), InventoryJob | ProbeJob) for data in server.core.orders().jobs[0])


# -- not to be waited for -------------------------------------------------------------------------------------------


def test_what_is_known_to_be_absent_does_not_wait_behind_the_question_of_another(server: Server) -> None:
    assert server.ask("a") == WAITS
    server.answer(server.questions(), Outcome.FAILED)
    assert server.ask("b", OTHER) == WAITS
    assert server.questions()
    assert server.ask("c") == NOTHING


def test_nobody_waits_for_a_store_that_is_away_whatever_is_to_be_asked_when_it_is_back(server: Server) -> None:
    assert server.ask("a") == WAITS
    questions = server.questions()
    assert server.ask("b", OTHER) == WAITS, "behind the open question"
    server.answer(questions, Outcome.FAILED, is_away=True)
    assert server.ask("b", OTHER) == NOTHING
    for name in "cde":
        assert server.ask(name, OTHER) == NOTHING
        assert not server.questions()
    server.clock.advance(5.1)
    (question,) = server.questions()
    assert len(question.hashes) == NUM_BLOCKS, "steps without news ask for it too"
    server.answer([question], Outcome.OK)
    assert server.ask("f", OTHER) == ALL


def test_nobody_waits_behind_a_question_that_hangs(server: Server) -> None:
    assert server.ask("a") == WAITS
    assert server.questions()
    server.clock.advance(0.1)
    assert server.ask("b", OTHER) == WAITS, "it may come"
    server.clock.advance(0.16)
    for name in "cde":
        assert server.ask(name, digests_of(name)) == NOTHING


def test_a_question_that_could_not_be_sent_is_not_taken_for_one_that_hangs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(jobs: object) -> None:
        raise OSError("no room for a job")

    (presence,) = server.planner.presences
    assert server.ask("a") == WAITS
    with monkeypatch.context() as patch:
        patch.setattr(presence, "_submit", refuse)
        with pytest.raises(OSError, match="no room for a job"):
            server.questions()
    server.clock.advance(0.3)
    assert server.ask("b", OTHER) == WAITS


def test_a_request_that_has_no_room_in_the_queue_does_not_wait(server: Server) -> None:
    assert server.ask("a") == WAITS
    assert server.questions()
    answers = [server.ask(f"r{number}", digests_of(str(number))) for number in range(300)]
    assert answers == [WAITS] * 300
    still = [server.ask(f"r{number}", digests_of(str(number))) for number in range(300)]
    assert still == [NOTHING] * 44 + [WAITS] * 256


def test_a_waiting_request_costs_a_look_at_the_clock(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.ask("a") == WAITS

    def choose(*_: object, **__: object) -> None:
        raise AssertionError("where its blocks lie was looked up again")

    with monkeypatch.context() as patch:
        patch.setattr(server.core._chooser, "choose", choose)
        for _ in range(3):
            server.clock.advance(0.01)
            assert server.ask("a") == WAITS
    server.answer(server.questions(), Outcome.OK)
    assert server.ask("a") == ALL


def test_short_prompts_wait_for_their_share_although_no_long_one_has_shown_the_speed(server: Server) -> None:
    server.core.speed.tokens_per_s = None
    assert server.ask("a", digests_of("a", 1)) == NOTHING, "nothing is known"
    server.core.speed.observe(20, 0.005)
    assert server.ask("b", digests_of("b", 1)) == WAITS
    server.clock.advance(0.001)
    assert server.ask("b", digests_of("b", 1)) == NOTHING


# -- a long prompt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stored", [63, 64, 65, 700, 1000])
def test_a_sequence_is_followed_as_long_as_its_blocks_are_there(backend: Backend, num_stored: int) -> None:
    server, digests = Server(backend, num_rows=1024), digests_of("long", 1000)
    stored = {name.tobytes() for name in Digests().extend(digests[:num_stored])}
    assert server.ask("a", digests) == WAITS
    num_asked = []
    while questions := server.questions():
        (question,) = questions
        num_asked.append(len(question.hashes))
        assert server.ask("a", digests) == WAITS
        is_there = np.array([name.tobytes() in stored for name in question.hashes])
        outcomes = np.where(is_there, Outcome.OK, Outcome.FAILED).astype(np.uint8)
        answer = replace(answer_all(question, Outcome.OK, ""), outcomes=outcomes)
        server.channels.receive(0, [answer])
    assert server.ask("a", digests) == (num_stored * BLOCK_TOKENS, True)
    assert num_asked == [64, 128, 256, 256, 256, 40][: len(num_asked)]


# -- steps ----------------------------------------------------------------------------------------------------------

OPERATIONS = st.tuples(st.sampled_from(["ask", "ask", "answer", "go away", "wait"]), st.integers(0, 20))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=40))
def test_a_step_without_a_pump_forgets_no_question(backend: Backend, operations: list[tuple[str, int]]) -> None:
    server = Server(backend)
    (pump,) = server.core._pumps
    questions: list[ProbeJob] = []
    for number, (operation, value) in enumerate(operations):
        if operation == "ask":
            server.ask(str(number), digests_of(str(value % 4), 1 + 7 * value))
        elif operation in ("answer", "go away") and questions:
            is_away = operation == "go away"
            outcome = Outcome.FAILED if is_away or value % 2 else Outcome.OK
            server.answer([questions.pop(0)], outcome, is_away=is_away)
        elif operation == "wait":
            server.clock.advance(value / 2)
        if not pump.step():
            assert not server.planner.pump(), "there was something to do"
        questions += server.questions()
