"""Our connector in the fake engine: its copies wait until they are told to go on, its clock stands still."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from kvbm._backend import Backend
from kvbm.engines import arrange, judge, shard, worker
from kvbm.engines.speed import PrefillSpeed
from kvbm.jobs import CopyJob, Outcome
from kvbm.layout import BlockLayout
from kvbm.planner import Planner, emit
from kvbm.storage import HostStorage, Storage
from kvbm.testing.channels import SteppedChannel, SteppedClock
from kvbm.testing.fake_engine import ConnectorSchedules, EngineShape, vllm_stand_ins
from kvbm.testing.faults import FaultPlan, FaultyStorage
from kvbm.types import Tier

_GARBAGE = 0x77
_STEP_S = 0.01
_make_storages = shard.make_storages


class Stepping:
    """A condition on which nobody waits: the copies that are waited for are made instead."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        while not predicate():
            self._core._lock.release()
            try:
                waiting = [channel for channel in self._core._channels if channel.waiting]
                assert waiting, "it waits for a copy that was never begun"
                waiting[0].step()
            finally:
                self._core._lock.acquire()
        return True

    def notify_all(self) -> None:
        pass


class FixedSpeed(PrefillSpeed):
    """A speed that the steps of an engine without a model do not change."""

    def observe(self, num_tokens: int, seconds: float) -> None:
        self.step_s = _STEP_S


class KvbmSchedules(ConnectorSchedules):
    """Schedules on `KvbmConnector`, within `kvbm_connector`.

    Parameters
    ----------
    shape : EngineShape
    num_host, num_disk : int
        Blocks of the tiers, for each group and rank.
    loads : {'async', 'sync'}
    tokens_per_s : float, optional
        What the connector takes for the speed of computing, so that it weighs and judges loads; None: it loads whatever
        is there.
    settings : mapping, optional
        Sections of the configuration, key by key in place of the site's own.
    """

    timeout_s = 0.0

    def __init__(
        self,
        shape: EngineShape,
        *,
        num_host: int = 6,
        num_disk: int = 10,
        loads: str = "async",
        tokens_per_s: float | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        _clock.now = 1000.0
        block_nbytes = 2 * shape.num_layers * shape.num_heads * shape.block_tokens * shape.head_words
        _disk_blocks[0] = num_disk
        _speed.tokens_per_s, _speed.step_s = tokens_per_s, 0.0
        sections: dict[str, dict[str, Any]] = {
            "host": {"size": num_host * block_nbytes * shape.num_groups * shape.num_ranks},
            "runtime": {"copy_threads": 1},
            "offload": {"staging_blocks": 2, "job_blocks": 2, "in_flight_share": 1.0},
        }
        for name, section in (settings or {}).items():
            sections[name] = {**sections.get(name, {}), **section}
        own = {"loads": loads, "always_load": tokens_per_s is None, "explain": False}
        super().__init__(shape, extra={**sections, **own})
        self.cores = [half._worker._core for half in self.engine.worker_halves]
        for core in self.cores:
            core._has_ended = Stepping(core)
        self.half = self.engine.scheduler_half._scheduler
        self.pools = [pool for group in self.half._groups for pool in group.planner.pools]

    def make_connector(self, vllm_config: Any, role: str, kv_cache_config: Any) -> Any:
        base = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"]
        kind: Any = sys.modules["kvbm.engines.vllm"].KvbmConnector
        return kind(vllm_config, base.KVConnectorRole[role], kv_cache_config)

    # -- copies ------------------------------------------------------------------------------------------------

    def channel(self, number: int) -> SteppedChannel | None:
        waiting = [channel for core in self.cores for channel in core._channels if channel.waiting]
        return waiting[number % len(waiting)] if waiting else None

    def go_on(self, number: int) -> None:
        channel = self.channel(number)
        if channel is not None:
            channel.step(number // 2 % len(channel.waiting))

    def let_all_end(self) -> None:
        while (channel := self.channel(0)) is not None:
            channel.step_all()
        _clock.advance(0.06)

    def fail(self, number: int) -> None:
        channel = self.channel(number)
        if channel is None:
            return
        index = number // 3 % len(channel.waiting)
        job = channel.waiting[index]
        if isinstance(job, CopyJob) and number % 2:
            storage = self.storages(channel)[job.destination]
            garbage = np.full((len(job.hashes), storage.layout.block_nbytes), _GARBAGE, dtype=np.uint8)
            storage.write(job.destination_ids, garbage)
        channel.answer(index, (Outcome.FAILED, Outcome.CORRUPT, Outcome.LATE)[number % 3])

    def storages(self, channel: SteppedChannel) -> dict[Tier, Storage]:
        for half, core in zip(self.engine.worker_halves, self.cores, strict=True):
            if channel in core._channels:
                storages: dict[Tier, Storage] = half._worker._shards[core._channels.index(channel)].storages
                return storages
        raise AssertionError("a channel of some rank")

    # -- what is kept ------------------------------------------------------------------------------------------

    def spoil(self, number: int) -> None:
        half = self.engine.worker_halves[number % len(self.cores)]
        shards = half._worker._shards
        below: list[Any] = list(shards[number // 2 % len(shards)].storages.values())[1:]
        storage = below[number // 4 % len(below)]
        memory = getattr(storage, "storage", storage).buffers[0]
        if not memory.flags.writeable:  # rank 0's, as this one sees it
            memory = (
                self.engine.worker_halves[0]._worker._shards[number // 2 % len(shards)].storages[Tier.HOST].buffers[0]
            )
        memory[number * 131 % memory.size] ^= 1 << number % 8

    def evict(self, number: int) -> None:
        pool = self.pools[number % len(self.pools)]
        blocks = pool.try_allocate_blocks(min(pool.available_blocks, 1 + number // 4 % 8))
        if blocks is not None:
            blocks.release()

    def pass_time(self, number: int) -> None:
        _clock.advance(number / 16)

    def check(self) -> None:
        _clock.advance(0.03)
        for pool in self.pools:
            pool.check()

    def check_idle(self) -> None:
        assert {} == self.half._requests == self.half._asked == self.half._slots == self.half._due
        assert self.half._core.num_requests == 0, self.half._core._requests
        for pool in self.pools:
            status = pool.status()
            assert (status.active, status.mutable, status.complete) == (0, 0, 0), f"held: {status}"
        for core in self.cores:
            assert not core.num_open


_clock = SteppedClock()
_speed = FixedSpeed()
_disk_blocks = [0]


def _with_disk(config: Any, **more: Any) -> dict[Tier, Storage]:
    """Make the storages, and beside them what stands in for a disk: memory without addresses."""
    storages = _make_storages(config, **more)
    if not _disk_blocks[0]:
        return storages
    layout = BlockLayout.fully_contiguous(
        num_blocks=_disk_blocks[0], num_layers=config.model.num_layers, outer_dim=1, block_size=1,
        inner_dim=config.model.inner_dim, dtype="uint8",
    )  # fmt: skip
    storages[Tier.DISK] = FaultyStorage(HostStorage(layout, backend=more["backend"], num_threads=1), FaultPlan())
    return storages


@contextmanager
def kvbm_connector(backend: Backend) -> Iterator[None]:
    """Let `KvbmSchedules` run: with vLLM's base classes or stand-ins, one twin, and copies that wait."""
    with vllm_stand_ins(forget=["kvbm.engines.vllm"]):
        from kvbm.engines.vllm import scheduler as half  # they meet the stand-ins
        from kvbm.engines.vllm import worker as other_half

        with (
            mock.patch.object(half, "default_backend", return_value=backend),
            mock.patch.object(other_half, "default_backend", return_value=backend),
            mock.patch.object(half, "SchedulerCore", partial(half.SchedulerCore, clock=_clock)),
            mock.patch.object(judge, "PrefillSpeed", return_value=_speed),
            mock.patch.object(arrange, "Planner", partial(Planner, clock=_clock)),
            mock.patch.object(worker, "LocalChannel", lambda execute, **more: SteppedChannel(execute)),
            mock.patch.object(shard, "make_storages", _with_disk),
            mock.patch.object(emit, "_PAUSE_S", 0.0),
        ):
            yield
