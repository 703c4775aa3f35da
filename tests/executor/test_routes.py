"""Every kind of route with real storages: bytes, checksums, records, deadlines (CONFORMANCE 27, 28)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.jobs import ForgetJob, InventoryJob, Outcome, ProbeJob, TouchedJob
from kvbm.storage import HostStorage
from kvbm.types import HashArray, IdArray, Tier

MakeSite = Callable[..., Any]
LAYOUTS = ["contiguous", "aligned", "by layer", "by layer, block first", "by head"]
FROM, TO = [5, 0, 11, 3, 4, 7, 8], [1, 10, 2, 0, 6, 5, 9]
SPARE = [3, 4, 7, 8, 11]


@pytest.mark.parametrize("destination", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("route", ["device-host", "host-device", "device-disk", "host-disk"])
def test_blocks_go_there_and_back_between_any_layouts(
    make_site: MakeSite, route: str, source: str, destination: str
) -> None:
    first, second = route.split("-")
    site = make_site({first: source, second: destination}, staging_blocks=4)
    wanted, before = site.fill(first), site.fill(second, seed=2)
    result = site.run(route, FROM, TO)
    assert result.outcomes.tolist() == [Outcome.OK] * len(FROM), result.reason
    assert (result.job_id, result.reason) == (7, "")
    assert result.nbytes == len(FROM) * 288
    assert result.seconds >= 0
    assert np.array_equal(site.content(second, TO), wanted[FROM])
    assert np.array_equal(site.content(second, SPARE), before[SPARE]), "and nothing else"
    back = site.run(f"{second}-{first}", TO, [9, 8, 7, 6, 5, 4, 3], FROM, is_urgent=True)
    assert back.outcomes.tolist() == [Outcome.OK] * len(FROM), back.reason
    assert np.array_equal(site.content(first, [9, 8, 7, 6, 5, 4, 3]), wanted[FROM])


@pytest.fixture
def three(make_site: MakeSite) -> Any:
    return make_site({"device": "by layer", "host": "by head", "disk": "contiguous"}, staging_blocks=4)


def test_blocks_keep_their_bytes_through_all_tiers(three: Any) -> None:
    wanted = three.fill("device")
    for route, source_ids, destination_ids in (
        ("device-host", FROM, TO),
        ("host-disk", TO, FROM),
        ("disk-host", FROM, TO[::-1]),
        ("host-device", TO[::-1], FROM[::-1]),
    ):
        result = three.run(route, source_ids, destination_ids, FROM)
        assert result.outcomes.tolist() == [Outcome.OK] * len(FROM), result.reason
    assert np.array_equal(three.content("device", FROM[::-1]), wanted[FROM])


@pytest.mark.parametrize("kind", ["aligned", "by layer"])
def test_checksums_are_computed_on_the_way_down_and_kept_in_every_tier(make_site: MakeSite, kind: str) -> None:
    site = make_site({"device": "contiguous", "host": kind, "disk": "contiguous"})
    site.fill("device")
    site.run("device-host", FROM, TO)
    assert not site["device"].has_checksum.any(), "what an engine writes there at any time is worth none"
    assert site["host"].has_checksum[TO].all()
    assert not site["host"].has_checksum[SPARE].any()
    site.run("host-disk", TO, FROM, FROM)
    assert np.array_equal(site["disk"].checksums[FROM], site["host"].checksums[TO])
    site.run("device-disk", FROM, TO)
    assert np.array_equal(site["disk"].checksums[TO], site["host"].checksums[TO]), "straight down gives the same"
    assert len(set(site["disk"].checksums[TO].tolist())) == len(TO)


def test_checksum_that_the_source_lacks_is_computed_on_the_way_to_disk(make_site: MakeSite) -> None:
    site = make_site({"host": "contiguous", "disk": "contiguous"})
    site.fill("host")
    assert site.run("host-disk", [0, 1], [4, 5]).outcomes.tolist() == [Outcome.OK] * 2
    assert site["disk"].has_checksum[[4, 5]].all()
    assert site.run("disk-host", [4, 5], [2, 3], [0, 1]).outcomes.tolist() == [Outcome.OK] * 2


@pytest.mark.parametrize("staging_blocks", [1, 2, 3, 16])
def test_flipped_bit_on_disk_is_found_on_the_way_up(make_site: MakeSite, staging_blocks: int) -> None:
    site = make_site({"device": "by layer", "disk": "contiguous"}, staging_blocks=staging_blocks)
    wanted = site.fill("device")
    site.run("device-disk", FROM, TO)
    disk = site["disk"]
    for flipped, at in ((TO[2], 0), (TO[4], 287)):
        with disk.path.open("r+b") as file:
            file.seek(flipped * disk.slot_nbytes + at)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x10]))
    result = site.run("disk-device", TO, FROM[::-1], FROM, is_urgent=True)
    expected = [Outcome.OK] * len(TO)
    expected[2] = expected[4] = Outcome.CORRUPT
    assert result.outcomes.tolist() == expected
    assert result.reason == "checksum mismatch"
    assert result.nbytes == 288 * (len(TO) - 2)
    good = np.flatnonzero(np.array(expected) == Outcome.OK)
    assert np.array_equal(site.content("device", np.array(FROM[::-1])[good]), wanted[np.array(FROM)[good]])
    assert site.ring.num_free == staging_blocks


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("upper", ["device", "disk"])
def test_flipped_bit_in_host_memory_is_found_by_whoever_reads_it_up(make_site: MakeSite, kind: str, upper: str) -> None:
    """Up to the device at once; on the way to disk the old checksum goes along, or the copy finds it."""
    site = make_site({"device": "contiguous", "host": kind, "disk": "contiguous"})
    site.fill("device")
    site.run("device-host", FROM, TO)
    layout = site["host"].layout
    buffer, at = layout.offset(TO[3], layout.num_layers - 1, 1)
    site["host"].buffers[buffer][at + 5] ^= 1
    expected = [Outcome.OK] * len(TO)
    expected[3] = Outcome.CORRUPT
    if upper == "device":
        result = site.run("host-device", TO, FROM, FROM)
    else:
        down = site.run("host-disk", TO, FROM, FROM)
        assert down.outcomes[[0, 1, 2, 4, 5, 6]].tolist() == [Outcome.OK] * 6
        if down.outcomes[3] == Outcome.CORRUPT:  # it went through the ring
            assert down.reason == "checksum mismatch"
            return
        result = site.run("disk-device", FROM, TO, FROM)
    assert result.outcomes.tolist() == expected
    assert result.reason == "checksum mismatch"


def test_flipped_bit_is_found_wherever_it_lies(make_site: MakeSite) -> None:
    site = make_site({"device": "by layer", "host": "contiguous"})
    site.fill("device")
    site.run("device-host", [0, 1, 2], [4, 5, 6])
    memory = site["host"].buffers[0].reshape(12, 288)
    for at in range(288):
        memory[5, at] ^= 1 << at % 8
        result = site.run("host-device", [4, 5, 6], [7, 8, 9], [0, 1, 2])
        assert result.outcomes.tolist() == [Outcome.OK, Outcome.CORRUPT, Outcome.OK]
        memory[5, at] ^= 1 << at % 8
    assert (site.run("host-device", [4, 5, 6], [7, 8, 9], [0, 1, 2]).outcomes == Outcome.OK).all()


def test_block_of_another_name_is_found_on_the_way_up(three: Any) -> None:
    three.fill("device")
    three.run("device-disk", [0, 1], [0, 1])
    result = three.run("disk-device", [0, 1], [2, 3], [0, 2])
    assert result.outcomes.tolist() == [Outcome.OK, Outcome.CORRUPT]


def test_slot_that_was_never_written_is_not_brought_up(three: Any) -> None:
    three.fill("device")
    three.run("device-disk", [0], [0])
    result = three.run("disk-device", [0, 1], [2, 3])
    assert result.outcomes.tolist() == [Outcome.OK, Outcome.FAILED]
    assert result.reason == "nothing was kept there"


def test_without_checks_nothing_is_computed_and_nothing_found(make_site: MakeSite) -> None:
    site = make_site({"device": "contiguous", "host": "by layer", "disk": "contiguous"}, verifies=False)
    wanted = site.fill("device")
    for route, source_ids, destination_ids in (("device-host", [0, 1], [2, 3]), ("host-disk", [2, 3], [4, 5])):
        assert site.run(route, source_ids, destination_ids).outcomes.tolist() == [Outcome.OK] * 2
    assert not site["host"].has_checksum.any()
    assert not site["disk"].has_checksum.any()
    assert site.run("disk-device", [4, 5], [8, 9]).outcomes.tolist() == [Outcome.OK] * 2
    assert np.array_equal(site.content("device", [8, 9]), wanted[:2])


@pytest.mark.parametrize("route", ["device-host", "device-disk", "disk-host", "host-disk"])
def test_job_without_blocks_is_answered(three: Any, route: str) -> None:
    result = three.run(route, [], [])
    assert (len(result.outcomes), result.nbytes, result.reason) == (0, 0, "")


@pytest.mark.parametrize("route", ["device-host", "device-disk", "disk-device", "host-disk"])
def test_job_whose_time_is_over_begins_nothing(make_site: MakeSite, route: str) -> None:
    site = make_site({"device": "contiguous", "host": "contiguous", "disk": "contiguous"}, clock=lambda: 10.0)
    first, second = route.split("-")
    site.fill(first)
    before = site.fill(second, seed=2)
    result = site.run(route, [0, 1], [0, 1], deadline=10.0)
    assert result.outcomes.tolist() == [Outcome.LATE] * 2
    assert result.reason == "its time was over before it began"
    assert (result.nbytes, result.seconds) == (0, 0.0)
    assert np.array_equal(site.content(second), before)
    assert site.run(route, [0, 1], [0, 1], deadline=10.1).outcomes.tolist() != [Outcome.LATE] * 2


@pytest.mark.parametrize("route", ["device-disk", "disk-device"])
def test_job_whose_time_ends_on_the_way_begins_no_further_block(make_site: MakeSite, route: str) -> None:
    now = [0.0]
    site = make_site({"device": "by layer", "disk": "contiguous"}, staging_blocks=2, clock=lambda: now[0])
    site.fill("device")
    first, _ = route.split("-")
    if first == "disk":
        assert (site.run("device-disk", range(12), range(12)).outcomes == Outcome.OK).all()
    begun: list[int] = []
    disk = site["disk"]
    name = "submit_read" if first == "disk" else "submit_write"
    submit = getattr(disk, name)

    def submit_and_be_slow(ids: Any, memory: Any, rows: Any, **names: Any) -> Any:
        begun.extend(ids.tolist())
        transfer = submit(ids, memory, rows, **names)
        assert transfer.wait(60)
        if len(begun) >= 4:
            now[0] = 5.0
        return transfer

    setattr(disk, name, submit_and_be_slow)
    result = site.run(route, range(12), range(12), deadline=5.0)
    assert begun == [0, 1, 2, 3]
    assert result.outcomes.tolist() == [Outcome.OK] * 4 + [Outcome.LATE] * 8
    assert result.reason == "its time was over"
    assert site.ring.num_free == 2


@pytest.mark.parametrize("is_urgent", [True, False])
def test_unknown_tier_is_answered_as_failed(make_site: MakeSite, is_urgent: bool) -> None:
    site = make_site({"device": "contiguous", "host": "contiguous"})
    ids, names = np.zeros(1, dtype=np.int32), np.zeros((1, 2), dtype=np.uint64)
    reason = "this executor has no tier 'disk', it has device, host"
    for route in ("device-disk", "disk-device"):
        job = site.job(route, [0, 1], [0, 1], is_urgent=is_urgent)
        assert not site.executor.is_small(job)
        result = site.executor.execute(job)
        assert (result.outcomes.tolist(), result.reason) == ([Outcome.FAILED] * 2, reason)
    books = {"job_id": 4, "tier": Tier.DISK}
    for job in (
        ForgetJob(**books, hashes=names),
        TouchedJob(**books, ids=ids, hashes=names, priorities=np.zeros(1, dtype=np.uint8)),
        ProbeJob(**books, ids=ids, hashes=names),
    ):
        result = site.executor.execute(job)
        assert (result.outcomes.tolist(), result.reason) == ([Outcome.FAILED], reason)
    result = site.executor.execute(InventoryJob(**books))
    assert (len(result.outcomes), result.ids, result.reason) == (0, None, reason)


@pytest.mark.parametrize("route", ["device-host", "host-device", "device-disk", "host-disk", "disk-device"])
@pytest.mark.parametrize("wrong", [([0, 12], [0, 1]), ([0, 1], [12, 0]), ([-1, 0], [0, 1]), ([0, 1], [0, -1])])
def test_slots_that_are_not_there_fail_and_move_no_byte(three: Any, route: str, wrong: tuple[Any, Any]) -> None:
    first, second = route.split("-")
    three.fill("device")
    if first != "device":
        assert (three.run(f"device-{first}", range(12), range(12)).outcomes == Outcome.OK).all()
    before = three.fill(second, seed=2)
    result = three.run(route, *wrong, names=[0, 1])
    assert result.outcomes.tolist() == [Outcome.FAILED] * 2
    assert "outside 0..11" in result.reason
    assert np.array_equal(three.content(second), before)
    assert three.ring.num_free == three.ring.num_slots
    assert (three.run(route, [0], [0]).outcomes == Outcome.OK).all(), "the executor goes on"


def test_small_jobs_are_copies_between_memories_up_to_the_limit(make_site: MakeSite) -> None:
    site = make_site({"device": "by layer", "host": "contiguous", "disk": "contiguous"}, small_nbytes=2 * 288)
    assert site.executor.is_small(site.job("device-host", [0, 1], [0, 1]))
    assert not site.executor.is_small(site.job("device-host", [0, 1, 2], [0, 1, 2]))
    assert not site.executor.is_small(site.job("disk-host", [0], [0]))
    assert not site.executor.is_small(site.job("host-disk", [0], [0]))
    assert not site.executor.is_small(InventoryJob(job_id=1, tier=Tier.HOST))


# -- books -----------------------------------------------------------------------------------------------------------


class Remembering(HostStorage):
    """Memory that keeps records, and tells what it was told."""

    told: list[tuple[str, Any]]

    def record(self, block_ids: IdArray, **fields: Any) -> None:
        super().record(block_ids, **fields)
        self.told.append(("record", (block_ids.tolist(), {k: np.array(v).tolist() for k, v in fields.items()})))

    def holds(self, block_ids: IdArray, hashes: HashArray) -> npt.NDArray[np.bool_]:
        return np.array([name[0] == block_id for block_id, name in zip(block_ids, hashes, strict=True)])

    def forget(self, hashes: HashArray, block_ids: Any = None) -> None:
        self.told.append(("forget", hashes.tolist()))

    def clear(self) -> None:
        self.told.append(("clear", None))

    def touch(self, block_ids: IdArray, hashes: HashArray, priorities: npt.NDArray[np.uint8]) -> None:
        self.told.append(("touch", (block_ids.tolist(), hashes.tolist(), priorities.tolist())))

    def inventory(self) -> tuple[IdArray, HashArray, HashArray, npt.NDArray[np.uint8]]:
        names = np.arange(4, dtype=np.uint64).reshape(2, 2)
        return np.array([8, 3], dtype=np.int32), names, names + np.uint64(1), np.array([50, 9], dtype=np.uint8)


def test_storage_that_keeps_records_is_told_and_asked(make_site: MakeSite) -> None:
    site = make_site({"device": "contiguous", "host": "contiguous"})
    storage = site.executor._means._storages[Tier.HOST]
    storage.__class__, storage.told = Remembering, []
    of_all: dict[str, Any] = {"job_id": 4, "tier": Tier.HOST}
    books = {**of_all, "ids": np.array([1, 2, 3], dtype=np.int32)}
    names = np.array([[1, 0], [7, 0], [3, 0]], dtype=np.uint64)
    probed = site.executor.execute(ProbeJob(**books, hashes=names))
    assert (probed.job_id, probed.outcomes.tolist()) == (4, [Outcome.OK, Outcome.FAILED, Outcome.OK])
    assert site.executor.execute(ForgetJob(**of_all, hashes=names)).outcomes.tolist() == [Outcome.OK] * 3
    assert site.executor.execute(ForgetJob(**of_all, hashes=names[:0], is_all=True)).outcomes.tolist() == []
    priorities = np.array([0, 50, 100], dtype=np.uint8)
    touched = site.executor.execute(TouchedJob(**books, hashes=names, priorities=priorities))
    assert touched.outcomes.tolist() == [Outcome.OK] * 3
    assert storage.told == [
        ("forget", names.tolist()),
        ("clear", None),
        ("touch", ([1, 2, 3], names.tolist(), [0, 50, 100])),
    ]
    found = site.executor.execute(InventoryJob(job_id=5, tier=Tier.HOST))
    assert (found.job_id, len(found.outcomes), found.ids.tolist()) == (5, 0, [8, 3])
    assert (found.hashes.tolist(), found.parents.tolist()) == ([[0, 1], [2, 3]], [[1, 2], [3, 4]])
    assert found.priorities.tolist() == [50, 9]


@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_destination_without_addresses_records_what_was_written_and_only_that(make_site: MakeSite, kind: str) -> None:
    from kvbm.testing.faults import FaultMode, FaultPlan

    plan = FaultPlan([FaultMode.FAIL], on="write", affects="one", seed=4)
    site = make_site({"device": kind, "host": "contiguous"}, faults={"host": plan})
    site.fill("device")
    plan.is_on = True
    storage = site["host"].storage
    storage.__class__, storage.told = Remembering, []
    parents, priorities = site.hashes[[4, 0, 1]], np.array([1, 2, 3], dtype=np.uint8)
    result = site.run("device-host", [0, 1, 2], [7, 8, 9], parents=parents, priorities=priorities)
    good = np.flatnonzero(result.outcomes == Outcome.OK)
    assert sorted(result.outcomes.tolist()) == [Outcome.OK, Outcome.OK, Outcome.FAILED]
    assert result.reason == "write error"
    ((verb, (ids, fields)),) = storage.told
    assert (verb, ids) == ("record", [[7, 8, 9][i] for i in good])
    assert fields["hashes"] == site.hashes[good].tolist()
    assert fields["parents"] == parents[good].tolist()
    assert fields["priorities"] == priorities[good].tolist()
