"""The same planner with its executors in other processes, over pipes: one rank, two that disagree, one that dies."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.blocks import ImmutableBlocks
from kvbm.jobs.pipe import PipeChannel
from kvbm.planner import Limits, Planner, PlannerThread
from kvbm.pool import BlockPool
from kvbm.replay.content import content_of
from kvbm.types import HashArray, SequenceHash, Tier

pytestmark = pytest.mark.timeout(300, method="thread")
PATIENCE_S = 120.0
NUM_BLOCKS = {Tier.DEVICE: 8, Tier.HOST: 16, Tier.DISK: 32}

# A rank: its memory are files that the test maps too, so that both look at the same bytes.
RANK = """
import numpy as np

from kvbm._backend import load_backend
from kvbm.executor import Executor
from kvbm.jobs.pipe import serve
from kvbm.layout import BlockLayout
from kvbm.storage import DeviceStorage, HostStorage
from kvbm.storage.disk import DiskStorage
from kvbm.types import Tier

DIMS = dict(num_layers=2, outer_dim=2, block_size=4, inner_dim=16, dtype="float16")


def layouts(num_blocks):
    return {tier: BlockLayout.fully_contiguous(num_blocks=n, **DIMS) for tier, n in num_blocks.items()}


def work(connection, folder, num_blocks, twin):
    backend = load_backend(twin)
    of = layouts(num_blocks)
    memory = {tier: np.memmap(folder / tier.value, dtype=np.uint8, mode="r+") for tier in (Tier.DEVICE, Tier.HOST)}
    storages = {
        Tier.DEVICE: DeviceStorage(of[Tier.DEVICE], buffers=[memory[Tier.DEVICE]], backend=backend),
        Tier.HOST: HostStorage(of[Tier.HOST], buffers=[memory[Tier.HOST]], backend=backend),
        Tier.DISK: DiskStorage(of[Tier.DISK], folder / "directory"),
    }
    executor = Executor(storages, backend=backend)
    serve(connection, executor.execute, is_small=executor.is_small, is_bounded=executor.is_bounded)
    executor.close()
    for storage in storages.values():
        storage.close()
"""


class Ranks:
    """Processes, the planner over them, and the memory of each, one row a block."""

    def __init__(self, num_ranks: int, folder: Path, backend: Backend, module: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.memory: list[dict[Tier, Any]] = []
        self.processes, channels = [], []
        for rank in range(num_ranks):
            home = folder / f"rank{rank}"
            home.mkdir()
            self.memory.append({})
            for tier in (Tier.DEVICE, Tier.HOST):
                layout = module.layouts(NUM_BLOCKS)[tier]
                np.zeros(layout.buffer_nbytes, dtype=np.uint8).tofile(home / tier.value)
                rows = np.memmap(home / tier.value, dtype=np.uint8, mode="r+")
                self.memory[rank][tier] = rows.reshape(layout.num_blocks, -1)
            ours, theirs = context.Pipe()
            arguments = (theirs, home, NUM_BLOCKS, backend.name)
            process = context.Process(target=module.work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            channels.append(PipeChannel(ours))
        self.pools = {tier: BlockPool(n, name=tier.value, tier=tier, backend=backend) for tier, n in NUM_BLOCKS.items()}
        self.planner = Planner(
            list(self.pools.values()), channels, limits=Limits(job_blocks=3, onboard_timeout_s=PATIENCE_S)
        )
        self.thread = PlannerThread(self.planner)
        self.top = self.pools[Tier.DEVICE]

    def keep(self, hashes: HashArray) -> None:
        """Compute blocks on every rank, register them and let them go down."""
        fresh = self.top.allocate_blocks(len(hashes), timeout=PATIENCE_S)
        for rank, memory in enumerate(self.memory):
            memory[Tier.DEVICE][fresh.block_ids] = self.content(hashes, rank)
        self.top.register_blocks(fresh.complete(hashes)).release()
        self.planner.flush(PATIENCE_S)

    def evict(self) -> None:
        """Fill the top tier with garbage."""
        with self.top.allocate_blocks(NUM_BLOCKS[Tier.DEVICE], timeout=PATIENCE_S) as blocks:
            for memory in self.memory:
                memory[Tier.DEVICE][blocks.block_ids] = 0xEE

    def onboard(self, hashes: HashArray) -> ImmutableBlocks:
        blocks: ImmutableBlocks = self.planner.onboard(self.planner.match(hashes)).result(PATIENCE_S)
        for rank, memory in enumerate(self.memory):
            assert np.array_equal(memory[Tier.DEVICE][blocks.block_ids], self.content(blocks.hashes, rank))
        assert np.array_equal(blocks.hashes, hashes[: len(blocks)])
        return blocks

    def content(self, hashes: HashArray, rank: int) -> Any:
        return content_of(hashes + np.uint64(rank), self.memory[rank][Tier.DEVICE].shape[1])

    def close(self) -> None:
        assert self.planner.close(PATIENCE_S)
        assert self.thread.stop(PATIENCE_S)
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None
        for pool in self.pools.values():
            pool.check()
            status = pool.status()
            assert (status.mutable, status.complete, status.active) == (0, 0, 0)


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a module that a spawned process can import too."""
    (tmp_path / "kvbm_test_rank.py").write_text(RANK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("kvbm_test_rank")
    sys.modules.pop("kvbm_test_rank")


def chain(start: int, num_blocks: int) -> HashArray:
    return np.array([[start + i, 5] for i in range(num_blocks)], dtype=np.uint64)


def test_a_planner_moves_blocks_of_an_executor_in_another_process(
    backend: Backend, tmp_path: Path, rank_module: Any
) -> None:
    before = set(threading.enumerate())
    ranks = Ranks(1, tmp_path, backend, rank_module)
    chains = [chain(100 * i, 7) for i in range(3)]
    for hashes in chains:
        ranks.keep(hashes)
    for hashes in chains:
        ranks.evict()
        blocks = ranks.onboard(hashes)
        assert len(blocks) == 7
        blocks.release()
    ranks.planner.flush(PATIENCE_S)
    ranks.planner.records.reset_pool(ranks.pools[Tier.HOST])
    ranks.evict()
    with ranks.onboard(chains[0]) as blocks:
        assert len(blocks) == 7, "all from disk"
    statistics = ranks.planner.statistics()
    assert statistics.hits["disk"] >= 7
    assert statistics.routes[Tier.DEVICE, Tier.HOST].blocks >= 21
    assert not statistics.mismatches
    ranks.close()
    assert set(threading.enumerate()) == before
    assert [process.exitcode for process in ranks.processes] == [0]


def test_a_block_that_is_bad_on_one_rank_is_bad_on_all(backend: Backend, tmp_path: Path, rank_module: Any) -> None:
    ranks = Ranks(2, tmp_path, backend, rank_module)
    hashes = chain(0, 6)
    ranks.keep(hashes)
    ranks.planner.records.reset_pool(ranks.pools[Tier.DISK])
    ranks.evict()
    bad = ranks.pools[Tier.HOST].lookup(hashes)[4]
    ranks.memory[1][Tier.HOST][bad, 17] ^= 4
    blocks = ranks.onboard(hashes)
    assert len(blocks) == 4, "the leading blocks that are good on every rank"
    assert ranks.pools[Tier.HOST].lookup(hashes).tolist()[4] == -1, "the bad one is gone on every rank"
    assert ranks.planner.statistics().mismatches == {"host": 1}
    fresh = ranks.top.allocate_blocks(2, timeout=PATIENCE_S)
    for rank, memory in enumerate(ranks.memory):
        memory[Tier.DEVICE][fresh.block_ids] = ranks.content(hashes[4:], rank)
    parent = SequenceHash(hashes[3].tobytes())
    (blocks + ranks.top.register_blocks(fresh.complete(hashes[4:], parent=parent))).release()
    ranks.planner.flush(PATIENCE_S)
    ranks.evict()
    with ranks.onboard(hashes) as blocks:
        assert len(blocks) == 6, "computed again and stored again"
    ranks.close()


def test_a_rank_that_dies_costs_the_lower_tiers_and_nothing_else(
    backend: Backend, tmp_path: Path, rank_module: Any
) -> None:
    ranks = Ranks(2, tmp_path, backend, rank_module)
    hashes = chain(0, 6)
    ranks.keep(hashes)
    ranks.evict()
    assert ranks.planner.lookup(hashes) == 6
    hit = ranks.planner.match(hashes)
    ranks.processes[1].kill()
    ranks.processes[1].join(PATIENCE_S)
    with ranks.planner.onboard(hit).result(PATIENCE_S) as blocks:
        assert len(blocks) in (0, 6), "what the dead rank had answered before counts, and nothing else"
        for rank, memory in enumerate(ranks.memory):
            assert np.array_equal(memory[Tier.DEVICE][blocks.block_ids], ranks.content(blocks.hashes, rank))
    other = chain(500, 3)
    ranks.keep(other)
    with ranks.onboard(other) as blocks:
        assert len(blocks) == 3, "the top tier is still there"
    ranks.evict()
    assert ranks.planner.lookup(other) == 0, "nothing is found below"
    assert ranks.planner.statistics().lost_executors == 1
    ranks.close()
