"""Schedules for our connector, as hypothesis chooses them."""

from __future__ import annotations

import logging

from connector_site import KvbmSchedules, kvbm_connector
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.testing.fake_engine import OPERATIONS, EngineShape, Schedule

SHAPES = st.builds(
    EngineShape,
    num_blocks=st.sampled_from([9, 12, 16, 24]),
    windows=st.sampled_from([(0,), (0,), (0, 6), (5, 0)]),
    num_ranks=st.sampled_from([1, 1, 2]),
    has_mla=st.booleans(),
    budget_tokens=st.sampled_from([16, 32, 6]),
    max_running=st.sampled_from([4, 2, 1]),
    has_prefix_cache=st.booleans(),
    policy=st.sampled_from(["recompute", "recompute", "fail"]),
    num_asks=st.sampled_from([1, 3]),
)
SHARES = {"pure": 0.25, "native": 0.75}  # of the schedules: the native twin is the faster one
TIERS = st.fixed_dictionaries(
    {
        "num_host": st.sampled_from([6, 3, 12]),
        "num_disk": st.sampled_from([10, 0, 20]),
        "tokens_per_s": st.sampled_from([None, None, 2.0, 50.0, 1e6]),  # loading pays, now and then, hardly ever
    }
)


def run_schedules(
    backend: Backend, num_schedules: int, fewest: int, most: int, *, loads: str, is_soak: bool = False
) -> None:
    """Let hypothesis choose schedules of so many operations, shapes of the engine, and sizes of the tiers.

    Making one that fails smaller takes minutes, longer than a test may take: a soak does, and tells how far it is.
    """
    phases = list(Phase) if is_soak else [Phase.explicit, Phase.generate]
    num_run = 0
    operations = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255))

    @settings(
        max_examples=num_schedules, phases=phases, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.lists(operations, min_size=fewest, max_size=most), SHAPES, TIERS)
    def run(schedule: Schedule, shape: EngineShape, tiers: dict[str, int]) -> None:
        nonlocal num_run
        KvbmSchedules(shape, loads=loads, **tiers).run(schedule)
        num_run += 1
        if is_soak and num_run % 1000 == 0:
            print(f"{backend.name}, loads {loads}: {num_run} of {num_schedules} schedules", flush=True)

    logging.disable(logging.CRITICAL)  # what goes wrong on purpose
    try:
        with kvbm_connector(backend):
            run()
    finally:
        logging.disable(logging.NOTSET)
