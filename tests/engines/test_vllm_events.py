"""KV events of the vLLM connector: what lies in a tier is announced there, under the names that vLLM gives."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from connector_site import KvbmSchedules, kvbm_connector

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.pool import BlockPool
from kvbm.testing.fake_engine import EngineShape, prompt_of, vllm_stand_ins
from kvbm.types import Tier

VARIANT = 0x1234_5678_9ABC_DEF1  # of an adapter
KINDS = pytest.mark.parametrize("are_numbers", [True, False], ids=["numbers", "bytes"])
Where = set[tuple[Any, str]]
Make = Callable[..., Any]


def chain(seed: str, num_blocks: int) -> list[bytes]:
    digests = [hashlib.sha256(seed.encode()).digest()]
    while len(digests) < num_blocks:
        digests.append(hashlib.sha256(digests[-1]).digest())
    return digests


def put(pool: BlockPool, digests: Sequence[bytes], *, variant: int = 0, first: int = 0) -> None:
    """Register blocks as a restart does, from a slot on."""
    names = Digests(variant=variant).extend(digests)
    parents = np.vstack([np.zeros((1, 2), dtype=np.uint64), names[:-1]])
    ids = np.arange(first, first + len(names), dtype=np.int32)
    pool.restore_blocks(ids, names, parents, np.full(len(names), 50, dtype=np.uint8))


def shown(digests: Sequence[bytes], are_numbers: bool) -> list[Any]:
    """Name blocks as vLLM's events do."""
    return [int.from_bytes(digest, "big") & (1 << 64) - 1 if are_numbers else digest for digest in digests]


def follow(events: Sequence[Any], where: Where) -> None:
    """Do what a router does: know what lies where."""
    for event in events:
        for name in getattr(event, "block_hashes", ()):
            if hasattr(event, "parent_block_hash"):
                where.add((name, event.medium))
            else:
                where.remove((name, event.medium))


@contextmanager
def naming(are_numbers: bool) -> Iterator[Any]:
    """Let vLLM name blocks in one way; give the module of the events."""
    module: Any = sys.modules["kvbm.engines.vllm.events"]
    with mock.patch.object(module, "envs", SimpleNamespace(VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=are_numbers)):
        yield module


@pytest.fixture
def pools(backend: Backend) -> list[BlockPool]:
    sizes = {Tier.HOST: 8, Tier.DISK: 64}
    return [BlockPool(size, name=tier.value, tier=tier, backend=backend) for tier, size in sizes.items()]


@pytest.fixture
def make(pools: list[BlockPool]) -> Iterator[Make]:
    """Give a function that makes the events of the pools."""
    with vllm_stand_ins(forget=["kvbm.engines.vllm"], is_forced=True):
        from kvbm.engines.vllm import events as module

        def begin(are_numbers: bool) -> Any:
            group = SimpleNamespace(planner=SimpleNamespace(pools=pools))
            with naming(are_numbers):
                return module.VllmEvents([group], block_tokens=16)

        with mock.patch.object(module, "_AT_ONCE", 20):
            yield begin


@KINDS
def test_blocks_of_an_adapter_are_named_as_vllm_names_them(
    make: Make, pools: list[BlockPool], are_numbers: bool
) -> None:
    events, digests, where = make(are_numbers), chain("a", 3), set[tuple[Any, str]]()
    events.named(digests, is_new=True)
    put(pools[0], digests, variant=VARIANT)
    (stored,) = events.take()
    assert (stored.block_hashes, stored.parent_block_hash) == (shown(digests, are_numbers), None)
    assert (stored.medium, stored.block_size, stored.group_idx) == ("CPU", 16, 0)
    follow([stored], where)
    pools[0].reset()
    follow(events.take(), where)
    assert not where


@KINDS
def test_a_chain_that_goes_on_later_names_its_parent(make: Make, pools: list[BlockPool], are_numbers: bool) -> None:
    events, digests = make(are_numbers), chain("a", 3)
    events.named(digests, is_new=True)
    put(pools[0], digests[:1])
    events.take()
    names = Digests().extend(digests)
    pools[0].restore_blocks(np.array([1, 2]), names[1:], names[:-1], np.full(2, 50, dtype=np.uint8))
    (stored,) = events.take()
    first, *others = shown(digests, are_numbers)
    assert (stored.parent_block_hash, stored.block_hashes) == (first, others)


def test_what_a_disk_holds_at_the_start_is_announced_by_and_by(make: Make, pools: list[BlockPool]) -> None:
    digests, where = chain("a", 50), set[tuple[Any, str]]()
    put(pools[1], digests)
    events = make(True)
    told = [events.take()]
    pools[1].reset_blocks(Digests().extend(digests)[45:])
    told += [events.take() for _ in range(3)]
    assert [len(some) for some in told] == [1, 2, 1, 0], "one event for each run of blocks, and one of a removal"
    stored = [one for some in told for one in some if hasattr(one, "parent_block_hash")]
    assert [len(one.block_hashes) for one in stored] == [20, 20, 5]
    follow(stored, where)
    assert where == {(name, "STORAGE") for name in shown(digests[:45], True)}


@KINDS
def test_a_disk_of_before_is_announced_as_far_as_it_can_be_named(
    make: Make, pools: list[BlockPool], are_numbers: bool
) -> None:
    digests, where = chain("a", 5), set[tuple[Any, str]]()
    put(pools[1], digests, variant=VARIANT, first=10)
    events = make(are_numbers)
    told = events.take()
    assert bool(told) is are_numbers, "sixteen bytes are no digest"
    events.named(digests[:3], is_new=True)
    told += events.take()
    events.named(digests)
    told += events.take()
    follow(told, where)
    assert where == {(name, "STORAGE") for name in shown(digests, are_numbers)}
    assert told[0].parent_block_hash is None
    events.named(digests, is_new=True)
    assert events.take() == [], "once"
    pools[1].reset()
    follow(events.take(), where)
    assert not where


def test_what_leaves_before_it_has_a_name_is_neither_announced_nor_taken_back(
    make: Make, pools: list[BlockPool]
) -> None:
    old, new = chain("old", 4), chain("new", 4)
    put(pools[1], old)
    events = make(False)
    assert events.take() == []
    events.named(old[:2], is_new=True)
    pools[1].reset()
    put(pools[1], new)
    events.named(old, is_new=True)
    events.named(new[:1], is_new=True)
    (stored,) = events.take()
    assert stored.block_hashes == new[:1]
    events.named(new, is_new=True)
    pools[1].reset_blocks(Digests().extend(new)[2:])
    (stored,) = events.take()
    assert (stored.parent_block_hash, stored.block_hashes) == (new[0], new[1:2])


@KINDS
def test_a_reset_is_one_event_and_what_comes_behind_it_is_announced(
    make: Make, pools: list[BlockPool], are_numbers: bool
) -> None:
    digests, where = chain("a", 4), set[tuple[Any, str]]()
    put(pools[1], digests)
    events = make(are_numbers)
    events.named(digests, is_new=True)
    put(pools[0], digests)
    for pool in pools:
        pool.reset()
    events.cleared()
    assert [type(one).__name__ for one in events.take()] == ["AllBlocksCleared"]
    put(pools[0], digests)
    follow(events.take(), where)
    assert where == {(name, "CPU") for name in shown(digests, are_numbers)}


@KINDS
def test_where_events_were_lost_all_that_is_there_is_announced_anew(
    make: Make, pools: list[BlockPool], are_numbers: bool
) -> None:
    pools[1]._hub.capacity = 4
    events, digests, where = make(are_numbers), chain("a", 20), set[tuple[Any, str]]()
    events.named(digests, is_new=True)
    put(pools[1], digests)
    follow(events.take(), where)
    assert where == {(name, "STORAGE") for name in shown(digests, are_numbers)}


def test_a_reset_leaves_no_names_behind(make: Make, pools: list[BlockPool]) -> None:
    events, digests = make(False), chain("a", 8)
    events._names._max_spare = 4
    events.named(digests, is_new=True)
    put(pools[0], digests[:4])
    events.take()
    events.named(digests, is_new=True)
    assert len(events._names) == 8
    pools[0].reset()
    events.cleared()
    assert len(events._names) == 4


def test_the_names_that_are_kept_are_those_of_the_tiers_and_a_few_more(make: Make, pools: list[BlockPool]) -> None:
    events = make(False)
    events._names._max_spare = 16
    kept, where = chain("kept", 4), set[tuple[Any, str]]()
    events.named(kept, is_new=True)
    put(pools[0], kept)
    put(pools[1], kept)
    follow(events.take(), where)
    for seed in range(50):
        events.named(chain(str(seed), 30), is_new=True)
        assert len(events._names) <= 16 + len(kept)
    pools[0].reset()
    follow(events.take(), where)
    assert where == {(name, "STORAGE") for name in kept}
    for seed in range(50):
        events.named(chain(str(seed), 30), is_new=True)
    pools[1].reset()
    follow(events.take(), where)
    assert not where, "known as long as it lies anywhere"
    assert len(events._names) <= 16


def test_blocks_that_get_their_names_late_are_told_in_one_event_for_each_tier(
    make: Make, pools: list[BlockPool]
) -> None:
    digests = chain("a", 6)
    for pool in pools:
        put(pool, digests)
    events = make(False)
    for _ in pools:
        assert events.take() == []
    events.named(digests, is_new=True)
    assert [(one.medium, one.block_hashes) for one in events.take()] == [("CPU", digests), ("STORAGE", digests)]


@pytest.mark.parametrize("is_restart", [False, True], ids=["running", "restarted"])
@KINDS
def test_blocks_that_come_up_from_the_disk_are_announced_before_anything_is_computed(
    backend: Backend, are_numbers: bool, is_restart: bool
) -> None:
    with kvbm_connector(backend):
        schedules = KvbmSchedules(EngineShape(num_blocks=24), num_host=8, num_disk=16)
        half, engine, told, where = schedules.half, schedules.engine, list[Any](), set[tuple[Any, str]]()

        def listen() -> None:
            with naming(are_numbers) as module:
                half._events = module.VllmEvents(half._groups, block_tokens=engine.shape.block_tokens)
            take = half._events.take
            half._events.take = lambda: told.extend(take()) or []

        listen()
        prompt = prompt_of(24, engine.shape.block_tokens)
        engine.add("a", prompt)
        schedules.end()
        assert told
        engine.forget_prefixes()
        schedules.pools[0].reset()
        if is_restart:
            half._events.close()
            listen()
        else:
            half.take_events()
        told.clear()
        request = engine.add("b", prompt)
        num_computed, before = engine.num_computed, list[Any]()
        while engine.num_computed == num_computed:
            before = list(told)
            engine.step()
            schedules.let_all_end()
        follow(before, where)
        loaded = shown(request.block_hashes, are_numbers)[: (len(prompt) - 1) // engine.shape.block_tokens]
        assert {name for name, medium in where if medium == "CPU"} == set(loaded)
        schedules.end()
        engine.close()
