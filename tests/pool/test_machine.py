"""The public state machine, on both twins (CONFORMANCE 1, 14)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kvbm._backend import Backend
from kvbm.eviction import LruPolicy
from kvbm.pool import BlockPool
from kvbm.testing.pool_machine import NUM_BLOCKS, PoolStateMachine

SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def test_pool_equals_a_model_of_dicts(backend: Backend) -> None:
    class Machine(PoolStateMachine):
        def make_pool(self) -> BlockPool:
            return BlockPool(NUM_BLOCKS, backend=backend)

    run_state_machine_as_test(Machine, settings=SETTINGS)


def test_pool_with_a_python_policy_equals_the_same_model(backend: Backend) -> None:
    class Machine(PoolStateMachine):
        def make_pool(self) -> BlockPool:
            return BlockPool(NUM_BLOCKS, policy=LruPolicy(is_builtin=False), backend=backend)

    run_state_machine_as_test(Machine, settings=SETTINGS)
