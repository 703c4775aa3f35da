"""Storages that fail, lie, are late or never answer: wrong bytes are found, slots come back, nothing lands too late.

CONFORMANCE 27, and the executor's part of 40.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.jobs import Outcome
from kvbm.testing.faults import FaultMode, FaultPlan

MakeSite = Callable[..., Any]
PATIENCE_S = 60.0
OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT
SLOTS = 4  # of the ring: two chunks of two blocks
IN_TIME = 50.0


@pytest.fixture
def plan() -> FaultPlan:
    return FaultPlan()


@pytest.fixture
def clock() -> Any:
    """Give a clock that stands at 0, or jumps to 100 once a storage holds some calls, or is the real one."""

    class Clock:
        storage: Any = None
        num_held = 1
        is_real = False

        def __call__(self) -> float:
            if self.is_real:
                return time.monotonic()
            is_held = self.storage is not None
            is_held = is_held and self.storage.num_held + self.storage.num_unanswered >= self.num_held
            return 100.0 if is_held else 0.0

    return Clock()


@pytest.fixture
def site(make_site: MakeSite, plan: FaultPlan, clock: Any) -> Any:
    """Give a rank with six blocks on a faulty disk, at the slots of the device's blocks."""
    kinds = {"device": "by layer", "disk": "contiguous"}
    site = make_site(kinds, staging_blocks=SLOTS, faults={"disk": plan}, clock=clock)
    site.wanted = site.fill("device")
    assert (site.run("device-disk", range(6), range(6)).outcomes == OK).all()
    site["device"].write(np.arange(12, dtype=np.int32), np.zeros((12, 288), dtype=np.uint8))
    return site


def order(plan: FaultPlan, *modes: FaultMode | None, affects: str = "one", on: str = "both") -> None:
    """Order faults for the calls from now on."""
    plan._modes, plan._affects, plan._on = iter(modes), affects, on


def wait_until_free(ring: Any, num_slots: int) -> None:
    with ring._has_slots:
        assert ring._has_slots.wait_for(lambda: ring.num_free >= num_slots, PATIENCE_S)


def run_in_thread(site: Any, *arguments: Any, **fields: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(site.run(*arguments, **fields)))
    thread.start()
    return thread, results


def test_read_that_fails_costs_only_its_blocks(site: Any, plan: FaultPlan) -> None:
    order(plan, None, FaultMode.FAIL, None)
    result = site.run("disk-device", range(6), range(6), is_urgent=True)
    assert result.outcomes[[0, 1, 4, 5]].tolist() == [OK] * 4
    assert sorted(result.outcomes[2:4].tolist()) == [OK, FAILED]
    assert result.reason == "read error"
    assert result.nbytes == 5 * 288
    good = np.flatnonzero(result.outcomes == OK)
    assert np.array_equal(site.content("device", good), site.wanted[good])
    assert site.ring.num_free == SLOTS


@pytest.mark.parametrize("mode", [FaultMode.TEAR, FaultMode.FLIP])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_storage_that_lies_is_found_out_on_the_way_up(site: Any, plan: FaultPlan, mode: FaultMode, verb: str) -> None:
    site["device"].write(np.arange(12, dtype=np.int32), _noise(3))
    wanted = site.content("device")
    order(plan, *([mode] * 8), affects="one", on=verb)
    down = site.run("device-disk", range(6), range(6, 12), range(6))
    assert down.outcomes.tolist() == [OK] * 6, "it claims success"
    result = site.run("disk-device", range(6, 12), range(6, 12), range(6))
    assert set(result.outcomes.tolist()) == {OK, CORRUPT}
    assert result.reason == "checksum mismatch"
    good = np.flatnonzero(result.outcomes == OK)
    assert np.array_equal(site.content("device", good + 6), wanted[good])
    assert site.ring.num_free == SLOTS


@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_write_that_fails_costs_only_its_blocks(make_site: MakeSite, plan: FaultPlan, kind: str) -> None:
    site = make_site({"device": kind, "disk": "contiguous"}, staging_blocks=SLOTS, faults={"disk": plan})
    wanted = site.fill("device")
    order(plan, FaultMode.FAIL, None, on="write")
    result = site.run("device-disk", range(6), range(6))
    assert sorted(result.outcomes.tolist()) == [OK] * 5 + [FAILED]
    assert result.reason == "write error"
    bad = int(np.flatnonzero(result.outcomes == FAILED)[0])
    assert not site["disk"].has_checksum[bad], "a slot that holds anything has none"
    up = site.run("disk-device", range(6), range(6, 12))
    assert up.outcomes.tolist() == result.outcomes.tolist()
    good = np.flatnonzero(result.outcomes == OK)
    assert np.array_equal(site.content("device", good + 6), wanted[good])


def test_read_that_comes_late_never_writes_into_its_destination(site: Any, plan: FaultPlan, clock: Any) -> None:
    clock.storage = site["disk"]
    order(plan, FaultMode.DELAY)
    result = site.run("disk-device", range(6), range(6), is_urgent=True, deadline=IN_TIME)
    assert result.outcomes.tolist() == [LATE] * 6
    assert result.reason == "its time was over"
    assert result.nbytes == 0
    assert site.ring.num_free == SLOTS - 2, "the second chunk was not begun, the time was over"
    new_owner = _noise(9)
    site["device"].write(np.arange(12, dtype=np.int32), new_owner)
    assert site["disk"].release() == 1
    wait_until_free(site.ring, SLOTS)
    assert np.array_equal(site["device"].read(np.arange(12, dtype=np.int32)), new_owner)
    clock.storage = None
    again = site.run("disk-device", range(6), range(6), deadline=IN_TIME)
    assert again.outcomes.tolist() == [OK] * 6
    assert np.array_equal(site.content("device", range(6)), site.wanted[:6])


def test_slots_come_back_each_when_its_own_read_ends(site: Any, plan: FaultPlan, clock: Any) -> None:
    clock.storage, clock.num_held = site["disk"], 2
    order(plan, FaultMode.DELAY, FaultMode.NEVER)
    result = site.run("disk-device", range(6), range(6, 12), deadline=IN_TIME)
    assert result.outcomes.tolist() == [LATE] * 6
    assert site["disk"].num_held == site["disk"].num_unanswered == 1, "a chunk is read while the one before is awaited"
    assert site.ring.num_free == 0
    clock.is_real = True
    stuck = site.run("disk-device", [0], [6], deadline=time.monotonic() + 0.01)
    assert stuck.outcomes.tolist() == [LATE], "it waits for a slot no longer than its time"
    assert site["disk"].release() == 1
    wait_until_free(site.ring, 2)
    assert site.ring.num_free == 2
    half = site.run("disk-device", range(5), range(6, 11), deadline=time.monotonic() + PATIENCE_S)
    assert half.outcomes.tolist() == [OK] * 5, "the rest of the ring goes on"
    assert site.ring.num_free == 2
    assert site["disk"].abandon() == 1
    assert site.ring.num_free == SLOTS
    assert np.array_equal(site.content("device", range(6, 11)), site.wanted[:5])


def test_read_without_deadline_is_waited_for(site: Any, plan: FaultPlan) -> None:
    order(plan, FaultMode.DELAY)
    thread, results = run_in_thread(site, "disk-device", range(2), range(2))
    assert site["disk"].wait_until_held(1, PATIENCE_S)
    assert results == []
    site["disk"].release()
    thread.join(PATIENCE_S)
    assert results[0].outcomes.tolist() == [OK] * 2


@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_write_is_answered_when_its_bytes_have_landed_however_late(
    make_site: MakeSite, plan: FaultPlan, clock: Any, kind: str
) -> None:
    site = make_site({"device": kind, "disk": "contiguous"}, staging_blocks=SLOTS, faults={"disk": plan}, clock=clock)
    wanted = site.fill("device")
    order(plan, FaultMode.DELAY, FaultMode.DELAY, on="write")
    clock.storage = site["disk"]
    thread, results = run_in_thread(site, "device-disk", range(6), range(6), deadline=IN_TIME)
    assert site["disk"].wait_until_held(1, PATIENCE_S)
    assert results == []
    assert site.ring.num_free == (SLOTS // 2 if kind == "by layer" else SLOTS)
    plan.is_on = False
    clock.storage = None  # the time is not over after all
    site["disk"].release()
    thread.join(PATIENCE_S)
    assert results[0].outcomes.tolist() == [OK] * 6
    assert site.ring.num_free == SLOTS
    assert np.array_equal(site.content("disk", range(6)), wanted[:6])


def test_write_that_is_never_answered_ends_with_the_storage(site: Any, plan: FaultPlan) -> None:
    order(plan, FaultMode.NEVER, on="write")
    thread, results = run_in_thread(site, "device-disk", range(2), range(2))
    assert site["disk"].wait_until_held(1, PATIENCE_S)
    assert site.ring.num_free == SLOTS - 2
    site["disk"].close()
    thread.join(PATIENCE_S)
    assert results[0].outcomes.tolist() == [FAILED] * 2
    assert site.ring.num_free == SLOTS


@pytest.mark.parametrize("closed", ["device", "disk"])
@pytest.mark.parametrize("route", ["device-disk", "disk-device"])
def test_storage_that_is_closed_fails_every_block_and_keeps_no_slot(site: Any, route: str, closed: str) -> None:
    site[closed].close()
    result = site.run(route, range(6), range(6))
    assert result.outcomes.tolist() == [FAILED] * 6
    assert "closed" in result.reason
    assert result.nbytes == 0
    assert site.ring.num_free == SLOTS


def test_read_that_is_refused_midway_costs_its_chunk_and_keeps_no_slot(site: Any) -> None:
    disk, calls = site["disk"], []
    submit = disk.submit_read

    def refuse_second(*arguments: Any, **names: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no room for another batch")
        return submit(*arguments, **names)

    disk.submit_read = refuse_second
    result = site.run("disk-device", range(6), range(6))
    assert result.outcomes.tolist() == [OK, OK, FAILED, FAILED, OK, OK]
    assert result.reason == "no room for another batch"
    assert site.ring.num_free == SLOTS
    assert np.array_equal(site.content("device", [0, 1, 4, 5]), site.wanted[[0, 1, 4, 5]])


def test_write_that_is_refused_midway_costs_its_chunk_and_keeps_no_slot(site: Any) -> None:
    disk, calls = site["disk"], []
    submit = disk.submit_write

    def refuse_first(*arguments: Any, **names: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError("no room for another batch")
        return submit(*arguments, **names)

    disk.submit_write = refuse_first
    result = site.run("device-disk", range(6), range(6))
    assert result.outcomes.tolist() == [FAILED] * (SLOTS // 2) + [OK] * 4
    assert result.reason == "no room for another batch"
    assert site.ring.num_free == SLOTS


@pytest.mark.parametrize("seed", range(12))
def test_no_block_that_is_called_good_is_wrong_whatever_the_storages_do(make_site: MakeSite, seed: int) -> None:
    rates = {FaultMode.FAIL: 0.15, FaultMode.TEAR: 0.15, FaultMode.FLIP: 0.15}
    faults = {name: FaultPlan(rates=rates, seed=seed, affects="some") for name in ("host", "disk")}
    kinds = {"device": "by layer", "host": "by head" if seed % 2 else "contiguous", "disk": "contiguous"}
    site = make_site(kinds, staging_blocks=1 + seed % 5, faults=faults)
    wanted = site.fill("device")
    ids = np.arange(6)
    names = {"host": {}, "disk": {}}  # slot -> block that lies there
    rng = np.random.default_rng(seed)
    routes = ["device-host", "device-disk", "host-disk", "disk-host", "host-device", "disk-device"]
    num_bad = 0
    for _ in range(30):
        source, destination = routes[int(rng.integers(6))].split("-")
        held = {int(i): int(i) for i in ids} if source == "device" else names[source]
        if not held:
            continue
        slots = list(held)
        targets = rng.permutation(6 if destination != "device" else np.arange(6, 12))[: len(slots)].tolist()
        result = site.run(f"{source}-{destination}", slots, targets, list(held.values()))
        num_bad += int((result.outcomes != OK).sum())
        for slot, target, outcome in zip(slots, targets, result.outcomes.tolist(), strict=True):
            if destination != "device":
                names[destination].pop(target, None)
                if outcome == OK:
                    names[destination][target] = held[slot]
            elif outcome == OK:
                assert np.array_equal(site.content("device", [target])[0], wanted[held[slot]])
        assert site.ring.num_free == 1 + seed % 5
    assert num_bad > 0


def _noise(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (12, 288), dtype=np.uint8)
