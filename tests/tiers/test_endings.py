"""What comes late or in the middle: an interrupted opening, I/O that outlasts its manager, callbacks that load more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tier_site import PATIENCE_S, GatedExecutor, Site, Tiers, disk_layout, names

from kvbm._backend import Backend
from kvbm.planner import Planner
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.calls import OsCalls
from kvbm.types import Tier

PRECIOUS = b"precious" * 4096


@pytest.fixture
def site(tmp_path: Path, backend: Backend) -> Iterator[Site]:
    before = set(threading.enumerate())
    site = Site(tmp_path, backend)
    yield site
    for manager in site.managers:
        manager.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} is left"


def test_ctrl_c_while_tiers_are_restored_leaves_no_thread_and_the_slab_free(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Planner.restore

    def interrupted(self: Planner) -> Any:
        restore(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Planner, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            site(device=4, disk=4)
    site(device=4, disk=4)


class Hanging(OsCalls):
    """Writes of one file wait at a gate."""

    def __init__(self) -> None:
        self.fd = -1
        self.gate, self.has_come = threading.Event(), threading.Event()

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if fd == self.fd:
            self.has_come.set()
            assert self.gate.wait(PATIENCE_S)
        return super().pwritev(fd, buffers, offset)


def test_a_write_that_outlasts_its_manager_records_into_no_other_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Hanging()
    disk = DiskStorage(disk_layout(8), tmp_path / "slab", os_calls=calls)
    calls.fd = disk._slab.fd
    may_record, has_recorded, record = threading.Event(), threading.Event(), disk.record

    def record_late(*arguments: Any, **fields: Any) -> None:
        assert may_record.wait(PATIENCE_S)
        try:
            record(*arguments, **fields)
        finally:
            has_recorded.set()

    monkeypatch.setattr(disk, "record", record_late)
    tiers = site(device=8, storages={Tier.DISK: disk})
    tiers.put(names(1))
    assert calls.has_come.wait(PATIENCE_S)
    tiers.manager.close(0.01)
    calls.gate.set()
    assert disk._slab.wait_until_closed(PATIENCE_S)
    disk.close(PATIENCE_S)
    victims = [(tmp_path / f"victim{i}").open("w+b") for i in range(8)]  # they get its descriptors
    for victim in victims:
        victim.write(PRECIOUS)
        victim.flush()
    may_record.set()
    assert has_recorded.wait(PATIENCE_S)
    for victim in victims:
        victim.seek(0)
        assert victim.read() == PRECIOUS
        victim.close()


def test_callbacks_in_both_threads_of_a_disk_may_load_more_from_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm.assembly.Executor", GatedExecutor)
    tiers = site(device=32, disk=32)
    first, more = [names(2) for _ in range(2)], [names(2) for _ in range(2)]
    for hashes in (*first, *more):
        tiers.put_below(hashes, "disk")
    gate = site.gate(tiers, "disk-device")
    are_in = threading.Barrier(2)
    nums: list[int] = []
    are_done = threading.Semaphore(0)

    def load_more(i: int) -> None:
        try:
            are_in.wait(PATIENCE_S)
            nums.append(_num_loaded(tiers, more[i]))
        finally:
            are_done.release()

    transfers = []
    for i in range(2):
        transfers.append(tiers.manager.onboard(tiers.manager.match_sequence_hashes(first[i])))
        transfers[-1].add_done_callback(lambda _, i=i: load_more(i))  # type: ignore[misc]
    gate.open()
    assert all(are_done.acquire(timeout=PATIENCE_S) for _ in transfers)
    assert nums == [2, 2]
    for transfer in transfers:
        transfer.result(0).release()
    tiers.see_idle()


def _num_loaded(tiers: Tiers, hashes: Any) -> int:
    """Load by way of a wait without a limit."""
    blocks = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes), timeout=5.0).result()
    num_blocks = len(blocks)
    blocks.release()
    return num_blocks
