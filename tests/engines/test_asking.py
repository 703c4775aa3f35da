"""A store that others fill is asked for what a request misses, and nobody waits long for its answer."""

from __future__ import annotations

import hashlib

import pytest
from msgspec.structs import replace

from kvbm._backend import Backend
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
DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(NUM_BLOCKS)]
WAITS = (None, False)
NOTHING = (0, False)
ALL = (NUM_BLOCKS * BLOCK_TOKENS, True)


class Server:
    """A scheduler's half over a host tier and a store of which nothing is known."""

    def __init__(self, backend: Backend) -> None:
        self.clock = SteppedClock()
        self.channels = StepChannels(1, clock=self.clock)
        pools = [BlockPool(64, name=tier.value, tier=tier, backend=backend) for tier in (Tier.HOST, Tier.REMOTE)]
        planner = Planner(
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

    def ask(self, request_id: str) -> tuple[int | None, bool]:
        num_tokens = NUM_BLOCKS * BLOCK_TOKENS + 1
        return self.core.matched_tokens(request_id, DIGESTS, num_tokens=num_tokens, num_computed_tokens=0)

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
