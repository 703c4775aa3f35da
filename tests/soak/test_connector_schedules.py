"""A hundred thousand schedules of our connector in the fake engine.

``KVBM_SOAK_SCHEDULES`` is how many there are in all.
"""

from __future__ import annotations

import os

import pytest
from connector_runs import SHARES, run_schedules

from kvbm._backend import Backend

LOADS = ("async", "sync")
NUM_SCHEDULES = int(os.environ.get("KVBM_SOAK_SCHEDULES", "100000")) // len(LOADS)


@pytest.mark.soak
@pytest.mark.parametrize("loads", LOADS)
def test_no_schedule_gives_a_wrong_byte_or_keeps_a_block(backend: Backend, loads: str) -> None:
    run_schedules(backend, round(NUM_SCHEDULES * SHARES[backend.name]), 15, 90, loads=loads, is_soak=True)
