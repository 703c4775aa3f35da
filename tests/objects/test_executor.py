"""Blocks on their way to an object store and back, by jobs, checksums compared (CONFORMANCE 27, 37)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from object_site import PATIENCE_S, Blocks, FakeClient, MakeStorage

from kvbm._backend import Backend
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, JobResult, Outcome, ProbeJob
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage
from kvbm.testing.proxy import FaultyProxy, ProxyFault
from kvbm.types import Tier

DIMENSIONS: dict[str, Any] = {"num_layers": 3, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"}
REMOTE = BlockLayout.fully_contiguous(num_blocks=8, **DIMENSIONS)
HOSTS = {
    "contiguous": BlockLayout.fully_contiguous(num_blocks=8, **DIMENSIONS),
    "by layer": BlockLayout.layer_separate(num_blocks=8, block_first=True, **DIMENSIONS),
}


class Site:
    """A host tier and an object store."""

    def __init__(self, remote: Any, layout: BlockLayout, backend: Backend) -> None:
        self.remote = remote
        self.host = HostStorage(layout, backend=backend)
        self.executor = Executor({Tier.HOST: self.host, Tier.REMOTE: remote}, staging_blocks=4, backend=backend)
        self.blocks = Blocks(8, layout)
        self.host.write(self.blocks.ids, self.blocks.data)

    def copy(
        self, source: Tier, destination: Tier, source_ids: list[int], ids: list[int], names: list[int]
    ) -> JobResult:
        return self.executor.execute(
            CopyJob(
                job_id=1,
                source=source,
                destination=destination,
                source_ids=np.array(source_ids, dtype=np.int32),
                destination_ids=np.array(ids, dtype=np.int32),
                hashes=self.blocks.hashes[names],
                is_urgent=source is Tier.REMOTE,
            )
        )


@pytest.fixture
def make_site(backend: Backend) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(remote: Any, kind: str = "contiguous") -> Site:
        sites.append(Site(remote, HOSTS[kind], backend))
        return sites[-1]

    yield make
    for site in sites:
        site.executor.close()
        site.host.close()


@pytest.mark.parametrize("kind", list(HOSTS))
@pytest.mark.parametrize("part_nbytes", [1 << 20, 100])
def test_blocks_go_up_and_come_back_under_other_rows(
    make_any: MakeStorage, make_site: Callable[..., Site], kind: str, part_nbytes: int
) -> None:
    site = make_site(make_any(layout=REMOTE, part_nbytes=part_nbytes), kind)
    names = [6, 1, 3, 0, 7]
    result = site.copy(Tier.HOST, Tier.REMOTE, names, [0, 1, 2, 3, 4], names)
    assert result.outcomes.tolist() == [Outcome.OK] * 5, result.reason
    site.host.write(site.blocks.ids, ~site.blocks.data)
    asked = [7, 2, 6, 3]
    result = site.copy(Tier.REMOTE, Tier.HOST, [5, 6, 7, 0], [1, 2, 3, 4], asked)
    assert result.outcomes.tolist() == [Outcome.OK, Outcome.FAILED, Outcome.OK, Outcome.OK], result.reason
    assert np.array_equal(site.host.read(np.array([1, 3, 4])), site.blocks.data[[7, 6, 3]])
    others = np.array([0, 2, 5, 6, 7])
    assert np.array_equal(site.host.read(others), ~site.blocks.data[others])


def test_a_flipped_bit_on_the_way_is_caught(
    make_s3: MakeStorage, proxy: FaultyProxy, make_site: Callable[..., Site]
) -> None:
    site = make_site(make_s3(layout=REMOTE, port=proxy.port))
    everything = list(range(8))
    assert (site.copy(Tier.HOST, Tier.REMOTE, everything, everything, everything).outcomes == Outcome.OK).all()
    proxy.inject(ProxyFault.FLIPPED, num_requests=3)
    site.host.write(site.blocks.ids, ~site.blocks.data)
    outcomes = site.copy(Tier.REMOTE, Tier.HOST, everything, everything, everything).outcomes
    assert sorted(outcomes.tolist()) == [Outcome.OK] * 5 + [Outcome.CORRUPT] * 3
    good = np.flatnonzero(outcomes == Outcome.OK)
    assert np.array_equal(site.host.read(good), site.blocks.data[good])


def test_books_are_kept_by_jobs(make_any: MakeStorage, make_site: Callable[..., Site]) -> None:
    site = make_site(make_any(layout=REMOTE))
    site.copy(Tier.HOST, Tier.REMOTE, [0, 1, 2], [0, 1, 2], [0, 1, 2])

    def probe() -> list[int]:
        job = ProbeJob(job_id=1, tier=Tier.REMOTE, ids=np.full(4, -1, dtype=np.int32), hashes=site.blocks.hashes[:4])
        outcomes: list[int] = site.executor.execute(job).outcomes.tolist()
        return outcomes

    ok, failed = Outcome.OK, Outcome.FAILED
    assert probe() == [ok, ok, ok, failed]
    found = site.executor.execute(InventoryJob(job_id=2, tier=Tier.REMOTE))
    assert found.hashes is not None
    assert sorted(found.hashes.tolist()) == sorted(site.blocks.hashes[:3].tolist())
    forget = ForgetJob(job_id=3, tier=Tier.REMOTE, hashes=site.blocks.hashes[1:2])
    assert site.executor.execute(forget).outcomes.tolist() == [ok]
    assert probe() == [ok, failed, ok, failed]
    site.executor.execute(ForgetJob(job_id=4, tier=Tier.REMOTE, hashes=site.blocks.hashes[:0], is_all=True))
    assert probe() == [failed] * 4


def test_an_answer_after_the_job_ended_reaches_nobody(
    make_storage: MakeStorage, make_site: Callable[..., Site]
) -> None:
    client = FakeClient()
    remote = make_storage(layout=REMOTE, client=client)
    site = make_site(remote)
    site.copy(Tier.HOST, Tier.REMOTE, [0], [0], [0])
    client.is_gated = True
    moments = iter([0.0, 0.0])
    site.executor._clock = lambda: next(moments, 10.0)
    job = CopyJob(
        job_id=1,
        source=Tier.REMOTE,
        destination=Tier.HOST,
        source_ids=site.blocks.ids[:1],
        destination_ids=site.blocks.ids[1:2],
        hashes=site.blocks.hashes[:1],
        is_urgent=True,
    )
    results: list[JobResult] = []
    thread = threading.Thread(target=lambda: results.append(site.executor.execute(job, 5.0)))
    thread.start()
    thread.join(PATIENCE_S)
    assert results[0].outcomes.tolist() == [Outcome.LATE]
    client.release()
    remote.close(PATIENCE_S)
    assert np.array_equal(site.host.read(site.blocks.ids), site.blocks.data)
