"""Golden blocks over memory in an engine's place: right bytes come back, and each kind of wrong one is found."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.engines.doctor.golden import GoldenResult, GoldenRun
from kvbm.engines.doctor.stand_in import StandInMemory
from kvbm.engines.shard import LayerMemory, Shard
from kvbm.engines.worker import WorkerCore
from kvbm.jobs import CopyJob, Job, JobResult
from kvbm.types import Tier


class Site:
    """A worker's half over memory in an engine's place, and the golden run through it."""

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        *,
        describe: Callable[[StandInMemory], list[LayerMemory]] = StandInMemory.layers,
        watch: Callable[[Site, Job, JobResult], None] = lambda site, job, result: None,
        before: Callable[[Job], None] = lambda job: None,
        offload: dict[str, Any] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.memory = StandInMemory()
        settings = {
            "host": {"num_blocks": 16},
            "disk": {"num_blocks": 16, "path": str(folder / "slabs")},
            "offload": offload or {},
        }
        self.shard = Shard(describe(self.memory), settings, fingerprint="test", backend=backend)
        site = self

        class Watched:
            """Runs jobs, and lets a test interfere."""

            def execute(self, job: Job, deadline: float | None = None) -> JobResult:
                before(job)
                result = site.shard.executor.execute(job, deadline)
                watch(site, job, result)
                return result

            def is_bounded(self, job: Job) -> bool:
                return site.shard.executor.is_bounded(job)

        self.core = WorkerCore([Watched()])
        more = {} if clock is None else {"clock": clock}
        self.run = GoldenRun(self.core, [self.shard.storages], [self.memory], timeout_s=20.0, **more)

    def results(self) -> dict[str, GoldenResult]:
        return {result.tier: result for result in self.run.run()}

    def close(self) -> None:
        assert self.core.close(60.0)
        self.shard.close(60.0)


@pytest.fixture
def site_of(backend: Backend, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def begin(**arguments: Any) -> Site:
        sites.append(Site(backend, tmp_path, **arguments))
        return sites[-1]

    yield begin
    for site in sites:
        site.close()


def test_golden_blocks_come_back_from_every_tier(site_of: Callable[..., Site]) -> None:
    results = site_of().results()
    assert [(tier, one.problem) for tier, one in results.items()] == [("host", ""), ("disk", ""), ("flip", "")]
    assert all(one.num_blocks == 8 and one.nbytes == 8 * 4 * (16 << 10) for one in results.values())


def test_a_layout_that_was_misread_is_found(site_of: Callable[..., Site]) -> None:
    def without_gap(memory: StandInMemory) -> list[LayerMemory]:
        return [
            LayerMemory(one.address, one.num_blocks, one.block_nbytes, one.block_nbytes, one.owner)
            for one in memory.layers()
        ]

    results = site_of(describe=without_gap).results()
    assert "wrong bytes" in results["host"].problem
    assert "wrong bytes" in results["disk"].problem


@pytest.mark.parametrize("slot", [19, 9], ids=["that was loaded", "beside"])
def test_one_wrong_byte_in_the_engines_memory_is_found(site_of: Callable[..., Site], slot: int) -> None:
    def spoil(site: Site, job: Job, result: JobResult) -> None:
        if isinstance(job, CopyJob) and job.destination is Tier.DEVICE:
            place = np.array([slot], dtype=np.int32)
            block = site.memory.read(place)
            block[0, 70] ^= 4
            site.memory.write(place, block)

    problem = site_of(watch=spoil).results()["host"].problem
    assert problem.startswith(f"1 wrong bytes, first in block {slot} at byte 70")
    assert ("that nothing was loaded into" in problem) == (slot == 9)


def test_a_load_that_does_nothing_is_found(site_of: Callable[..., Site]) -> None:
    def undo(site: Site, job: Job, result: JobResult) -> None:
        if isinstance(job, CopyJob) and job.destination is Tier.DEVICE:
            poison = np.full((len(job.destination_ids), site.memory.block_nbytes), 0xA5, dtype=np.uint8)
            site.memory.write(job.destination_ids, poison)

    assert "wrong bytes" in site_of(watch=undo).results()["disk"].problem


def test_a_byte_that_changes_on_the_disk_is_refused_with_words(site_of: Callable[..., Site], tmp_path: Path) -> None:
    def flip(site: Site, job: Job, result: JobResult) -> None:
        if isinstance(job, CopyJob) and job.destination is Tier.DISK:
            with (tmp_path / "slabs" / "rank0.blocks").open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]))

    results = site_of(watch=flip).results()
    assert "disk to host: 1 of 8 blocks corrupt (checksum mismatch)" in results["disk"].problem
    assert results["host"].problem == ""


def test_checksums_that_are_off_are_found(site_of: Callable[..., Site]) -> None:
    results = site_of(offload={"verify_checksums": False}).results()
    assert results["host"].problem == ""
    assert "offload.verify_checksums is off" in results["flip"].problem


def test_a_copy_that_hangs_is_given_up(site_of: Callable[..., Site]) -> None:
    gate, has_begun, now = threading.Event(), threading.Event(), itertools.count()

    def wait(job: Job) -> None:
        if isinstance(job, CopyJob) and job.source is Tier.DISK:
            has_begun.set()
            gate.wait(60.0)

    site = site_of(before=wait, clock=lambda: float(next(now)) if has_begun.is_set() else 0.0)
    try:
        problem = site.results()["disk"].problem
    finally:
        gate.set()
    assert problem.startswith("TransferTimeout: CopyJob was not answered in 40 s")
