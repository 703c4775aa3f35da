"""What goes down, what does not, and what is counted then (CONFORMANCE 29, 31)."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_site import MODEL, PATIENCE_S, Site, disk_layout, names

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.errors import ConfigError, StorageError, TransferTimeout
from kvbm.manager import BlockManager
from kvbm.planner import OffloadPolicy
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.testing.faults import FaultMode, FaultPlan
from kvbm.types import Tier


def test_block_that_is_below_already_is_not_copied_again(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.reset_pool("device")
    tiers.put(hashes)  # anew, as a request that did not look
    tiers.manager.flush(PATIENCE_S)
    assert (tiers.route("device-host").blocks, tiers.route("device-host").present) == (4, 4)
    assert (tiers.route("host-disk").blocks, tiers.route("host-disk").present) == (4, 0)
    assert tiers.num_hit(hashes) == 4
    tiers.see_idle()


def test_block_that_is_on_its_way_down_is_not_sent_again(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=16, settings={"offload": {"in_flight_share": 1.0}})
    gate = make_tiers.gate(tiers, "device-host")
    hashes = names(2)
    held = tiers.fill(hashes)
    gate.wait_for(1)
    tiers.manager.device.discard_blocks(held)  # so that the same names can be registered once more
    tiers.put(hashes)
    with pytest.raises(TransferTimeout, match=r"offloads from device to host did not end within 0 s; they go on"):
        tiers.manager.flush(0)
    assert tiers.route("device-host").present == 2
    gate.open()
    held.release()
    tiers.manager.flush(PATIENCE_S)
    assert (len(gate.copies("device-host")), tiers.route("device-host").blocks) == (1, 2)
    tiers.evict("device")
    assert tiers.num_hit(hashes) == 2
    tiers.see_idle()


def test_block_that_comes_up_is_not_copied_down_again(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    hashes = names(3)
    tiers.put_below(hashes, "host")
    assert tiers.num_hit(hashes) == 3
    tiers.manager.flush(PATIENCE_S)
    assert (tiers.route("device-host").blocks, tiers.route("device-host").present) == (3, 3)


def test_full_tier_below_drops_and_counts_and_takes_again_when_it_has_room(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=4, settings={"offload": {"in_flight_share": 1.0}})
    kept = names(4)
    tiers.put(kept)
    tiers.manager.flush(PATIENCE_S)
    ids = tiers.pool("host").lookup(kept)
    held, _ = tiers.pool("host").hold_blocks(ids, kept)
    refused = names(3)
    tiers.put(refused)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.route("device-host").dropped == {"no_room": 3}
    assert tiers.lies("host", refused) == [False] * 3
    assert tiers.num_hit(refused) == 3  # still above
    first, rest = held.split(1)
    first.release()
    partly = names(2)
    tiers.put(partly)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.lies("host", partly) == [True, False]  # the head of a prompt is what another can use
    assert tiers.route("device-host").dropped == {"no_room": 4}
    rest.release()
    later = names(4)
    tiers.put(later)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.lies("host", later) == [True] * 4
    tiers.see_idle()


def test_slow_tier_below_never_holds_up_a_request_and_drops_what_its_queue_has_no_room_for(make_tiers: Site) -> None:
    plan = FaultPlan(rates={FaultMode.DELAY: 1.0}, on="write")
    settings = {"offload": {"queue_blocks": 6, "in_flight_share": 0.25}}
    tiers = make_tiers(device=16, disk=64, faults=plan, settings=settings)
    storage: Any = tiers.manager.storage("disk")
    prompts = [names(4) for _ in range(20)]
    for prompt in prompts:
        tiers.put(prompt)  # each takes the place of an older one: nothing waits for the disk
    assert storage.wait_until_held(1)
    assert tiers.route("device-disk").in_flight <= 4
    assert tiers.route("device-disk").queued <= 6
    plan.is_on = False
    storage.release()
    tiers.manager.flush(PATIENCE_S)
    counters = tiers.route("device-disk")
    assert set(counters.dropped) <= {"queue_full", "evicted", "orphaned"}
    assert counters.blocks + counters.dropped.total() == 80
    assert counters.dropped.total() > 0
    last = names(4)
    tiers.put_below(last, "disk")
    assert tiers.num_hit(last) == 4
    tiers.see_idle()


def test_block_that_moves_down_is_not_evicted_meanwhile(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=32)
    gate = make_tiers.gate(tiers, "device-host")
    hashes = names(2)
    tiers.put(hashes)
    gate.wait_for(1)
    assert tiers.manager.device.available_blocks == 6
    assert tiers.manager.try_allocate_blocks(7) is None
    with tiers.manager.allocate_blocks(6) as blocks:
        assert not set(blocks.block_ids.tolist()) & set(tiers.pool("device").lookup(hashes).tolist())
        gate.open()
        tiers.manager.flush(PATIENCE_S)
    assert tiers.route("device-host").blocks == 2
    tiers.see_idle()


def test_block_that_was_evicted_while_it_waited_takes_its_descendants_along(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=32, settings={"offload": {"in_flight_share": 0.125}})
    gate = make_tiers.gate(tiers, "device-host")
    first, prompt = names(1), names(3)
    tiers.put(first)
    gate.wait_for(1)
    held = tiers.fill(prompt)
    head, tail = held.split(1)
    tiers.manager.device.discard_blocks(head)
    head.release()
    gate.open()
    tiers.manager.flush(PATIENCE_S)
    tail.release()
    assert tiers.lies("host", prompt)[0] is False
    assert tiers.route("device-host").dropped["evicted"] == 1
    tiers.see_idle()


def test_flush_waits_for_what_was_registered_before_it_and_for_nothing_after(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=32, disk=64)
    for _ in range(20):
        hashes = names(3)
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
        assert tiers.lies("host", hashes) == [True] * 3
        assert tiers.lies("disk", hashes) == [True] * 3


# -- trouble below ---------------------------------------------------------------------------------------------


class FullDisk(OsCalls):
    """Writes of blocks find no room while `is_full`."""

    def __init__(self) -> None:
        self.is_full = False

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, buffers, offset)


@pytest.mark.parametrize("host", [0, 8])
def test_disk_that_is_full_drops_offloads_and_takes_them_again_when_it_has_room(make_tiers: Site, host: int) -> None:
    calls = FullDisk()
    disk = DiskStorage(disk_layout(16), make_tiers.disk_path, os_calls=calls)
    tiers = make_tiers(device=8, host=host, storages={Tier.DISK: disk})
    calls.is_full = True
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    route = "host-disk" if host else "device-disk"
    assert tiers.route(route).dropped == {"failed": 4}
    assert tiers.lies("disk", hashes) == [False] * 4
    assert "no space left" in disk.counters.last_error.lower()
    assert tiers.num_hit(hashes) == 4  # from above
    calls.is_full = False
    later = names(4)
    tiers.put_below(later, "disk")
    assert tiers.num_hit(later) == 4
    tiers.see_idle()


@pytest.mark.parametrize("mode", [FaultMode.FAIL, FaultMode.TEAR, FaultMode.FLIP])
def test_write_that_goes_wrong_is_dropped_or_found_on_the_way_up(make_tiers: Site, mode: FaultMode) -> None:
    plan = FaultPlan([mode], on="write", seed=3)
    tiers = make_tiers(device=8, host=8, disk=16, faults=plan)
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.reset_pool("device")
    tiers.manager.reset_pool("host")
    num_right = tiers.num_hit(hashes)
    assert num_right < 4
    assert num_right == tiers.num_hit(hashes)
    if mode is FaultMode.FAIL:
        assert tiers.route("host-disk").dropped == {"failed": 1}
    else:
        assert tiers.manager.statistics().mismatches == {"disk": 1}
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.reset_pool("device")
    tiers.manager.reset_pool("host")
    assert tiers.num_hit(hashes) == 4
    tiers.see_idle()


class Refusing(OffloadPolicy):
    """Raises, answers nonsense, or takes everything, as told."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def registered(self, candidates: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else np.ones(len(candidates), dtype=np.bool_)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_offload_policy_that_fails_costs_its_blocks_and_is_logged(
    make_tiers: Site, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Refusing()
    tiers = make_tiers(device=8, host=16, offload_policy=policy)
    with caplog.at_level(logging.ERROR, logger="kvbm.planner"):
        for answer in (ValueError("no idea"), np.ones(9, dtype=np.bool_), "what"):
            policy.answers.append(answer)
            hashes = names(2)
            tiers.put(hashes)
            tiers.manager.flush(PATIENCE_S)
            assert tiers.lies("host", hashes) == [False] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "offload policy failed policy=Refusing num_blocks=2"
    ] * 3
    assert tiers.route("device-host").dropped == {"policy_failed": 6}
    hashes = names(2)
    tiers.put_below(hashes, "host")
    assert tiers.num_hit(hashes) == 2
    tiers.see_idle()


# -- how it is turned on and off -------------------------------------------------------------------------------


def test_offload_that_is_forbidden_refuses_a_lower_tier(backend: Backend) -> None:
    with pytest.raises(ConfigError, match="enable_offload is false"):
        Config.from_dict(
            {"model": MODEL, "device": {"num_blocks": 4}, "host": {"num_blocks": 8}, "enable_offload": False}
        )
    config = Config.from_dict({"model": MODEL, "device": {"num_blocks": 4}, "enable_offload": False})
    with BlockManager(config, backend=backend) as manager:
        assert list(manager.status()) == ["device"]
        manager.flush(0)


def test_two_managers_on_one_directory_are_refused_and_the_first_goes_on(make_tiers: Site, tmp_path: Path) -> None:
    tiers = make_tiers(device=4, disk=8)
    path = Path(tiers.manager.storage("disk").path).parent  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"this slab is in use by .*: give each storage a directory or a slab name"):
        make_tiers(device=4, disk=8, settings={"disk": {"path": str(path)}})
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 3
    tiers.manager.close()
    again = make_tiers(device=4, disk=8, settings={"disk": {"path": str(path)}})
    assert again.num_hit(hashes) == 3, "the next one finds what the first has left"


def test_directory_that_cannot_be_written_is_refused_and_named(make_tiers: Site, tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    with pytest.raises(StorageError, match="not/there"):
        make_tiers(device=4, disk=8, settings={"disk": {"path": str(missing)}})
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(StorageError, match="file"):
        make_tiers(device=4, disk=8, settings={"disk": {"path": str(in_the_way)}})
    assert make_tiers.managers == []


class ReadOnly(OsCalls):
    """A directory that is mounted read-only, also for the superuser."""

    def open(self, path: Any, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return super().open(path, flags, mode, dir_fd=dir_fd)


def test_read_only_directory_is_refused_and_what_was_made_is_let_go(
    make_tiers: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.storage.disk.storage.OsCalls", ReadOnly)
    with pytest.raises(StorageError, match=r"read-only|cannot be written|not writable") as caught:
        make_tiers(device=4, host=4, disk=8)
    assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert make_tiers.managers == []
