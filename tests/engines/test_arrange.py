"""Settings of the tiers reach the scheduler's half: limits, policies, budgets, times to live, eviction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connector_site import KvbmSchedules, kvbm_connector

from kvbm._backend import Backend
from kvbm.engines.arrange import make_group
from kvbm.engines.groups import Group
from kvbm.engines.shard import ShardDescription
from kvbm.errors import ConfigError
from kvbm.planner import Limits, OffloadPolicy
from kvbm.planner.policies import AlwaysPolicy, SecondUsePolicy, TinyLfuPolicy
from kvbm.pool import BlockPool
from kvbm.testing.fake_engine import EngineShape, prompt_of
from kvbm.types import HashArray

PAGE = 4096  # that a block of these tests takes on disk
PROMPT = prompt_of(24, 4)  # four blocks and a token


def told(**more: Any) -> ShardDescription:
    kept: dict[str, Any] = {"num_blocks": {"host": 2, "disk": 40, "remote": 9}, "block_nbytes": 64}
    empty: dict[str, Any] = {"recording": [], "keyed": [], "inventories": {}}
    return ShardDescription(**{**kept, **empty, **more})


@contextmanager
def group_of(*shards: ShardDescription, backend: Backend, **settings: dict[str, Any]) -> Iterator[Group]:
    group = make_group(shards or [told()], index=0, settings=settings, backend=backend)
    yield group
    group.planner.close(0.0)


def policies_of(group: Group) -> list[OffloadPolicy]:
    return [route._policy for route in group.planner._routes]


def num_held(pool: BlockPool) -> int:
    return pool.total_blocks - pool.status().free


@contextmanager
def engine_of(backend: Backend, folder: Path, shape: EngineShape, **settings: dict[str, Any]) -> Iterator[Any]:
    """Give schedules of the fake engine on our connector with a slab of 16 blocks."""
    settings["disk"] = {"path": str(folder), "num_blocks": 16, **settings.get("disk", {})}
    with kvbm_connector(backend):
        schedules = KvbmSchedules(shape, num_host=12, num_disk=0, settings=settings)
        yield schedules
        schedules.engine.close()


def serve(schedules: KvbmSchedules, request_id: str) -> None:
    schedules.engine.forget_prefixes()
    schedules.engine.add(request_id, PROMPT)
    schedules.end()


# -- limits ---------------------------------------------------------------------------------------------------------


def test_without_settings_nothing_is_other_than_the_planners_own(backend: Backend) -> None:
    with group_of(backend=backend) as group:
        assert group.planner.limits == Limits()
        assert [type(policy) for policy in policies_of(group)] == [AlwaysPolicy, AlwaysPolicy]
        assert group.planner._expiry.next_look() is None


def test_limits_of_a_user_are_the_planners_of_every_group(backend: Backend, tmp_path: Path) -> None:
    offload = {"queue_blocks": 11, "job_blocks": 3, "route_jobs": 5, "in_flight_share": 0.5}
    offload |= {"lineage_blocks": 77, "touch_calls": 9}
    shape = EngineShape(windows=(0, 6))
    settings: dict[str, Any] = {"offload": offload, "runtime": {"offload_timeout_s": 7.0}}
    with engine_of(backend, tmp_path, shape, **settings) as schedules:
        limits = [group.planner.limits for group in schedules.half._groups]
        assert limits == [Limits(**offload, offload_timeout_s=7.0)] * 2


def test_limits_of_a_store_are_the_planners(backend: Backend) -> None:
    limits: dict[str, Any] = {"probe_blocks": 3, "absent_s": 1.0, "known_s": 2.0, "away_s": 3.0}
    with group_of(told(keyed=["remote"]), backend=backend, remote={"url": "memory://", **limits}) as group:
        assert group.planner.limits == Limits(**limits)
        (presence,) = group.planner.presences
        assert presence._limits is group.planner.limits


def test_sizes_are_what_the_workers_told(backend: Backend) -> None:
    with group_of(backend=backend, host={"size": 1}, disk={"num_blocks": 1, "path": "/x"}) as group:
        assert [pool.total_blocks for pool in group.planner.pools] == [2, 40, 9]


def test_impossible_settings_are_refused_by_their_names(backend: Backend) -> None:
    with pytest.raises(ConfigError, match=r"offload\.job_blocks is 0, give 1 or more"):
        make_group([told()], index=0, settings={"offload": {"job_blocks": 0}}, backend=backend)


# -- what goes down -------------------------------------------------------------------------------------------------


def test_each_tier_has_the_policy_that_its_section_or_all_name(backend: Backend) -> None:
    offload = {"policy": "second_use", "use_count_blocks": 5}
    with group_of(backend=backend, offload=offload, disk={"offload_policy": "tinylfu"}) as group:
        first, second = policies_of(group)
        assert isinstance(first, TinyLfuPolicy)
        assert first.nbytes == TinyLfuPolicy(40).nbytes
        assert isinstance(second, SecondUsePolicy)
        assert second._max_blocks == 5


def test_only_what_is_used_twice_goes_to_disk(backend: Backend, tmp_path: Path) -> None:
    shape = EngineShape(num_blocks=24)
    with engine_of(backend, tmp_path, shape, offload={"policy": "second_use"}) as schedules:
        host, disk = schedules.pools
        serve(schedules, "a")
        assert (num_held(host), num_held(disk)) == (5, 0)
        serve(schedules, "b")
        assert num_held(disk) == 4, "what the second request has found"


@pytest.mark.parametrize(
    ("shape", "num_parts"),
    [
        (EngineShape(), 1),
        (EngineShape(windows=(0, 6), num_ranks=2), 4),
        (EngineShape(num_ranks=2, has_mla=True), 1),
    ],
    ids=["one", "two groups on two ranks", "one copy for two ranks"],
)
def test_groups_and_ranks_share_one_write_budget(
    backend: Backend, tmp_path: Path, shape: EngineShape, num_parts: int
) -> None:
    budget = 24 * 12 * PAGE  # a day; an hour's share may go at once
    with engine_of(backend, tmp_path, shape, disk={"write_budget": budget}) as schedules:
        assert len(schedules.half._groups) == shape.num_groups
        for group in schedules.half._groups:
            (policy,) = policies_of(group)
            assert policy.afford(100) == 12 // num_parts


def test_a_budget_is_spent_at_the_rank_where_a_block_takes_most(backend: Backend) -> None:
    shards = [told(slot_nbytes={"disk": PAGE}), told(slot_nbytes={"disk": 2 * PAGE})]
    disk = {"path": "/x", "write_budget": 24 * 12 * PAGE}
    with group_of(*shards, backend=backend, disk=disk) as group:
        assert policies_of(group)[0].afford(100) == 6
    with group_of(backend=backend, disk=disk) as group:
        assert policies_of(group)[0].afford(10**6) == 12 * PAGE // 64, "of who did not say"


# -- what leaves ----------------------------------------------------------------------------------------------------


def test_each_tier_lets_go_of_blocks_when_its_own_time_is_over(backend: Backend, tmp_path: Path) -> None:
    shape = EngineShape(num_blocks=24)
    settings: dict[str, Any] = {"host": {"ttl": "8s"}, "disk": {"ttl": "1 min"}}
    with engine_of(backend, tmp_path, shape, **settings) as schedules:
        host, disk = schedules.pools
        serve(schedules, "a")
        for num_s, held in ((7, (5, 5)), (3, (0, 5)), (44, (0, 5)), (12, (0, 0))):
            schedules.pass_time(num_s * 16)
            schedules.engine.add(f"after {num_s} s", [1])  # an engine without requests makes no steps
            schedules.end()
            assert (num_held(host), num_held(disk)) == held, f"{num_s} s later"


@pytest.mark.parametrize(("eviction", "evicted"), [("lru", 2), ("fifo", 1)])
def test_each_tier_evicts_as_its_section_says(backend: Backend, eviction: str, evicted: int) -> None:
    def leaves_first(pool: BlockPool) -> int:
        names: HashArray = np.array([[1, 7], [2, 7]], dtype=np.uint64)
        for name in names:
            pool.register_blocks(pool.allocate_blocks(1).complete(name[None])).release()
        pool.touch_blocks(names[:1])
        pool.allocate_blocks(1).release()
        (place,) = (pool.lookup(names) < 0).nonzero()
        return int(place[0]) + 1

    two = told(num_blocks={"host": 2, "disk": 2, "remote": 2})
    with group_of(two, backend=backend, disk={"eviction": eviction}) as group:
        assert [leaves_first(pool) for pool in group.planner.pools] == [2, evicted, 2]
