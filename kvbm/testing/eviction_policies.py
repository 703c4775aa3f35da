"""What every eviction policy must keep, asked through a real pool on the twin in use."""

from __future__ import annotations

import numpy as np

from kvbm.eviction.base import EvictionPolicy
from kvbm.pool import BlockPool
from kvbm.types import HashArray


class EvictionPolicyTests:
    """Inherit, override `make_policy`, and let pytest collect the class.

    Examples
    --------
    >>> from kvbm.eviction import FifoPolicy
    >>> class TestFifo(EvictionPolicyTests):
    ...     def make_policy(self):
    ...         return FifoPolicy()
    >>> TestFifo().test_policy_frees_exactly_what_is_asked()
    """

    def make_policy(self) -> EvictionPolicy:
        """Give a fresh policy."""
        raise TypeError(f"{type(self).__name__} must override make_policy")

    def make_pool(self, num_blocks: int) -> BlockPool:
        """Give a pool with a fresh policy."""
        return BlockPool(num_blocks, policy=self.make_policy())

    def test_policy_frees_exactly_what_is_asked(self) -> None:
        """An allocation of n from a full pool evicts n distinct blocks."""
        pool = self.make_pool(8)
        _keep(pool, _hashes(0, 8))
        with pool.allocate_blocks(3) as fresh:
            assert len(set(fresh.block_ids.tolist())) == 3
            assert pool.status().inactive == 5
        pool.check()

    def test_policy_gives_up_every_block(self) -> None:
        """A pool whose blocks are all inactive can be allocated whole."""
        pool = self.make_pool(8)
        _keep(pool, _hashes(0, 8))
        with pool.allocate_blocks(8) as fresh:
            assert sorted(fresh.block_ids.tolist()) == list(range(8))
        pool.check()

    def test_policy_never_evicts_a_held_block(self) -> None:
        """A block that was revived is not named until it is released again."""
        pool = self.make_pool(8)
        hashes = _hashes(0, 8)
        _keep(pool, hashes)
        with pool.match_sequence_hashes(hashes[:4]) as held, pool.allocate_blocks(4) as fresh:
            assert not set(held.block_ids.tolist()) & set(fresh.block_ids.tolist())
            assert pool.try_allocate_blocks(1) is None
        pool.check()

    def test_policy_forgets_reset_blocks(self) -> None:
        """A block that was reset is free, and is not evicted as well."""
        pool = self.make_pool(8)
        hashes = _hashes(0, 8)
        _keep(pool, hashes)
        assert len(pool.reset_blocks(hashes[2:5]).reset) == 3
        with pool.allocate_blocks(8) as fresh:
            assert sorted(fresh.block_ids.tolist()) == list(range(8))
        pool.check()

    def test_policy_keeps_protected_blocks(self) -> None:
        """No protected block is popped while others are there."""
        policy = self.make_policy()
        ids = np.arange(6, dtype=np.int32)
        policy.inserted(ids, _hashes(0, 6), np.full(6, 50, dtype=np.uint8))
        assert not set(policy.pop(3, frozenset({0, 1, 2}))) & {0, 1, 2}

    def test_policy_takes_touch_and_priority(self) -> None:
        """Recency and priority may be ignored, but blocks stay conserved."""
        pool = self.make_pool(8)
        hashes = _hashes(0, 8)
        _keep(pool, hashes)
        assert pool.touch_blocks(hashes[3:6]) == 3
        assert pool.set_priority(hashes[:2], 90) == 2
        with pool.allocate_blocks(8):
            assert pool.status().mutable == 8
        pool.check()

    def test_policy_survives_a_long_random_life(self) -> None:
        """A thousand random calls conserve blocks."""
        rng = np.random.default_rng(0)
        pool = self.make_pool(16)
        for _ in range(1000):
            hashes = _hashes(int(rng.integers(40)), int(rng.integers(1, 6)))
            hit = pool.match_sequence_hashes(hashes)
            fresh = pool.allocate_blocks(len(hashes) - len(hit))
            whole = hit + pool.register_blocks(fresh.complete(hashes[len(hit) :]))
            whole.release()
            if rng.random() < 0.1:
                pool.reset_blocks(hashes)
            pool.check()
            status = pool.status()
            assert status.free + status.inactive == 16


def _hashes(first: int, n: int) -> HashArray:
    return np.stack([np.arange(first, first + n), np.full(n, 7)], axis=1).astype(np.uint64)


def _keep(pool: BlockPool, hashes: HashArray) -> None:
    """Register hashes and let go of them."""
    pool.register_blocks(pool.allocate_blocks(len(hashes)).complete(hashes)).release()
