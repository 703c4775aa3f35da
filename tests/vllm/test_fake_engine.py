"""Our connector over the real base classes of vLLM, in the fake engine: stand-ins and the real ones do the same."""

from __future__ import annotations

import pytest
from connector_site import KvbmSchedules, kvbm_connector
from vllm_site import need_feature, needs_vllm

from kvbm._backend import default_backend
from kvbm.testing.fake_engine import EngineShape, random_schedule

pytestmark = needs_vllm
SHAPES = (
    EngineShape(num_blocks=12),
    EngineShape(num_blocks=10, num_ranks=2, has_prefix_cache=False, budget_tokens=6),
    EngineShape(num_blocks=16, windows=(0, 6)),
)


@pytest.mark.parametrize("loads", ["async", "sync"])
def test_schedules_end_well_over_the_real_base_classes(loads: str) -> None:
    need_feature("named failures")
    need_feature("hit sources")
    num_loaded = 0
    with kvbm_connector(default_backend()):
        for seed in range(25):
            schedules = KvbmSchedules(SHAPES[seed % len(SHAPES)], loads=loads)
            real = type(schedules.engine.scheduler_half).__mro__[1]
            assert real.__module__ == "vllm.distributed.kv_transfer.kv_connector.v1.base"
            schedules.run(random_schedule(seed, 30))
            num_loaded += schedules.engine.num_loaded
    assert num_loaded > 200
