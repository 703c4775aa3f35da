"""One store and several workers: what one writes the others find, and nobody is served bytes of another's shard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_site import PATIENCE_S, Site, Tiers, content_of, names

from kvbm.types import HashArray, Tier

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")

WRITE = """
import sys
import numpy as np
from pathlib import Path
from kvbm._backend import load_backend
from tier_site import Site

if __name__ == "__main__":
    site = Site(Path(sys.argv[1]), load_backend(sys.argv[2]))
    tiers = site(device=8, settings={"remote": {"url": sys.argv[3]}})
    hashes = np.frombuffer(bytes.fromhex(sys.argv[4]), dtype=np.uint64).reshape(-1, 2)
    tiers.put(hashes)
    tiers.manager.flush(60)
    print(tiers.route("device-remote").blocks, tiers.num_hit(hashes))
    tiers.manager.close()
"""

MakeWorker = Callable[..., Tiers]


@pytest.fixture
def make_worker(make_tiers: Site) -> MakeWorker:
    url = (make_tiers.directory / "objects").as_uri()

    def make(*, rank: int = 0, num_ranks: int = 1, device: int = 8, **tiers: Any) -> Tiers:
        settings = {"remote": {"url": url, "absent_s": 1e-3}, "runtime": {"rank": rank, "num_ranks": num_ranks}}
        settings["runtime"]["copy_threads"] = 1
        return make_tiers(device=device, settings=settings, **tiers)

    return make


def find(tiers: Tiers, hashes: HashArray) -> None:
    """Match until the store was asked for all of these."""
    planner = tiers.manager._planner
    (presence,) = planner.presences
    for _ in range(1000):
        tiers.manager.match_sequence_hashes(hashes).release()
        planner.pump()
        with planner._changed:
            assert planner._changed.wait_for(lambda: presence.asked_at is None, PATIENCE_S)
        if tiers.manager.lookup(hashes) == len(hashes):
            return
    raise AssertionError("the store was asked in vain")


def test_two_workers_find_what_the_other_writes_by_listing_and_by_asking(make_worker: MakeWorker) -> None:
    one = make_worker()
    first, second, third = names(4), names(4), names(4)
    one.put_below(first, "remote")
    other = make_worker()
    other.settle()  # the listing
    assert other.num_hit(first) == 4, "by the listing"
    one.put_below(second, "remote")
    other.put_below(third, "remote")
    find(other, second)
    find(one, third)
    assert (other.num_hit(second), one.num_hit(third)) == (4, 4)
    one.manager.reset_blocks("remote", first)
    assert other.manager.lookup(first[:1]) == 1, "it lies in its own device tier"
    other.manager.reset_pool("device")
    assert other.num_hit(first) == 0, "deleted by another: a miss"
    assert other.manager.statistics().mismatches == {}


def test_worker_finds_what_another_process_has_written(
    make_tiers: Site, make_worker: MakeWorker, tmp_path: Path
) -> None:
    before, hashes = make_worker(), names(5)
    before.settle()
    script = tmp_path / "write.py"
    script.write_text(WRITE)
    url = (make_tiers.directory / "objects").as_uri()
    arguments = [str(tmp_path / "child"), make_tiers.backend.name, url, hashes.tobytes().hex()]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("5 5\n", 0), done.stderr
    assert before.manager.lookup(hashes) == 0
    find(before, hashes)
    assert before.num_hit(hashes) == 5
    after = make_worker()
    after.settle()
    assert after.num_hit(hashes) == 5


def test_ranks_of_one_model_never_see_each_others_shards(make_worker: MakeWorker) -> None:
    hashes = names(4)
    ranks = [make_worker(rank=rank, num_ranks=2) for rank in range(2)]
    shards = [content_of(hashes), ~content_of(hashes)]
    for tiers, shard in zip(ranks, shards, strict=True):
        fresh = tiers.manager.allocate_blocks(4)
        tiers.manager.storage("device").write(fresh.block_ids, shard)
        tiers.manager.register_blocks(fresh.complete(hashes)).release()
        tiers.manager.flush(PATIENCE_S)
        tiers.manager.reset_pool("device")
    again = [make_worker(rank=rank, num_ranks=2) for rank in range(2)]
    alone = make_worker()
    for tiers in (*again, alone):
        tiers.settle()
    for tiers, shard in zip([*ranks, *again], [*shards, *shards], strict=True):
        with tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes)).result(PATIENCE_S) as blocks:
            assert len(blocks) == 4
            np.testing.assert_array_equal(tiers.manager.storage("device").read(blocks.block_ids), shard)
    alone.manager.match_sequence_hashes(hashes).release()
    alone.manager._planner.pump()
    alone.settle()
    assert alone.manager.lookup(hashes) == 0, "one worker of the whole model has other blocks"


def test_garbage_is_met_once_by_a_worker(make_worker: MakeWorker, tmp_path: Path) -> None:
    one, hashes = make_worker(), names(2)
    one.put_below(hashes, "remote")
    objects = [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]
    assert len(objects) == 2
    for path in objects:
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    assert one.num_hit(hashes) == 0
    storage: Any = one.manager.storage("remote")
    assert storage.counters.num_garbage == 2
    for _ in range(5):
        one.manager.match_sequence_hashes(hashes).release()
        one.manager._planner.pump()
        one.settle()
        assert one.manager.lookup(hashes) == 0
    assert storage.counters.num_garbage == 2
    one.put_below(hashes, "remote")
    assert one.num_hit(hashes) == 2


def test_restart_uploads_nothing_of_what_the_disk_tier_holds(make_worker: MakeWorker, make_tiers: Site) -> None:
    disk = {"disk": 64, "device": 64}
    path = make_tiers.directory / "slab"
    settings = {"disk": {"path": str(path)}, "remote": {"url": (make_tiers.directory / "objects").as_uri()}}
    one, hashes = make_tiers(**disk, settings=settings), names(32)
    one.put(hashes)
    one.manager.flush(PATIENCE_S)
    assert one.route("disk-remote").blocks == 32
    one.manager.close()
    again = make_tiers(**disk, settings=settings)
    assert all(again.lies("disk", hashes))
    again.settle()
    again.manager.flush(PATIENCE_S)
    again.settle()
    counters = again.manager.statistics().route(Tier.DISK, Tier.REMOTE)
    assert (counters.blocks, counters.queued, counters.in_flight) == (0, 0, 0)
