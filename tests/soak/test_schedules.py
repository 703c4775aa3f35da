"""A hundred thousand schedules over three tiers: never a wrong byte, a leaked block or a transfer without end.

``KVBM_SOAK_SCHEDULES`` is how many there are in all.
"""

from __future__ import annotations

import logging
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.planner import OffloadPolicy
from kvbm.planner.policies import PriorityPolicy, SecondUsePolicy
from kvbm.testing.tier_schedules import OPERATIONS, Schedule, TierSchedules


class PickySchedules(TierSchedules):
    """Uses and priorities decide what goes down."""

    def make_policies(self) -> list[OffloadPolicy]:
        return [SecondUsePolicy(max_blocks=8), PriorityPolicy(min_priority=50)]


CASES = [(TierSchedules, 1), (TierSchedules, 2), (PickySchedules, 1)]
NUM_SCHEDULES = int(os.environ.get("KVBM_SOAK_SCHEDULES", "100000")) // (2 * len(CASES))
SCHEDULES = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255)), min_size=40, max_size=120)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "num_ranks"), CASES)
def test_no_schedule_gives_a_wrong_byte_or_keeps_a_block(
    backend: Backend, kind: type[TierSchedules], num_ranks: int
) -> None:
    logging.disable(logging.CRITICAL)  # what goes wrong on purpose

    @settings(max_examples=NUM_SCHEDULES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(SCHEDULES)
    def run(schedule: Schedule) -> None:
        kind(backend, num_ranks=num_ranks).run(schedule)

    try:
        run()
    finally:
        logging.disable(logging.NOTSET)
