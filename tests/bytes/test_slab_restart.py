"""A manager on a directory that another one left: warm, right, and without anything that was reset."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_site import PATIENCE_S, GatedExecutor, Site, Tiers, names, open_files

from kvbm._backend import Backend
from kvbm.errors import SlabFormatError, StorageError
from kvbm.types import Tier


class Restarts:
    """Makes managers on one directory after the other; what is left of one is copied, as a kill leaves it."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self.site = Site(folder, backend)
        self.folder = folder
        self.num_lives = 0

    @property
    def path(self) -> Path:
        return self.folder / f"life{self.num_lives}"

    def open(
        self, *, device: int = 32, host: int = 32, disk: int = 64, settings: dict[str, dict[str, Any]] | None = None
    ) -> Tiers:
        given = {section: dict(keys) for section, keys in (settings or {}).items()}
        given["disk"] = {"num_blocks": disk, "path": str(self.path), **given.get("disk", {})}
        return self.site(device=device, host=host, settings=given)

    def kill(self, **arguments: Any) -> Tiers:
        """Open what the files hold at this moment; the manager before goes on and changes nothing of it."""
        self.copy()
        return self.open(**arguments)

    def copy(self) -> None:
        before = self.path
        self.num_lives += 1
        shutil.copytree(before, self.path)


@pytest.fixture
def restarts(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarts]:
    monkeypatch.setattr("kvbm.assembly.Executor", GatedExecutor)
    before = set(threading.enumerate())
    restarts = Restarts(tmp_path, backend)
    yield restarts
    for gate in restarts.site.gates:
        gate.open()
    for manager in restarts.site.managers:
        manager.close()
        manager.check()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} is left"
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("direct_io", [True, False])
def test_first_matches_hit_after_a_restart(restarts: Restarts, is_killed: bool, direct_io: bool) -> None:
    settings = {"disk": {"direct_io": direct_io}}
    tiers = restarts.open(settings=settings)
    first, second = names(20), names(7)
    tiers.put(first)
    tiers.put(second)
    tiers.manager.flush(PATIENCE_S)
    if not is_killed:
        tiers.manager.close()
    tiers = restarts.kill(settings=settings) if is_killed else restarts.open(settings=settings)
    assert tiers.lies("disk", first) == [True] * 20
    assert [tiers.num_hit(first), tiers.num_hit(second), tiers.num_hit(names(1))] == [20, 7, 0]
    tiers.see_idle()


def test_parents_are_known_after_a_restart(restarts: Restarts) -> None:
    tiers = restarts.open()
    hashes = names(5)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers = restarts.kill()
    pool = tiers.pool("disk")
    _, parents, _ = pool.describe_blocks(pool.lookup(hashes))
    assert parents.tolist() == [[0, 0], *hashes[:-1].tolist()]


def test_a_hole_made_by_damage_ends_the_hit_and_costs_nothing_else(restarts: Restarts) -> None:
    tiers = restarts.open()
    hashes = names(10)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    (slot,) = tiers.pool("disk").lookup(hashes[6:7]).tolist()
    tiers.manager.close()
    with (restarts.path / "rank0.index").open("r+b") as file:
        file.seek(8192 + slot * 64 + 20)
        file.write(b"\xff\x00\xff")
    tiers = restarts.open()
    assert tiers.lies("disk", hashes) == [True] * 6 + [False] + [True] * 3
    assert [tiers.num_hit(hashes), tiers.num_hit(hashes[7:])] == [6, 3]


def test_recency_and_priority_decide_what_goes_after_a_restart(restarts: Restarts) -> None:
    tiers = restarts.open(disk=12)
    old, used, dear = names(3), names(3), names(3)
    for hashes in (dear, used, old):
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
    tiers.manager.set_priority(dear, 90)
    for hashes in (dear, used):  # younger than `old` from now on
        assert tiers.num_hit(hashes) == 3
    tiers.manager.flush(PATIENCE_S)
    tiers.settle()
    tiers.manager.close()
    tiers = restarts.open(disk=12)
    pool = tiers.pool("disk")
    assert sum(map(sum, (tiers.lies("disk", hashes) for hashes in (old, used, dear)))) == 9
    pool.allocate_blocks(6).release()
    assert [sum(tiers.lies("disk", hashes)) for hashes in (old, used, dear)] == [0, 3, 3]
    pool.allocate_blocks(7).release()
    assert tiers.lies("disk", used) == [True, True, False], "a tail goes before its head"


def test_a_slab_may_grow_and_shrink_between_lives(restarts: Restarts) -> None:
    tiers = restarts.open(disk=16)
    hashes = names(16)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.close()
    tiers = restarts.open(disk=64)
    assert tiers.num_hit(hashes) == 16
    tiers.manager.close()
    tiers = restarts.open(disk=8)
    assert sum(tiers.lies("disk", hashes)) == 8
    for i in range(16):
        tiers.num_hit(hashes[i : i + 1])
    tiers.see_idle()


# -- what must not come back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset_blocks", "reset_pool", "reset_all"])
def test_what_was_reset_does_not_come_back_after_a_kill(restarts: Restarts, how: str) -> None:
    tiers = restarts.open()
    kept, gone = names(6), names(6)
    tiers.put(kept)
    tiers.put(gone)
    tiers.manager.flush(PATIENCE_S)
    if how == "reset_blocks":
        assert len(tiers.manager.reset_blocks("disk", gone).reset) == 6
    elif how == "reset_pool":
        assert tiers.manager.reset_pool("disk") == 12
    else:
        tiers.manager.reset_all()
    num_kept = 6 if how == "reset_blocks" else 0
    for _ in range(2):
        tiers = restarts.kill()
        assert [tiers.num_hit(gone), tiers.num_hit(kept)] == [0, num_kept]


@pytest.mark.parametrize("how", ["reset_blocks", "reset_pool", "reset_all"])
def test_what_was_reset_on_its_way_down_does_not_come_back_after_a_kill(restarts: Restarts, how: str) -> None:
    tiers = restarts.open(device=0, settings={"offload": {"job_blocks": 2, "route_jobs": 1}})
    gate = restarts.site.gate(tiers, "host-disk")
    hashes = names(8)
    tiers.put(hashes)
    gate.wait_for(1)  # two move, the others wait
    ended: list[str] = []

    def reset() -> None:
        if how == "reset_blocks":
            tiers.manager.reset_blocks("disk", hashes)
        elif how == "reset_pool":
            tiers.manager.reset_pool("disk")
        else:
            tiers.manager.reset_all()
        restarts.copy()  # as soon as it has returned
        ended.append(how)

    thread = threading.Thread(target=reset)
    thread.start()
    thread.join(0.2)
    assert not ended, "it waits for what moves: that will leave a record"
    gate.open()
    thread.join(PATIENCE_S)
    assert ended == [how]
    tiers = restarts.open()
    assert tiers.lies("disk", hashes) == [False] * 8
    assert tiers.num_hit(hashes) == 0


def test_a_block_that_the_pool_has_evicted_is_forgotten_by_name(restarts: Restarts) -> None:
    """Its bytes still lie in a slot that nobody has taken again."""
    tiers = restarts.open()
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.evict("disk")
    assert tiers.lies("disk", hashes) == [False] * 4
    again = restarts.kill()
    assert again.lies("disk", hashes) == [True] * 4, "a restart finds what is whole"
    again.manager.reset_blocks("disk", hashes[:2])
    again = restarts.kill()
    assert again.lies("disk", hashes) == [False, False, True, True]
    again.evict("disk")
    again.manager.reset_blocks("disk", hashes[2:3])
    assert restarts.kill().lies("disk", hashes) == [False, False, False, True]


def test_a_corrupt_block_leaves_no_record(restarts: Restarts) -> None:
    tiers = restarts.open()
    hashes = names(5)
    tiers.put_below(hashes, "disk")
    tiers.spoil_disk(hashes[2], 100)
    assert tiers.num_hit(hashes) == 2
    tiers.settle()
    tiers = restarts.kill()
    assert tiers.lies("disk", hashes) == [True, True, False, True, True]


@pytest.mark.parametrize("change", [{"fingerprint": "other weights"}, {"num_layers": 2}])
def test_another_model_is_refused_or_starts_empty(restarts: Restarts, change: dict[str, Any]) -> None:
    tiers = restarts.open()
    hashes = names(5)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    tiers.manager.close()
    before = {path.name: path.read_bytes() for path in restarts.path.iterdir()}
    with pytest.raises(SlabFormatError, match=r"is of another model or layout: it has .*, expected .* on_mismatch"):
        restarts.open(settings={"model": change})
    after = {path.name: path.read_bytes() for path in restarts.path.iterdir()}
    assert after | {"rank0.lock": b""} == before | {"rank0.lock": b""}, "nothing has changed"
    tiers = restarts.open(settings={"model": change, "disk": {"on_mismatch": "replace"}})
    assert tiers.lies("disk", hashes) == [False] * 5
    tiers.manager.close()
    tiers = restarts.open(settings={"disk": {"on_mismatch": "replace"}})
    assert tiers.lies("disk", hashes) == [False] * 5, "nor does it come back under its own name"


def test_a_reset_that_cannot_be_written_says_so_and_the_manager_lives(
    restarts: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = restarts.open()
    hashes = names(4)
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    storage: Any = tiers.manager.storage(Tier.DISK)

    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(storage._slab.index._os, "fdatasync", refuse, raising=False)
        with pytest.raises(StorageError, match=r"could not forget its blocks, a restart may find them: .*Input/output"):
            tiers.manager.reset_pool("disk")
        assert tiers.lies("disk", hashes) == [False] * 4, "nobody here finds them any more"
        more = names(3)
        tiers.put_below(more, "disk")
        assert tiers.num_hit(more) == 3
    assert tiers.manager.reset_pool("disk") == 3
    assert restarts.kill().lies("disk", np.concatenate([hashes, more])) == [False] * 7
    tiers.see_idle()
