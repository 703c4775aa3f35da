"""Eviction policies: the built-in one, ours in Python, and those that misbehave (CONFORMANCE 15)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pool_life import MakePool, hashes_of, keep, present

from kvbm._backend import Backend
from kvbm.errors import PluginError
from kvbm.eviction import EvictionPolicy, FifoPolicy, LruPolicy
from kvbm.plugins import load_plugin, plugin_names
from kvbm.pool import BlockPool
from kvbm.testing.eviction_policies import EvictionPolicyTests


class _OnBackend(EvictionPolicyTests):
    @pytest.fixture(autouse=True)
    def _use(self, backend: Backend) -> None:
        self.backend = backend

    def make_pool(self, num_blocks: int) -> BlockPool:
        return BlockPool(num_blocks, policy=self.make_policy(), backend=self.backend)


class TestFifoPolicy(_OnBackend):
    def make_policy(self) -> EvictionPolicy:
        return FifoPolicy()


class TestLruPolicy(_OnBackend):
    def make_policy(self) -> EvictionPolicy:
        return LruPolicy(is_builtin=False)


def test_lru_in_python_evicts_as_the_builtin(make_pool: MakePool) -> None:
    rng = np.random.default_rng(0)
    pools = [make_pool(24, policy=policy) for policy in (None, LruPolicy(is_builtin=False))]
    for _ in range(600):
        names = rng.integers(0, 60, rng.integers(1, 8))
        call = rng.integers(0, 4)
        for pool in pools:
            hashes = hashes_of(np.unique(names).tolist())
            if call == 0:
                pool.touch_blocks(hashes)
            elif call == 1:
                pool.set_priority(hashes, int(names[0]))
            else:
                hit = pool.match_sequence_hashes(hashes)
                fresh = pool.allocate_blocks(len(hashes) - len(hit))
                (hit + pool.register_blocks(fresh.complete(hashes[len(hit) :]))).release()
        assert present(pools[0], range(60)) == present(pools[1], range(60))


def test_fifo_ignores_use(make_pool: MakePool) -> None:
    pool = make_pool(3, policy=FifoPolicy())
    for name in (1, 2, 3):
        keep(pool, [name])
    pool.touch_blocks(hashes_of([1]))
    pool.allocate_blocks(1)
    assert present(pool, [1, 2, 3]) == [False, True, True]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([0, 0], "returned block 0 twice"),
        ([0], "returned 1 of 2 blocks"),
        ([0, 99], "returned block 99, which is outside the pool"),
        ([0, 3], "returned block 3, which is not inactive"),
        ([0, "x"], "returned 'x', which is not a block id"),
        ([0, 1, 2], "returned 3 of 2 blocks"),
    ],
)
def test_policy_that_names_wrong_victims_changes_nothing(make_pool: MakePool, answer: list[Any], reason: str) -> None:
    class WrongPolicy(FifoPolicy):
        is_wrong = True

        def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
            if not self.is_wrong:
                return super().pop(n, protected)
            for block_id in answer:
                self._queue.pop(block_id, None)
            return answer

    policy = WrongPolicy()
    pool = make_pool(4, policy=policy)
    keep(pool, [1, 2, 3])
    held = pool.allocate_blocks(1)
    with pytest.raises(PluginError, match="eviction policy WrongPolicy " + reason):
        pool.allocate_blocks(2)
    assert present(pool, [1, 2, 3]) == [True] * 3
    pool.check()
    held.release()
    policy.is_wrong = False
    assert len(pool.allocate_blocks(4)) == 4, "what was named is back in the policy"
    pool.check()


@pytest.mark.parametrize("answer", [lambda: None, lambda: 5, lambda: (1 // i for i in range(3))])
def test_policy_that_gives_no_sequence_is_named_and_changes_nothing(make_pool: MakePool, answer: Any) -> None:
    class OddPolicy(FifoPolicy):
        def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
            return answer()  # type: ignore[no-any-return]

    pool = make_pool(2, policy=OddPolicy())
    keep(pool, [1, 2])
    with pytest.raises(PluginError, match="eviction policy OddPolicy failed in pop"):
        pool.allocate_blocks(1)
    pool.check()
    assert present(pool, [1, 2]) == [True, True]


def test_policy_that_raises_is_named_and_changes_nothing(make_pool: MakePool) -> None:
    class RaisingPolicy(FifoPolicy):
        def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
            raise KeyError(n)

    pool = make_pool(2, policy=RaisingPolicy())
    keep(pool, [1, 2])
    with pytest.raises(PluginError, match=r"eviction policy RaisingPolicy failed in pop: KeyError\(1\)") as raised:
        pool.allocate_blocks(1)
    assert isinstance(raised.value.__cause__, KeyError)
    pool.check()
    assert present(pool, [1, 2]) == [True, True]


@pytest.mark.parametrize("name", ["inserted", "removed", "touched", "prioritised"])
def test_policy_that_fails_when_told_leaks_nothing_and_is_named_at_the_next_eviction(
    make_pool: MakePool, name: str
) -> None:
    class FailingPolicy(FifoPolicy):
        is_failing = False

    def fail_after(self: FailingPolicy, *arguments: Any) -> None:
        getattr(FifoPolicy, name)(self, *arguments)
        if self.is_failing:
            raise ValueError(name)

    setattr(FailingPolicy, name, fail_after)
    policy = FailingPolicy()
    pool = make_pool(3, policy=policy)
    keep(pool, [1, 2, 3])
    policy.is_failing = True
    with pool.match_sequence_hashes(hashes_of([1])) as hit:
        assert len(hit) == 1, "whoever took references gets them"
    pool.touch_blocks(hashes_of([2]))
    pool.set_priority(hashes_of([2]), 60)
    policy.is_failing = False
    with pytest.raises(PluginError, match=f"eviction policy FailingPolicy failed in {name}: ValueError"):
        pool.allocate_blocks(2)
    pool.check()
    assert pool.status().inactive == 3
    with pool.allocate_blocks(3):
        assert pool.status().mutable == 3, "it is said once"


def test_policy_that_calls_back_is_refused_and_nothing_hangs(make_pool: MakePool) -> None:
    class CallingPolicy(FifoPolicy):
        pool: BlockPool

        def pop(self, n: int, protected: frozenset[int]) -> Sequence[int]:
            self.pool.lookup(hashes_of([1]))
            return super().pop(n, protected)

    policy = CallingPolicy()
    policy.pool = pool = make_pool(2, policy=policy)
    keep(pool, [1, 2])
    with pytest.raises(PluginError, match="must not call back into the pool"):
        pool.allocate_blocks(1)
    pool.check()


def test_plugin_names_load_and_unknown_ones_list_the_known() -> None:
    assert plugin_names("eviction") == ["fifo", "lru"]
    assert load_plugin("eviction", "fifo") is FifoPolicy
    with pytest.raises(PluginError, match="no eviction plug-in is called 'mru', known: fifo, lru"):
        load_plugin("eviction", "mru")
