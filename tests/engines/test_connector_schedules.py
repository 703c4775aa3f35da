"""Our connector in the fake engine: whatever users, engine and copies do, no request reads a wrong byte."""

from __future__ import annotations

import pytest
from connector_runs import SHARES, run_schedules
from connector_site import KvbmSchedules, kvbm_connector

from kvbm._backend import Backend
from kvbm.testing.fake_engine import EngineShape, prompt_of


@pytest.mark.parametrize(("loads", "num_schedules"), [("async", 700), ("sync", 300)])
def test_no_schedule_gives_a_wrong_byte_or_keeps_a_block(backend: Backend, loads: str, num_schedules: int) -> None:
    run_schedules(backend, round(num_schedules * SHARES[backend.name]), 6, 18, loads=loads)


@pytest.mark.parametrize("loads", ["async", "sync"])
@pytest.mark.parametrize("windows", [(0,), (0, 6)], ids=["one group", "two groups"])
def test_what_was_computed_once_is_loaded(backend: Backend, loads: str, windows: tuple[int, ...]) -> None:
    with kvbm_connector(backend):
        schedules = KvbmSchedules(EngineShape(num_blocks=24, windows=windows), num_host=12, loads=loads)
        engine = schedules.engine
        for request_id in "ab":
            engine.forget_prefixes()
            engine.add(request_id, prompt_of(24, 4))
            schedules.end()
        assert engine.num_loaded == 16
        engine.close()


def test_a_request_whose_load_has_ended_goes_before_one_that_holds_nothing(backend: Backend) -> None:
    shape = EngineShape(num_blocks=9, windows=(5, 0), budget_tokens=6, max_running=2, has_prefix_cache=False)
    with kvbm_connector(backend):
        schedules = KvbmSchedules(shape, num_host=6, num_disk=0)
        schedules.run([("add", 38), ("add", 124), ("step", 0), ("steps", 115), ("add_salted", 99), ("add_salted", 252)])


def test_a_request_preempted_behind_a_synchronous_load_is_loaded_synchronously_again(backend: Backend) -> None:
    shape = EngineShape(num_blocks=7, budget_tokens=6, max_running=1, has_prefix_cache=False)
    with kvbm_connector(backend):
        schedules = KvbmSchedules(shape, num_host=12, num_disk=0, loads="sync")
        schedules.run([("serve", 158), ("serve", 221), ("step", 0), ("preempt_all", 0)])
