"""Keyed storages under an executor: names go along, bad blocks are disowned, what is away is not bad."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keyed_site import KeyedSite

from kvbm._backend import Backend
from kvbm.errors import StorageError
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, ForgetJob, InventoryJob, Outcome, ProbeJob
from kvbm.storage.disk import DiskStorage
from kvbm.types import Tier

MakeKeyed = Callable[..., KeyedSite]
OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT
SMALL: dict[str, Any] = {"num_blocks": 12, "nbytes": 4096}
UP = [Tier.HOST, Tier.DEVICE]  # straight, and through the ring


# -- what it is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", UP)
@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_keyed_storage_gets_the_name_and_the_checksum_of_every_block(
    make_keyed: MakeKeyed, kind: str, to: Tier
) -> None:
    site = make_keyed(kind=kind, staging_blocks=8, **SMALL)
    assert not site.down(10).outcomes.any()
    writes = site.store.of_kind("write")
    assert len(writes) == (1 if kind == "contiguous" else 3), "straight from memory, or through half of the ring"
    assert np.concatenate([call.hashes for call in writes]).tolist() == site.hashes[:10].tolist()
    checksums = np.concatenate([call.checksums for call in writes])
    expected = site.executor._means._urgent.compute_checksums(site.host, site.ids[:10], site.hashes[:10])
    assert checksums.tolist() == expected.tolist()
    assert [block_id for ids in site.store.records for block_id in ids] == list(range(10))
    site.host.write(site.ids, np.zeros_like(site.data))
    assert not site.up(10, to).outcomes.any()
    reads = site.store.of_kind("read")
    assert len(reads) == (1 if (kind, to) == ("contiguous", Tier.HOST) else 3)
    assert np.concatenate([call.hashes for call in reads]).tolist() == site.hashes[:10].tolist()
    assert np.array_equal(site.storages[to].read(site.ids[:10]), site.data[:10])


@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_without_checks_names_go_along_and_no_checksums(make_keyed: MakeKeyed, kind: str) -> None:
    site = make_keyed(kind=kind, verifies=False, staging_blocks=8, **SMALL)
    assert not site.down(4).outcomes.any()
    (call,) = site.store.of_kind("write")
    assert call.checksums is None
    assert call.hashes.tolist() == site.hashes[:4].tolist()


# -- bad blocks ------------------------------------------------------------------------------------------------------


class TwoBelow:
    """A store, and a slab below which its blocks go; both without addresses."""

    def __init__(self, site: KeyedSite, directory: Path, backend: Backend) -> None:
        self.site = site
        self.disk = DiskStorage(site.store.layout, directory)
        storages = {Tier.HOST: site.host, Tier.DISK: self.disk, Tier.REMOTE: site.store}
        self.executor = Executor(storages, backend=backend, copy_threads=1, staging_blocks=8)

    def execute(self, source: Tier, destination: Tier, num_blocks: int, **fields: Any) -> Any:
        return self.executor.execute(self.site.job(source, destination, num_blocks, **fields))

    def spoil_disk(self, *slots: int) -> None:
        with self.disk.path.open("r+b") as file:
            for slot in slots:
                file.seek(slot * self.disk.slot_nbytes)
                (byte,) = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))


@pytest.fixture
def two_below(make_keyed: MakeKeyed, tmp_path: Path, backend: Backend) -> Iterator[TwoBelow]:
    two = TwoBelow(make_keyed(staging_blocks=8, **SMALL), tmp_path, backend)
    yield two
    two.executor.close()
    two.disk.close()


@pytest.mark.parametrize("to", UP)
@pytest.mark.parametrize("staging_blocks", [2, 8, 24])
def test_corrupt_blocks_are_disowned_before_the_answer_when_they_come_to_memory(
    make_keyed: MakeKeyed, staging_blocks: int, to: Tier
) -> None:
    site = make_keyed(staging_blocks=staging_blocks, **SMALL)
    site.fill_store(12)
    site.spoil(1, 5, 6, 11)
    del site.store.objects[site.hashes[3].tobytes()]
    result = site.up(12, to)
    assert np.flatnonzero(result.outcomes == CORRUPT).tolist() == [1, 5, 6, 11]
    assert np.flatnonzero(result.outcomes == FAILED).tolist() == [3]
    ids = [block_id for call in site.store.disowned for block_id in call[0]]
    hashes = [name for call in site.store.disowned for name in call[1]]
    assert ids == [1, 5, 6, 11], "what could not be read is not called bad"
    assert hashes == site.hashes[ids].tolist()
    assert site.ring.num_free == staging_blocks


def test_corrupt_blocks_are_disowned_before_the_answer_when_they_come_to_a_disk(two_below: TwoBelow) -> None:
    site = two_below.site
    site.fill_store(12)
    site.spoil(0, 7)
    result = two_below.execute(Tier.REMOTE, Tier.DISK, 12, destination_ids=site.ids[::-1].copy())
    assert np.flatnonzero(result.outcomes == CORRUPT).tolist() == [0, 7]
    assert sorted(block_id for call in site.store.disowned for block_id in call[0]) == [0, 7]
    assert site.hashes[0].tobytes() not in site.store.objects
    held = two_below.disk.holds(site.ids[::-1].copy(), site.hashes)
    assert np.flatnonzero(~held).tolist() == [0, 7], "and nothing of them is kept there"


@pytest.mark.parametrize("destination", [Tier.HOST, Tier.REMOTE])
def test_corrupt_blocks_of_a_disk_are_disowned_whoever_wants_them(two_below: TwoBelow, destination: Tier) -> None:
    site = two_below.site
    slots = site.ids[::-1].copy()
    assert not two_below.execute(Tier.HOST, Tier.DISK, 12, destination_ids=slots).outcomes.any()
    two_below.spoil_disk(2, 9)
    job = CopyJob(
        job_id=2, source=Tier.DISK, destination=destination, source_ids=slots, destination_ids=site.ids,
        hashes=site.hashes, is_urgent=True,
    )  # fmt: skip
    result = two_below.executor.execute(job)
    bad = np.flatnonzero(result.outcomes == CORRUPT)
    assert slots[bad].tolist() == [9, 2]
    assert np.flatnonzero(~two_below.disk.holds(slots, site.hashes)).tolist() == bad.tolist()
    if destination is Tier.REMOTE:
        assert len(site.store.objects) == 10, "no bad block goes on"
        assert site.store.of_kind("write")[0].checksums is not None


@pytest.mark.parametrize("to", UP)
def test_good_blocks_arrive_although_bad_ones_cannot_be_disowned(
    make_keyed: MakeKeyed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, to: Tier
) -> None:
    site = make_keyed(staging_blocks=24, **SMALL)
    site.fill_store(12)
    site.spoil(4)

    def refuse(block_ids: Any, hashes: Any) -> None:
        raise OSError(5, "the index cannot be written")

    monkeypatch.setattr(site.store, "disown", refuse)
    result = site.up(12, to)
    assert result.outcomes.tolist() == [OK] * 4 + [CORRUPT] + [OK] * 7
    good = np.flatnonzero(result.outcomes == OK)
    assert np.array_equal(site.storages[to].read(good.astype(np.int32)), site.data[good])
    assert result.reason == "checksum mismatch"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, "one for the block, one for the index"
    assert "num_blocks=1" in warnings[0]


@pytest.mark.parametrize("to", UP)
def test_good_blocks_disown_nothing(make_keyed: MakeKeyed, to: Tier) -> None:
    site = make_keyed(staging_blocks=8, **SMALL)
    site.fill_store(12)
    assert not site.up(12, to).outcomes.any()
    assert site.store.disowned == []


# -- away ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", UP)
def test_blocks_of_a_store_that_is_away_are_late_and_not_bad(make_keyed: MakeKeyed, to: Tier) -> None:
    site = make_keyed(staging_blocks=8, **SMALL)
    site.fill_store(12)
    site.store.is_away = True
    result = site.up(12, to)
    assert result.is_away
    assert result.outcomes.tolist() == [LATE] * 12, "they may be as good as ever"
    assert result.reason == "read error"
    assert site.store.disowned == []
    site.store.is_away = False
    again = site.up(12, to)
    assert (again.is_away, again.outcomes.tolist()) == (False, [OK] * 12)


@pytest.mark.parametrize("to", UP)
def test_store_that_goes_away_midway_keeps_what_has_come(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, to: Tier
) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 4 * 4096)
    site = make_keyed(staging_blocks=8, **SMALL)
    site.fill_store(12)
    end = site.store.end

    def end_and_go(call: Any, **names: Any) -> None:
        end(call, **names)
        site.store.is_away |= len(site.store.calls) == 1  # with the second of three

    site.store.end = end_and_go  # type: ignore[method-assign]
    result = site.up(12, to)
    assert [len(call.ids) for call in site.store.of_kind("read")] == [4, 4, 4]
    assert result.is_away
    assert result.outcomes.tolist() == [OK] * 8 + [LATE] * 4
    assert np.array_equal(site.storages[to].read(site.ids[:8]), site.data[:8])


@pytest.mark.parametrize("is_refusing", [False, True])
def test_write_to_a_store_that_is_away_says_so(make_keyed: MakeKeyed, is_refusing: bool) -> None:
    site = make_keyed(staging_blocks=8, **SMALL)
    site.store.is_away = True
    if is_refusing:

        def refuse(*_: Any, **__: Any) -> Any:
            raise StorageError("the store does not answer")

        site.store.submit_write = refuse  # type: ignore[method-assign]
    result = site.down(4)
    assert result.is_away
    assert result.outcomes.tolist() == [FAILED] * 4
    assert site.store.records in ([], [[]])


@pytest.mark.parametrize("to", UP)
def test_read_that_a_store_refuses_while_it_is_away_is_late(make_keyed: MakeKeyed, to: Tier) -> None:
    site = make_keyed(staging_blocks=8, **SMALL)
    site.fill_store(4)
    site.store.is_away = True

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageError("the store does not answer")

    site.store.submit_read = refuse  # type: ignore[method-assign]
    result = site.up(4, to)
    assert result.is_away
    assert result.reason == "the store does not answer"
    assert result.outcomes.tolist() == [LATE] * 4
    assert site.ring.num_free == 8


def test_books_of_a_store_that_is_away_say_so(make_keyed: MakeKeyed) -> None:
    site = make_keyed(staging_blocks=8, **SMALL)
    site.store.is_away = True
    ids, hashes = site.ids[:2], site.hashes[:2]
    for job in (
        ProbeJob(job_id=1, tier=Tier.REMOTE, ids=ids, hashes=hashes),
        ForgetJob(job_id=2, tier=Tier.REMOTE, hashes=hashes),
    ):
        result = site.executor.execute(job)
        assert (result.is_away, result.reason) == (True, "the store does not answer")
        assert result.outcomes.tolist() == [FAILED] * 2
    site.store.is_away = False
    assert not site.executor.execute(InventoryJob(job_id=3, tier=Tier.REMOTE)).is_away
