"""One host tier for all ranks: where the bytes lie, who moves them, and what a rank that fails does to it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from connector_site import KvbmSchedules, kvbm_connector
from core_site import BLOCK_TOKENS, CoreSite
from worker_site import NUM_LAYERS, PATIENCE_S, content, ids, layers_on, names_of

from kvbm._backend import Backend
from kvbm.engines import shard, shared_host
from kvbm.engines.arrange import make_group
from kvbm.engines.messages import LoadOrder, StepOrders, decode_report, encode_orders
from kvbm.engines.shard import Shard, ShardDescription
from kvbm.engines.shared_host import HostShare
from kvbm.engines.shared_memory import Giver, SharedMemory, name_of
from kvbm.engines.worker import WorkerCore
from kvbm.errors import ConfigError, StorageError
from kvbm.jobs import CopyJob, InventoryJob, Job, Outcome, encode
from kvbm.jobs.messages import decode_result
from kvbm.testing.fake_engine import EngineShape, random_schedule
from kvbm.types import Tier

OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT
TIERS: dict[str, Any] = {"host": {"num_blocks": 8}}


def copy(job_id: int, source: Tier, destination: Tier, *seeds: int) -> CopyJob:
    slots = ids(*range(len(seeds)))
    return CopyJob(
        job_id=job_id, source=source, destination=destination, source_ids=slots, destination_ids=slots,
        hashes=names_of(*seeds),
    )  # fmt: skip


# -- two shards -----------------------------------------------------------------------------------------------------


class Pair:
    """Rank 0 and its follower, in one process."""

    def __init__(self, backend: Backend, settings: dict[str, Any]) -> None:
        name = name_of("pair", os.getpid(), os.urandom(8))
        self.shards = [
            Shard(
                layers_on(None), settings, fingerprint="m", backend=backend, share=HostShare(name, rank, 2, PATIENCE_S)
            )
            for rank in range(2)
        ]
        self.cores = [
            WorkerCore([one.executor], rank=rank, following=[0] if one.is_follower else [])
            for rank, one in enumerate(self.shards)
        ]

    def write(self, slot: int, seed: int) -> None:
        """Compute a block on both ranks."""
        for one in self.shards:
            one.storages[Tier.DEVICE].write(ids(slot), content(seed)[None])

    def step(self, *jobs: Job, loads: list[LoadOrder] | None = None) -> list[dict[int, list[int]]]:
        """Run a step on both ranks; give what each answers."""
        orders = encode_orders(StepOrders(jobs=[[encode(job) for job in jobs]], loads=loads or []))
        told = []
        for core in self.cores:
            core.begin(orders)
            core.begin_sync_loads()
            core.after_forward()
            with core._has_ended:
                assert core._has_ended.wait_for(lambda core=core: not core._open, PATIENCE_S)
            (group,) = decode_report(core.take().report).results
            told.append({one.job_id: one.outcomes.tolist() for one in map(decode_result, group)})
        return told

    def seen(self, rank: int, slot: int, seed: int) -> bool:
        (data,) = self.shards[rank].storages[Tier.DEVICE].read(ids(slot))
        return np.array_equal(data, content(seed))

    def close(self) -> None:
        for core, one in zip(self.cores, self.shards, strict=True):
            assert core.close(PATIENCE_S)
            one.close()


@pytest.fixture
def make_pair(backend: Backend) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(settings: dict[str, Any] | None = None) -> Pair:
        pairs.append(Pair(backend, settings or TIERS))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("layout", ["fully_contiguous", "layer_separate_outer_first"])
def test_rank_0_saves_once_and_both_load_the_same_bytes(make_pair: Callable[..., Pair], layout: str) -> None:
    pair = make_pair({"host": {"num_blocks": 8, "layout": layout}})
    leading, following = (one.storages[Tier.HOST] for one in pair.shards)
    assert leading.layout.num_buffers == (1 if layout == "fully_contiguous" else NUM_LAYERS)
    pair.write(0, 7)
    pair.shards[1].storages[Tier.DEVICE].write(ids(0), content(8)[None])  # what a follower has is not kept
    assert pair.step(copy(1, Tier.DEVICE, Tier.HOST, 7)) == [{1: [OK]}, {1: [OK]}]
    assert np.array_equal(following.read(ids(0))[0], content(7))
    assert following.has_checksum[0]
    assert following.checksums[0] == leading.checksums[0] != 0
    pair.write(0, 9)
    assert pair.step(copy(2, Tier.HOST, Tier.DEVICE, 7)) == [{2: [OK]}, {2: [OK]}]
    assert pair.seen(0, 0, 7)
    assert pair.seen(1, 0, 7)


def test_a_flipped_bit_is_seen_by_both(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.write(0, 7)
    pair.step(copy(1, Tier.DEVICE, Tier.HOST, 7))
    pair.shards[0].storages[Tier.HOST].buffers[0][5] ^= 1  # type: ignore[attr-defined]
    assert pair.step(copy(2, Tier.HOST, Tier.DEVICE, 7)) == [{2: [CORRUPT]}, {2: [CORRUPT]}]


def test_a_follower_writes_nothing_and_runs_no_job_of_the_tiers_below(
    make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    pair = make_pair({**TIERS, "disk": {"num_blocks": 8, "path": str(tmp_path)}})
    pair.write(0, 7)
    pair.step(copy(1, Tier.DEVICE, Tier.HOST, 7))
    told = pair.step(copy(2, Tier.HOST, Tier.DISK, 7), InventoryJob(job_id=3, tier=Tier.DISK))
    assert [sorted(one) for one in told] == [[2, 3], []]
    assert {file.name.partition(".")[0] for file in tmp_path.iterdir()} == {"rank0"}
    host: Any = pair.shards[1].storages[Tier.HOST]
    with pytest.raises(StorageError, match="read-only"):
        host.write(ids(0), content(1)[None])
    for array in (host.buffers[0], host.checksums, host.has_checksum):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    assert list(pair.shards[1].storages) == [Tier.DEVICE, Tier.HOST]


def test_a_rank_that_read_a_bad_block_vouches_for_no_save_of_that_step(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.write(0, 7)
    pair.step(copy(1, Tier.DEVICE, Tier.HOST, 7))
    load = copy(2, Tier.HOST, Tier.DEVICE, 7)
    follower = pair.shards[1].storages[Tier.HOST]
    follower.checksums = follower.checksums.copy()
    follower.checksums[0] ^= np.uint64(1)  # it sees another byte than rank 0
    order = LoadOrder(request_id="r", job_ids=[(0, 2)], is_sync=True)
    save = CopyJob(
        job_id=3, source=Tier.DEVICE, destination=Tier.HOST, source_ids=ids(1), destination_ids=ids(1),
        hashes=names_of(8),
    )  # fmt: skip
    assert pair.step(load, save, loads=[order]) == [{2: [OK], 3: [OK]}, {2: [CORRUPT], 3: [FAILED]}]


def test_both_tell_the_scheduler_of_rank_0s_tiers_and_one_pool_comes_of_it(
    make_pair: Callable[..., Pair], backend: Backend, tmp_path: Path
) -> None:
    pair = make_pair({**TIERS, "disk": {"num_blocks": 16, "path": str(tmp_path)}})
    told = [msgspec.msgpack.encode(one.describe()) for one in pair.shards]
    first, second = (msgspec.msgpack.decode(one, type=ShardDescription) for one in told)
    assert first.is_shared
    assert list(first.inventories) == ["disk"]
    assert second == msgspec.structs.replace(first, inventories={})
    assert first.num_blocks == {"host": 8, "disk": 16}
    group = make_group([first, second], index=0, backend=backend)
    assert len(group.channels.channels) == 1
    assert not group.channels.has_jobs
    group.planner.close(0.0)
    alone = msgspec.structs.replace(second, is_shared=False)
    with pytest.raises(ConfigError, match=r"ranks \[0\] of 2 share one host tier"):
        make_group([first, alone], index=0, backend=backend)


@pytest.mark.parametrize(
    ("settings", "version", "problem"),
    [
        ({"host": {"num_blocks": 9}}, 1, "rank 1 has blocks of 9 blocks"),
        (TIERS, 2, "memory of version 2, need 1"),
    ],
)
def test_a_follower_of_other_settings_or_another_version_is_refused(
    backend: Backend, settings: dict[str, Any], version: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = name_of("refused", os.getpid(), os.urandom(8))
    monkeypatch.setattr(shared_host, "_VERSION", version)
    leading = Shard(layers_on(None), TIERS, fingerprint="m", backend=backend, share=HostShare(name, 0, 2))
    monkeypatch.setattr(shared_host, "_VERSION", 1)
    with pytest.raises(ConfigError, match=problem):
        Shard(layers_on(None), settings, fingerprint="m", backend=backend, share=HostShare(name, 1, 2))
    leading.close()


def test_who_waits_hears_at_once_that_rank_0_cannot_open_its_tiers(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = name_of("failing", os.getpid(), os.urandom(8))

    def fail(*_: Any, **__: Any) -> Any:
        waiting.connect(b"\0" + name.encode())
        raise StorageError("no disk")

    monkeypatch.setattr(shard, "make_storages", fail)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
        with pytest.raises(StorageError, match="no disk"):
            Shard(layers_on(None), TIERS, fingerprint="m", backend=backend, share=HostShare(name, 0, 2))
        waiting.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(1) == b""
    with pytest.raises(StorageError, match="rank 1 waited 0 s for the host memory of rank 0"):
        Shard(layers_on(None), TIERS, fingerprint="m", backend=backend, share=HostShare(name, 1, 2, 0.0))


def test_rank_0_that_closes_before_anybody_asked_leaves_no_thread_and_no_name(backend: Backend) -> None:
    name = name_of("alone", os.getpid(), os.urandom(8))
    threads = set(threading.enumerate())
    alone = Shard(layers_on(None), TIERS, fingerprint="m", backend=backend, share=HostShare(name, 0, 2))
    assert [one.name for one in threading.enumerate() if one not in threads] == ["kvbm-giver"]
    alone.close()
    assert set(threading.enumerate()) <= threads
    Giver(name, num_takers=1).close()


def test_what_lies_on_disk_is_found_by_all_after_a_restart(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    settings = {**TIERS, "disk": {"num_blocks": 8, "path": str(tmp_path)}}
    pair = make_pair(settings)
    pair.write(0, 7)
    pair.step(copy(1, Tier.DEVICE, Tier.HOST, 7))
    pair.step(copy(2, Tier.HOST, Tier.DISK, 7))
    pair.close()
    pair = make_pair(settings)
    inventory = decode_result(pair.shards[0].describe().inventories["disk"])
    assert inventory.hashes is not None
    assert inventory.hashes.tolist() == names_of(7).tolist()
    assert pair.step(copy(3, Tier.DISK, Tier.HOST, 7)) == [{3: [OK]}, {}]
    assert pair.step(copy(4, Tier.HOST, Tier.DEVICE, 7)) == [{4: [OK]}, {4: [OK]}]
    assert pair.seen(1, 0, 7)


def test_what_is_given_with_other_words_or_another_size_is_refused(backend: Backend) -> None:
    memory = SharedMemory.create(4096)
    for message, kind, problem in (
        (b"\xc1", ConfigError, "not of this version"),
        (b"\x80", ConfigError, "not of this version"),
    ):
        name = name_of("words", os.getpid(), os.urandom(8))
        giver = Giver(name, num_takers=1)
        giver.give(memory, message)
        with pytest.raises(kind, match=problem):
            Shard(layers_on(None), TIERS, fingerprint="m", backend=backend, share=HostShare(name, 1, 2))
        giver.close()
    memory.close()


# -- the whole core -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(backend: Backend, tmp_path: Path) -> Iterator[CoreSite]:
    made = CoreSite(backend, tmp_path, num_ranks=2, is_shared=True)
    yield made
    made.close()


def test_one_copy_serves_both_ranks_from_memory_and_from_disk(site: CoreSite) -> None:
    prompt = [9000 + i for i in range(5 * BLOCK_TOKENS + 1)]
    site.add("a", prompt)
    site.run()
    site.add("b", prompt)
    site.run()
    assert site.num_loaded == 5
    site.pools[0].reset()
    site.add("c", prompt)
    site.run()
    assert site.num_loaded == 10
    site.calm()


def test_a_block_that_one_rank_finds_spoilt_is_computed_by_both_and_counted_once(site: CoreSite) -> None:
    prompt = [7000 + i for i in range(4 * BLOCK_TOKENS + 1)]
    site.add("a", prompt)
    site.run()
    site.pools[1].reset()
    follower = site.ranks[1][Tier.HOST]
    follower.checksums = follower.checksums.copy()
    follower.checksums[2] ^= np.uint64(1)
    site.add("b", prompt)
    site.run()
    assert site.num_lost
    assert site.planner.statistics().mismatches["host"] == 1
    site.calm()


@pytest.mark.parametrize("loads", ["async", "sync"])
def test_schedules_of_an_mla_engine_end_well(backend: Backend, loads: str) -> None:
    shapes = [
        EngineShape(num_blocks=10, num_ranks=2, has_mla=True, has_prefix_cache=False, budget_tokens=6),
        EngineShape(num_blocks=16, num_ranks=2, has_mla=True, windows=(0, 6)),
        EngineShape(num_blocks=12, num_ranks=3, has_mla=True),
    ]
    num_loaded = 0
    with kvbm_connector(backend):
        for seed in range(9):
            schedules = KvbmSchedules(shapes[seed % len(shapes)], loads=loads)
            numbers = [len(group.channels.channels) for group in schedules.half._groups]
            assert numbers == ([1, 2] if len(numbers) == 2 else [1]), "a window's blocks are each rank's own"
            schedules.run(random_schedule(seed, 30))
            num_loaded += schedules.engine.num_loaded
    assert num_loaded > 50
