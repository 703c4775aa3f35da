"""A hypothesis machine drives both stores with one schedule and compares every answer (CONFORMANCE 14)."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvbm._backend import load_backend
from kvbm.eviction import FifoPolicy, LruPolicy
from kvbm.types import BlockState, HashArray, SequenceHash

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kvbm._native.store") is None, reason="the pure package has one twin only"
)

NUM_BLOCKS = 9
SETTINGS = settings(max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
COUNTS = st.integers(-1, 12) | st.sampled_from([2**70, -(2**70), True, np.int64(2), 2.0, None])
IDS = st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=5)
ODD_IDS = IDS | st.lists(st.sampled_from([-1, 0, NUM_BLOCKS, 2**40, 2**70, True, 1.0, "0"]), max_size=2)
NAMES = st.lists(st.integers(0, 12), max_size=5)
PRIORITIES = st.sampled_from([0, 50, 63, 64, 100, 101, -1, 2**70, -(2**70), True, np.uint8(7), 50.0, None])


def _hashes(names: list[int]) -> HashArray:
    return np.array([[name * 7919 + 1, name] for name in names], dtype=np.uint64).reshape(-1, 2)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


class TwinsMachine(RuleBasedStateMachine):
    """Every call of a store with arguments that mostly fit, and some that never do."""

    @initialize(policy=st.sampled_from(["builtin", "lru", "fifo"]), capacity=st.integers(1, 20))
    def make(self, policy: str, capacity: int) -> None:
        def policy_of() -> Any:
            return {"builtin": None, "lru": LruPolicy(is_builtin=False), "fifo": FifoPolicy()}[policy]

        self.stores = [
            load_backend(name).store(NUM_BLOCKS, policy=policy_of(), outbox_capacity=capacity)
            for name in ("pure", "native")
        ]

    def call(self, operation: str, *arguments: Any) -> None:
        """Make a call on both and compare what comes back, or the errors."""
        answers = []
        for store in self.stores:
            try:
                answers.append(_plain(getattr(store, operation)(*arguments)))
            except Exception as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1], (operation, arguments)

    def ids_in(self, data: st.DataObject, *states: BlockState) -> list[int]:
        found = np.flatnonzero(np.isin(self.stores[0].states(list(range(NUM_BLOCKS))), states)).tolist()
        return data.draw(st.lists(st.sampled_from(found), max_size=5, unique=True) if found else st.just([]))

    @rule(n=COUNTS)
    def allocate(self, n: Any) -> None:
        self.call("allocate", n)

    @rule(data=st.data(), ids=ODD_IDS | st.none(), extra=st.sampled_from([0, 0, 0, 1, -1]), as_bytes=st.booleans())
    def stage(self, data: st.DataObject, ids: list[Any] | None, extra: int, as_bytes: bool) -> None:
        ids = self.ids_in(data, BlockState.MUTABLE) if ids is None else ids
        num_names = max(0, len(ids) + extra)
        names = _hashes(data.draw(st.lists(st.integers(0, 12), min_size=num_names, max_size=num_names)))
        hashes: Any = [SequenceHash(name.tobytes()) for name in names] if as_bytes else names
        self.call("stage", ids, hashes, names[::-1].copy())

    @rule(data=st.data(), ids=ODD_IDS | st.none())
    def register(self, data: st.DataObject, ids: list[Any] | None) -> None:
        self.call("register", self.ids_in(data, BlockState.COMPLETE) if ids is None else ids)

    @rule(data=st.data(), ids=ODD_IDS | st.none(), times=st.integers(1, 2))
    def release(self, data: st.DataObject, ids: list[Any] | None, times: int) -> None:
        held = (BlockState.MUTABLE, BlockState.COMPLETE, BlockState.ACTIVE)
        self.call("release", (self.ids_in(data, *held) if ids is None else ids) * times)

    @rule(data=st.data(), ids=ODD_IDS | st.none(), times=st.integers(1, 2))
    def discard(self, data: st.DataObject, ids: list[Any] | None, times: int) -> None:
        registered = (BlockState.ACTIVE, BlockState.INACTIVE)
        self.call("discard", (self.ids_in(data, *registered) if ids is None else ids) * times)

    @rule(data=st.data(), ids=ODD_IDS | st.none())
    def restore(self, data: st.DataObject, ids: list[Any] | None) -> None:
        ids = self.ids_in(data, BlockState.FREE) if ids is None else ids
        names = _hashes(data.draw(st.lists(st.integers(0, 30), min_size=len(ids), max_size=len(ids))))
        levels = st.sampled_from([50, 50, 0, 100]) | PRIORITIES
        self.call("restore", ids, names, names, data.draw(st.lists(levels, min_size=len(ids), max_size=len(ids))))

    @rule(operation=st.sampled_from(["match", "find", "touch", "remove"]), names=NAMES)
    def by_hash(self, operation: str, names: list[int]) -> None:
        self.call(operation, _hashes(names))

    @rule(names=NAMES, ids=IDS)
    def acquire(self, names: list[int], ids: list[int]) -> None:
        self.call("acquire", ids[: len(names)], _hashes(names[: len(ids)]))

    @rule(names=NAMES, priority=PRIORITIES)
    def set_priority(self, names: list[int], priority: Any) -> None:
        self.call("set_priority", _hashes(names), priority)

    @rule(operation=st.sampled_from(["clear", "counts", "registered", "subscribe", "unsubscribe"]))
    def plain(self, operation: str) -> None:
        self.call(operation)

    @rule(max_rows=COUNTS)
    def drain(self, max_rows: Any) -> None:
        self.call("drain", max_rows)

    @invariant()
    def both_keep_their_invariants(self) -> None:
        for store in getattr(self, "stores", []):
            store.check()


def test_twins_give_equal_answers_to_any_schedule_that_hypothesis_finds() -> None:
    run_state_machine_as_test(TwinsMachine, settings=SETTINGS)
