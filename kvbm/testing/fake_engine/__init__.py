"""An engine without a model, for authors of connectors: it speaks vLLM's connector interface and checks every byte.

`FakeEngine` has a scheduler, blocks, prefixes, windows and workers as vLLM has, and no model: what a block must hold
derives from its tokens. It calls a connector's two halves in the order in which vLLM 0.32 does, in every situation of
their contract. `ConnectorSchedules` drives it by schedules that hypothesis or a random number chooses. `vllm_stand_ins`
lets a connector be imported where no vLLM is installed.
"""

from kvbm.testing.fake_engine.engine import FakeEngine, MakeConnector
from kvbm.testing.fake_engine.memory import FakeTensor
from kvbm.testing.fake_engine.requests import FakeRequest, Status
from kvbm.testing.fake_engine.schedules import OPERATIONS, ConnectorSchedules, Schedule, prompt_of, random_schedule
from kvbm.testing.fake_engine.shape import EngineShape
from kvbm.testing.fake_engine.stand_ins import has_vllm, vllm_stand_ins

__all__ = [
    "OPERATIONS",
    "ConnectorSchedules",
    "EngineShape",
    "FakeEngine",
    "FakeRequest",
    "FakeTensor",
    "MakeConnector",
    "Schedule",
    "Status",
    "has_vllm",
    "prompt_of",
    "random_schedule",
    "vllm_stand_ins",
]
