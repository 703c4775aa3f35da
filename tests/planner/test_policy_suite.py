"""The suites for offload policies and allocators find what is wrong with bad ones."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.planner.policies import Candidates, OffloadPolicy
from kvbm.testing.allocators import AllocatorTests
from kvbm.testing.offload_policies import OffloadPolicyTests

SHARED = bytearray(1 << 20)


class Short(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        return np.ones(min(len(blocks), 500), dtype=np.bool_)


class Listed(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        return [True] * len(blocks)


class Counted(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        return np.ones(len(blocks), dtype=np.int64)


class Scribbler(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        blocks.priorities[:] = 0
        return np.ones(len(blocks), dtype=np.bool_)


class Reused(OffloadPolicy):
    def __init__(self) -> None:
        self.mask = np.zeros(2000, dtype=np.bool_)

    def registered(self, blocks: Candidates) -> Any:
        self.mask[:] = ~self.mask
        return self.mask[: len(blocks)]


class Generous(OffloadPolicy):
    def registered(self, blocks: Candidates) -> Any:
        return np.ones(len(blocks), dtype=np.bool_)

    def afford(self, num_blocks: int) -> int:
        return num_blocks + 1


class Deaf(Generous):
    @property
    def counts_uses(self) -> bool:
        return False

    def used(self, blocks: Candidates) -> Any:
        return np.ones(len(blocks), dtype=np.bool_)

    def afford(self, num_blocks: int) -> int:
        return num_blocks


class Common(OffloadPolicy):
    seen: set[int] = set()  # noqa: RUF012

    def registered(self, blocks: Candidates) -> Any:
        mask = np.array([int(name) in self.seen for name in blocks.hashes[:, 0]], dtype=np.bool_)
        self.seen.update(blocks.hashes[:, 0].tolist())
        return mask


def suite_of(policy: Callable[[], OffloadPolicy]) -> OffloadPolicyTests:
    class Suite(OffloadPolicyTests):
        def make_policy(self) -> OffloadPolicy:
            return policy()

    return Suite()


@pytest.mark.parametrize(
    ("policy", "test", "arguments"),
    [
        (Short, "test_batches_of_every_size_get_a_mask", ["registered"]),
        (Listed, "test_batches_of_every_size_get_a_mask", ["registered"]),
        (Counted, "test_batches_of_every_size_get_a_mask", ["registered"]),
        (Counted, "test_a_hash_that_is_twice_in_a_batch_is_taken", ["registered"]),
        (Counted, "test_every_hash_and_priority_is_taken", ["registered"]),
        (Scribbler, "test_arguments_are_left_as_they_were", ["registered"]),
        (Reused, "test_answers_do_not_change_later", []),
        (Generous, "test_no_more_is_afforded_than_asked", []),
        (Deaf, "test_policy_says_whether_it_counts_uses", []),
        (Common, "test_two_policies_share_nothing", []),
    ],
)
def test_bad_policy_fails_its_suite(policy: Callable[[], OffloadPolicy], test: str, arguments: list[str]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        getattr(suite_of(policy), test)(*arguments)


class TestMapping(AllocatorTests):
    def make_buffer(self, nbytes: int) -> Any:
        return mmap.mmap(-1, nbytes)


class TestArray(AllocatorTests):
    def make_buffer(self, nbytes: int) -> Any:
        return np.empty(nbytes, dtype=np.uint8)


def allocator_suite(allocator: Callable[[int], Any]) -> AllocatorTests:
    class Suite(AllocatorTests):
        def make_buffer(self, nbytes: int) -> Any:
            return allocator(nbytes)

    return Suite()


@pytest.mark.parametrize(
    ("allocator", "test", "arguments"),
    [
        (lambda nbytes: bytearray(nbytes - 1), "test_buffer_is_large_enough_contiguous_and_writable", [4096]),
        (bytes, "test_buffer_is_large_enough_contiguous_and_writable", [4096]),
        (lambda n: np.empty(2 * n, np.uint8)[::2], "test_buffer_is_large_enough_contiguous_and_writable", [4096]),
        (lambda nbytes: memoryview(SHARED)[:nbytes], "test_buffers_share_no_byte", []),
        (lambda nbytes: memoryview(SHARED)[:nbytes], "test_buffer_lives_as_long_as_an_array_of_it", []),
        (lambda nbytes: memoryview(SHARED)[:nbytes], "test_storage_keeps_blocks_in_it", [True]),
    ],
)
def test_bad_allocator_fails_its_suite(allocator: Callable[[int], Any], test: str, arguments: list[Any]) -> None:
    with pytest.raises(AssertionError):
        getattr(allocator_suite(allocator), test)(*arguments)
