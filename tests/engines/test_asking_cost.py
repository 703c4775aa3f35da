"""An engine asks about a long prompt at every step: its names are read once, and where they lie is looked up seldom."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.step_channel import StepChannels
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedClock
from kvbm.types import HashArray, IdArray, Tier

NUM_TOKENS, BLOCK_TOKENS = 100_000, 16
NUM_BLOCKS = NUM_TOKENS // BLOCK_TOKENS
DIGESTS = [hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(NUM_BLOCKS)]
ALL = (NUM_TOKENS - BLOCK_TOKENS, True)  # one block is left to compute
ROUNDS = 30
FIRST_S, AGAIN_S = 1.5e-3, 20e-6  # what a scheduler may spend
ROOM = 10  # for a busy machine


class CountedPool(BlockPool):
    """A pool that counts the names that are looked up."""

    num_looked_up = 0

    def lookup(self, *given: Any, **more: Any) -> IdArray:
        self.num_looked_up += len(given[0])
        return super().lookup(*given, **more)


class CountedNames(list[bytes]):
    """Names of blocks, as the engine gives them, that count how many of them are read."""

    num_read = 0

    def __iter__(self) -> Iterator[bytes]:
        for name in super().__iter__():
            self.num_read += 1
            yield name

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.num_read += len(found) if isinstance(place, slice) else 1
        return found


class Asked:
    """A scheduler's half over a host tier that has every block of the prompt."""

    def __init__(self, backend: Backend) -> None:
        self.clock = SteppedClock()
        channels = StepChannels(1, clock=self.clock)
        self.pool = CountedPool(2 * NUM_BLOCKS, name="host", tier=Tier.HOST, backend=backend)
        self.planner = Planner([self.pool], channels.channels, foreign_tier=Tier.DEVICE, clock=self.clock)
        self.core = SchedulerCore(
            [Group(self.planner, channels, block_nbytes=1 << 20)], block_tokens=BLOCK_TOKENS, clock=self.clock
        )
        self.core.speed.tokens_per_s = 1000.0
        hashes: HashArray = Digests().extend(DIGESTS)
        self.pool.register_blocks(self.pool.allocate_blocks(NUM_BLOCKS).complete(hashes)).release()
        self.names = CountedNames(DIGESTS)

    def ask(self, request_id: str = "a", names: list[bytes] | None = None) -> tuple[int | None, bool]:
        return self.core.matched_tokens(
            request_id, self.names if names is None else names, num_tokens=NUM_TOKENS, num_computed_tokens=0
        )

    def take_counts(self) -> tuple[int, int]:
        """Give the names that were read, and looked up, since the last call."""
        counts = self.names.num_read, self.pool.num_looked_up
        self.names.num_read = self.pool.num_looked_up = 0
        return counts


@pytest.fixture
def asked(backend: Backend) -> Iterator[Asked]:
    one = Asked(backend)
    yield one
    one.planner.close(0.0)


def test_a_prompt_is_read_and_looked_up_once_however_often_an_engine_asks(asked: Asked) -> None:
    assert asked.ask() == ALL
    num_read, num_looked_up = asked.take_counts()
    assert NUM_BLOCKS <= num_read <= NUM_BLOCKS + 2
    assert num_looked_up == NUM_BLOCKS - 1
    for _ in range(100):  # as of a request that was preempted, and waits for room
        assert asked.ask() == ALL
        num_read, num_looked_up = asked.take_counts()
        assert num_read <= 2
        assert num_looked_up == 0


def test_an_answer_that_has_grown_old_is_looked_up_again_but_no_name_is_read(asked: Asked) -> None:
    assert asked.ask() == ALL
    asked.take_counts()
    asked.clock.advance(1.0)
    assert asked.ask() == ALL
    num_read, num_looked_up = asked.take_counts()
    assert num_read <= 2
    assert num_looked_up == NUM_BLOCKS - 1


def test_asking_takes_an_engines_scheduler_no_time_to_speak_of(asked: Asked, backend: Backend) -> None:
    if backend.name != "native":
        pytest.skip("the bars are those of the native twin")
    first, again = [], []
    for number in range(ROUNDS):
        for times in (first, again):
            began = time.perf_counter()
            assert asked.ask(str(number), DIGESTS) == ALL
            times.append(time.perf_counter() - began)
        asked.core.finished(str(number))
    assert min(first) < ROOM * FIRST_S
    assert min(again) < ROOM * AGAIN_S
