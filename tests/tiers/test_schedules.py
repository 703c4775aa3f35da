"""Schedules that hypothesis chooses: no wrong byte, leaked block or transfer without end (CONFORMANCE 28-32, 40).

``KVBM_SCHEDULES`` is how many there are for each case, a thousand in all; tests/soak has its own hundred thousand.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.planner import OffloadPolicy
from kvbm.planner.policies import PriorityPolicy, SecondUsePolicy
from kvbm.testing.tier_schedules import OPERATIONS, Schedule, TierSchedules

NUM_SCHEDULES = int(os.environ.get("KVBM_SCHEDULES", "125"))
SCHEDULES = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255)), min_size=40, max_size=120)
SETTINGS = settings(max_examples=NUM_SCHEDULES, deadline=None, suppress_health_check=list(HealthCheck))


class SecondUseSchedules(TierSchedules):
    def make_policies(self) -> list[OffloadPolicy]:
        return [SecondUsePolicy(max_blocks=8), SecondUsePolicy(max_blocks=8)]


class PrioritySchedules(TierSchedules):
    def make_policies(self) -> list[OffloadPolicy]:
        return [PriorityPolicy(min_priority=50), PriorityPolicy()]


@pytest.mark.timeout(3600, method="thread")
@pytest.mark.parametrize(
    ("kind", "num_ranks"), [(TierSchedules, 1), (TierSchedules, 2), (SecondUseSchedules, 1), (PrioritySchedules, 1)]
)
def test_no_schedule_gives_a_wrong_byte_or_keeps_a_block(
    backend: Backend, kind: type[TierSchedules], num_ranks: int
) -> None:
    @SETTINGS
    @given(SCHEDULES)
    def run(schedule: Schedule) -> None:
        kind(backend, num_ranks=num_ranks).run(schedule)

    run()
