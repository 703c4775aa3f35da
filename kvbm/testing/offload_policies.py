"""What every offload policy must keep: a mask for each batch, whatever is in it, arguments left as they were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.planner.policies import Candidates, OffloadPolicy
from kvbm.types import DEFAULT_PRIORITY, MAX_PRIORITY, HashArray, Tier

VERBS = ("registered", "used", "prioritised")


class OffloadPolicyTests:
    """Inherit, override `make_policy`, and let pytest collect the class.

    Examples
    --------
    >>> from kvbm.planner.policies import AlwaysPolicy
    >>> class TestAlways(OffloadPolicyTests):
    ...     def make_policy(self):
    ...         return AlwaysPolicy()
    >>> TestAlways().test_batches_of_every_size_get_a_mask("registered")
    """

    def make_policy(self) -> OffloadPolicy:
        """Give a fresh policy."""
        raise TypeError(f"{type(self).__name__} must override make_policy")

    @pytest.mark.parametrize("verb", VERBS)
    def test_batches_of_every_size_get_a_mask(self, verb: str) -> None:
        """No block, one, many, and the same ones again: (num_blocks,) bool each time."""
        policy = self.make_policy()
        for size in (0, 1, 2, 1000, 1000, 1, 0):
            _ask(policy, verb, candidates(range(size)))

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_hash_that_is_twice_in_a_batch_is_taken(self, verb: str) -> None:
        """Requests that share a prefix register and find it together."""
        _ask(self.make_policy(), verb, candidates([1, 2, 1, 1]))

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_hash_and_priority_is_taken(self, verb: str) -> None:
        """All bits of a hash may be set, or none; priorities go from 0 to 100."""
        policy = self.make_policy()
        blocks = candidates(range(3), [0, DEFAULT_PRIORITY, MAX_PRIORITY])
        blocks.hashes[0], blocks.hashes[1] = 0, 2**64 - 1
        _ask(policy, verb, blocks)

    @pytest.mark.parametrize("verb", VERBS)
    def test_arguments_are_left_as_they_were(self, verb: str) -> None:
        """The planner goes on with them: a policy that writes into them fails here."""
        blocks = candidates(range(16))
        for name in ("hashes", "parents", "priorities"):
            getattr(blocks, name).flags.writeable = False
        _ask(self.make_policy(), verb, blocks)

    def test_answers_do_not_change_later(self) -> None:
        """A mask is the caller's; the policy keeps no array that it writes again."""
        policy = self.make_policy()
        before = [_ask(policy, verb, candidates(range(64))) for verb in VERBS]
        kept = [mask.copy() for mask in before]
        for verb in VERBS:
            _ask(policy, verb, candidates(range(32, 96)))
        for mask, copy in zip(before, kept, strict=True):
            assert np.array_equal(mask, copy)

    def test_no_more_is_afforded_than_asked(self) -> None:
        """`afford` answers 0 to as many as it was asked for."""
        policy = self.make_policy()
        for num_blocks in (0, 1, 64, 1000):
            assert 0 <= policy.afford(num_blocks) <= num_blocks

    def test_policy_says_whether_it_counts_uses(self) -> None:
        """A policy that answers `used` with anything must be asked; `counts_uses` says so."""
        policy = self.make_policy()
        _ask(policy, "registered", candidates(range(64)))
        if not policy.counts_uses:
            assert not _ask(policy, "used", candidates(range(64))).any()
            assert not _ask(policy, "used", candidates(range(64))).any()

    def test_two_policies_share_nothing(self) -> None:
        """There is one for each route: what one was told, another of its class does not know."""
        told, fresh = self.make_policy(), self.make_policy()
        first = _ask(told, "registered", candidates(range(64)))
        for _ in range(4):
            _ask(told, "registered", candidates(range(64)))
        assert np.array_equal(_ask(fresh, "registered", candidates(range(64))), first)


def candidates(names: Sequence[int], priorities: Sequence[int] | None = None) -> Candidates:
    """Make candidates on their way from host to disk, named by numbers, each the child of the one before.

    Parameters
    ----------
    names : sequence of int
    priorities : sequence of int, optional
        One each; by default all have the default priority.
    """
    hashes = _hashes(names)
    given = np.full(len(names), DEFAULT_PRIORITY) if priorities is None else np.array(priorities)
    parents = np.concatenate([np.zeros((1, 2), dtype=np.uint64), hashes])[: len(names)]
    return Candidates(Tier.HOST, Tier.DISK, hashes, parents, given.astype(np.uint8))


def _hashes(names: Sequence[int]) -> HashArray:
    numbers = np.array(names, dtype=np.uint64)
    return np.ascontiguousarray(np.stack([numbers * np.uint64(0x9E3779B97F4A7C15), numbers + np.uint64(1)], axis=1))


def _ask(policy: OffloadPolicy, verb: str, blocks: Candidates) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = getattr(policy, verb)(blocks)
    assert isinstance(mask, np.ndarray), f"{verb} gave a {type(mask).__name__}, must give an array"
    is_right = mask.dtype == np.dtype(np.bool_) and mask.shape == (len(blocks),)
    assert is_right, f"{verb} gave {mask.shape} {mask.dtype} for {len(blocks)} blocks, must give a bool for each"
    return mask
