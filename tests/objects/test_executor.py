"""Blocks on their way to an object store and back, by jobs, checksums compared (CONFORMANCE 27, 32, 37)."""

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
from kvbm.storage.object_store import RetryLimits
from kvbm.testing.proxy import FaultyProxy, ProxyFault
from kvbm.types import Tier

DIMENSIONS: dict[str, Any] = {"num_layers": 3, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"}
REMOTE = BlockLayout.fully_contiguous(num_blocks=8, **DIMENSIONS)
HOSTS = {
    "contiguous": BlockLayout.fully_contiguous(num_blocks=8, **DIMENSIONS),
    "by layer": BlockLayout.layer_separate(num_blocks=8, block_first=True, **DIMENSIONS),
}


class Site:
    """A host tier, which blocks come to straight or through the ring, and an object store."""

    def __init__(self, remote: Any, layout: BlockLayout, backend: Backend) -> None:
        self.remote = remote
        self.host = HostStorage(layout, backend=backend)
        self.now = 0.0
        storages = {Tier.HOST: self.host, Tier.REMOTE: remote}
        self.executor = Executor(storages, staging_blocks=4, backend=backend, clock=lambda: self.now)
        self.blocks = Blocks(8, layout)
        self.host.write(self.blocks.ids, self.blocks.data)

    def fill_store(self, num_blocks: int = 8) -> None:
        """Store blocks; give the host others."""
        ids = list(range(num_blocks))
        assert (self.copy(Tier.HOST, Tier.REMOTE, ids, ids, ids).outcomes == Outcome.OK).all()
        self.host.write(self.blocks.ids, ~self.blocks.data)
        self.host.has_checksum[:] = True  # of what the blocks held before

    def up(self, deadline: float | None = None) -> JobResult:
        ids = list(range(8))
        return self.copy(Tier.REMOTE, Tier.HOST, ids, ids, ids, deadline)

    def copy(
        self,
        source: Tier,
        destination: Tier,
        source_ids: list[int],
        ids: list[int],
        names: list[int],
        deadline: float | None = None,
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
            ),
            deadline,
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


class Late:
    """A site whose store keeps reads at a gate, once they have come there."""

    def __init__(self, make_storage: MakeStorage, make_site: Callable[..., Site], kind: str) -> None:
        self.client = FakeClient()
        self.remote = make_storage(layout=REMOTE, client=self.client)
        self.site = make_site(self.remote, kind)
        self.site.fill_store()
        self.client.is_gated = True
        self._submit = self.remote.submit_read

    def when_begun(self, action: Callable[[], None]) -> None:
        """Act when a read stands at the gate."""

        def submit(*arguments: Any, **names: Any) -> Any:
            transfer = self._submit(*arguments, **names)
            assert self.client.has_come.acquire(timeout=PATIENCE_S)
            action()
            return transfer

        self.remote.submit_read = submit  # type: ignore[method-assign]

    def let_go(self) -> None:
        """Let the store answer to its heart's content, and see that nobody heard it."""
        self.client.release()
        self.remote.close(PATIENCE_S)
        assert np.array_equal(self.site.host.read(self.site.blocks.ids), ~self.site.blocks.data)


@pytest.mark.parametrize("kind", list(HOSTS))
def test_an_answer_after_the_job_ended_reaches_nobody(
    make_storage: MakeStorage, make_site: Callable[..., Site], kind: str
) -> None:
    """A read of a store lands as soon as it is called back: the job is not kept by a store that does not answer."""
    late = Late(make_storage, make_site, kind)
    site = late.site

    def end_time() -> None:
        site.now = 10.0

    late.when_begun(end_time)
    results: list[JobResult] = []
    thread = threading.Thread(target=lambda: results.append(site.up(deadline=5.0)))
    thread.start()
    thread.join(PATIENCE_S)
    assert results[0].outcomes.tolist() == [Outcome.LATE] * 8
    assert results[0].reason == "its time was over"
    assert site.host.has_checksum.tolist() == [kind != "contiguous"] * 8, "rows of a read that began count for nothing"
    late.let_go()


@pytest.mark.parametrize("kind", list(HOSTS))
def test_an_answer_after_an_interrupt_reaches_nobody(
    make_storage: MakeStorage, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    late = Late(make_storage, make_site, kind)
    late.when_begun(lambda: None)

    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(late.site.executor._means, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        late.site.up()
    late.let_go()


@pytest.mark.parametrize("kind", list(HOSTS))
def test_what_is_bad_or_gone_in_a_store_costs_its_blocks_alone(
    make_storage: MakeStorage, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    client = FakeClient()
    site = make_site(make_storage(layout=REMOTE, client=client), kind)
    site.fill_store()
    disowned: list[list[int]] = []
    monkeypatch.setattr(site.remote, "disown", lambda ids, hashes: disowned.extend(hashes.tolist()))
    flipped, garbage, gone = (
        next(path for path in client.objects if bytes(site.blocks.hashes[i]).hex() in path) for i in (1, 4, 6)
    )
    data = client.objects[flipped]
    client.objects[flipped] = data[:-1] + bytes([data[-1] ^ 1])
    client.objects[garbage] = b"garbage" + client.objects[garbage][7:]
    del client.objects[gone]
    result = site.up()
    assert np.flatnonzero(result.outcomes == Outcome.CORRUPT).tolist() == [1]
    assert np.flatnonzero(result.outcomes == Outcome.FAILED).tolist() == [4, 6]
    good = np.flatnonzero(result.outcomes == Outcome.OK)
    assert len(good) == 5
    assert np.array_equal(site.host.read(good), site.blocks.data[good])
    assert site.host.has_checksum[good].all()
    if kind == "contiguous":
        assert not site.host.has_checksum[[1, 4, 6]].any()
    assert disowned == site.blocks.hashes[[1]].tolist(), "what could not be read is not called bad"


@pytest.mark.parametrize("kind", list(HOSTS))
def test_blocks_of_a_store_that_is_given_up_are_late(
    make_storage: MakeStorage, make_site: Callable[..., Site], kind: str
) -> None:
    client = FakeClient()
    retries = RetryLimits(max_attempts=1)
    site = make_site(make_storage(layout=REMOTE, client=client, retries=retries, max_failures=1), kind)
    site.fill_store()
    client.plan = [OSError("gone")] * 8
    result = site.up()
    assert result.is_away
    assert result.outcomes.tolist() == [Outcome.LATE] * 8
    assert len(client.objects) == 8
    if kind == "contiguous":
        assert not site.host.has_checksum.any()
