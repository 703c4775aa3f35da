"""The object store tier: known by a listing, by own writes and by probes; shared, bounded, and left alone when away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tier_site import MODEL, PATIENCE_S, Tiers, disk_layout, names
from toy_store import Objects, ToyStore

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.errors import PoolClosed, StorageError
from kvbm.jobs import CopyJob
from kvbm.manager import BlockManager
from kvbm.planner import Prefetch
from kvbm.types import Tier


class Remote(Tiers):
    """Tiers over a toy store."""

    def __init__(self, manager: BlockManager, store: ToyStore) -> None:
        super().__init__(manager)
        self.store = store

    @property
    def presence(self) -> Any:
        (presence,) = self.manager._planner.presences
        return presence

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Pump until the condition holds; jobs are answered by threads."""
        planner = self.manager._planner
        with planner._changed:
            assert planner._changed.wait_for(condition, PATIENCE_S)

    def wait_for_probes(self) -> None:
        """Let the background ask for what was missed, and hear the answer."""
        self.manager._planner.pump()
        self.wait_until(lambda: not (self.presence._wanted or self.presence.asked_at is not None))

    def settle_copies(self) -> None:
        """Wait until no copy is under way."""
        ledger = self.manager._planner._ledger
        self.wait_until(lambda: not any(isinstance(entry.job, CopyJob) for entry in ledger._open.values()))


@pytest.fixture
def objects() -> Objects:
    return {}


@pytest.fixture
def make_remote(backend: Backend, objects: Objects) -> Iterator[Callable[..., Remote]]:
    made: list[Remote] = []

    def make(*, device: int = 8, host: int = 8, rows: int = 64, is_listed: bool = True, **remote: Any) -> Remote:
        tree: dict[str, Any] = {"model": {**MODEL, "fingerprint": "toy"}, "device": {"num_blocks": device}}
        if host:
            tree["host"] = {"num_blocks": host}
        tree["remote"] = {"url": "memory://", **remote}
        store = ToyStore(disk_layout(rows), objects)
        manager = BlockManager(Config.from_dict(tree), backend=backend, storages={Tier.REMOTE: store})
        made.append(Remote(manager, store))
        if is_listed:
            made[-1].wait_until(lambda: not manager._planner.num_open_jobs)
        return made[-1]

    yield make
    for tiers in made:
        tiers.store.is_away = False
        tiers.manager.close()
        tiers.manager.check()
        assert all(status.active == 0 for status in tiers.manager.status().values())


@pytest.mark.parametrize("host", [8, 0])
def test_block_goes_down_to_the_store_and_comes_back_as_it_was(
    make_remote: Callable[..., Remote], objects: Objects, host: int
) -> None:
    tiers = make_remote(host=host)
    hashes = names(5)
    tiers.put_below(hashes, "remote")
    assert set(objects) == {name.tobytes() for name in hashes}
    hit = tiers.manager.match_sequence_hashes(hashes)
    assert hit.tiers == {"remote": 5}
    hit.release()
    assert tiers.num_hit(hashes) == 5


def test_other_worker_finds_at_its_start_what_one_has_stored(make_remote: Callable[..., Remote]) -> None:
    one = make_remote()
    hashes = names(6)
    one.put_below(hashes, "remote")
    assert make_remote().num_hit(hashes) == 6
    assert make_remote(rows=4).manager.lookup(hashes) == 0, "its view is too small for all: the youngest are kept"


def test_what_a_request_misses_is_asked_for_and_found_by_the_next(make_remote: Callable[..., Remote]) -> None:
    one, other = make_remote(), make_remote()
    hashes = names(6)
    one.put_below(hashes, "remote")
    assert other.manager.lookup(hashes) == 0, "it was stored after the listing"
    other.manager.match_sequence_hashes(hashes).release()
    other.wait_for_probes()
    assert other.store.asked == [6], "one question for all of them"
    assert other.num_hit(hashes) == 6


def test_what_is_absent_is_not_asked_for_again_for_a_while(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote(absent_s=0.05)
    hashes = names(3)
    for _ in range(5):
        tiers.manager.match_sequence_hashes(hashes).release()
        tiers.wait_for_probes()
    num_asked = len(tiers.store.asked)
    assert num_asked >= 1
    tiers.presence._absent.update(dict.fromkeys(tiers.presence._absent, -1.0))  # its time is over
    tiers.manager.match_sequence_hashes(hashes).release()
    tiers.wait_for_probes()
    assert len(tiers.store.asked) > num_asked or len(tiers.store.asked) >= 2


def test_requests_of_one_moment_are_asked_for_in_one_question(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote()
    tiers.store.gate.clear()
    prompts = [names(4) for _ in range(10)]
    for hashes in prompts:
        tiers.manager.match_sequence_hashes(hashes).release()
    tiers.store.gate.set()
    while tiers.presence._wanted:
        tiers.wait_for_probes()
    assert sum(tiers.store.asked) == 40
    assert len(tiers.store.asked) <= 3


def test_question_is_bounded_by_probe_blocks(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote(probe_blocks=3)
    tiers.manager.match_sequence_hashes(names(50)).release()
    tiers.wait_for_probes()
    assert tiers.store.asked == [3]


def test_absent_names_are_remembered_within_a_bound(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote()
    presence = tiers.presence
    object.__setattr__(presence._limits, "absent_blocks", 10)
    for _ in range(8):
        tiers.manager.match_sequence_hashes(names(4)).release()
        tiers.wait_for_probes()
    assert len(presence._absent) <= 10


def test_view_forgets_rows_and_the_store_keeps_its_objects(
    make_remote: Callable[..., Remote], objects: Objects
) -> None:
    tiers = make_remote(rows=4)
    first, second = names(4), names(4)
    tiers.put_below(first, "remote")
    tiers.put_below(second, "remote")
    assert tiers.lies("remote", first) == [False] * 4
    assert len(objects) == 8
    tiers.manager.match_sequence_hashes(first).release()
    tiers.wait_for_probes()
    assert tiers.num_hit(first) == 4, "it was asked for again"


def test_object_that_is_gone_is_a_miss_and_leaves_the_view(
    make_remote: Callable[..., Remote], objects: Objects
) -> None:
    tiers = make_remote()
    hashes = names(4)
    tiers.put_below(hashes, "remote")
    del objects[hashes[2].tobytes()]
    assert tiers.num_hit(hashes) == 2
    assert tiers.lies("remote", hashes) == [True, True, False, True]


def test_garbage_under_a_right_key_is_a_miss_and_is_removed(
    make_remote: Callable[..., Remote], objects: Objects
) -> None:
    tiers = make_remote()
    hashes = names(4)
    tiers.put_below(hashes, "remote")
    content, checksum = objects[hashes[1].tobytes()]
    objects[hashes[1].tobytes()] = bytes([content[0] ^ 1]) + content[1:], checksum
    assert tiers.num_hit(hashes) == 1
    tiers.wait_until(lambda: not tiers.manager._planner.num_open_jobs)
    assert hashes[1].tobytes() not in objects
    assert tiers.manager.statistics().mismatches["remote"] == 1


def test_store_out_of_reach_is_left_alone_and_loses_nothing(
    make_remote: Callable[..., Remote], objects: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = make_remote(away_s=3600.0)
    hashes = names(4)
    tiers.put_below(hashes, "remote")
    tiers.store.is_away = True
    assert tiers.num_hit(hashes) == 0
    assert tiers.presence.is_away
    assert "tier out of reach tier=remote" in caplog.text
    assert tiers.manager.lookup(hashes) == 0, "it counts as absent"
    assert tiers.lies("remote", hashes) == [True] * 4, "what is known of it is kept"
    fresh = names(3)
    tiers.put(fresh)
    tiers.manager.flush(PATIENCE_S)
    assert tiers.route("host-remote").dropped["away"] == 3
    tiers.store.is_away = False
    tiers.presence._away_until = -np.inf  # the hour is over
    assert tiers.num_hit(hashes) == 4
    assert len(objects) == 4


def test_probe_of_a_store_out_of_reach_says_nothing_about_its_blocks(make_remote: Callable[..., Remote]) -> None:
    one, other = make_remote(), make_remote(away_s=3600.0)
    hashes = names(3)
    one.put_below(hashes, "remote")
    other.store.is_away = True
    other.manager.match_sequence_hashes(hashes).release()
    other.wait_for_probes()
    assert other.presence.is_away
    assert not other.presence._absent


def test_reset_deletes_the_objects_before_it_returns(make_remote: Callable[..., Remote], objects: Objects) -> None:
    tiers = make_remote()
    hashes = names(6)
    tiers.put_below(hashes, "remote")
    tiers.manager.reset_blocks("remote", hashes[:2])
    assert set(objects) == {name.tobytes() for name in hashes[2:]}
    tiers.manager.reset_pool("remote")
    assert not objects


def test_reset_that_cannot_reach_the_store_says_so(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote()
    hashes = names(2)
    tiers.put_below(hashes, "remote")
    tiers.store.is_away = True
    with pytest.raises(
        StorageError, match=r"the remote tier could not forget 2 blocks, a restart may find them: .*not answer"
    ):
        tiers.manager.reset_blocks("remote", hashes)


def test_block_that_nobody_uses_leaves_the_view_and_not_the_store(
    make_remote: Callable[..., Remote], objects: Objects
) -> None:
    tiers = make_remote(ttl=3600)
    hashes = names(3)
    tiers.put_below(hashes, "remote")
    expiry = tiers.manager._planner._expiry
    now = expiry._clock() + 3 * 3600
    expiry._clock = lambda: now
    while expiry.step():
        pass
    assert tiers.lies("remote", hashes) == [False] * 3
    assert len(objects) == 3


def counts(prefetch: Prefetch) -> tuple[int, int, int, int]:
    return prefetch.accepted, prefetch.asked, prefetch.clipped, prefetch.rejected


def test_prefetch_asks_the_store_and_brings_what_it_has(make_remote: Callable[..., Remote]) -> None:
    one, other = make_remote(), make_remote(host=32)
    hashes, absent = names(6), names(2)
    one.put_below(hashes, "remote")
    other.put_below(absent[:1], "host")
    other.store.gate.clear()
    prefetch = other.manager.prefetch(np.concatenate([absent, hashes, hashes[:1]]))
    assert counts(prefetch) == (0, 7, 0, 2)
    assert "asked=7" in repr(prefetch)
    assert not prefetch.done()
    other.store.gate.set()
    assert prefetch.result(PATIENCE_S) == 6
    assert counts(prefetch) == (6, 0, 0, 3)
    assert all(other.lies("host", hashes))
    assert other.manager.statistics().prefetched == {"accepted": 6, "clipped": 0, "rejected": 3, "arrived": 6}
    again = other.manager.prefetch(hashes)
    assert (again.accepted, again.rejected) == (0, 6), "they are where they shall be"


def test_prefetch_brings_what_is_known_while_it_asks_for_the_rest(make_remote: Callable[..., Remote]) -> None:
    one, other = make_remote(), make_remote(host=32)
    hashes = names(6)
    one.put_below(hashes, "remote")
    with other.manager._planner._locked():
        other.presence.learn(hashes[::2], np.zeros((3, 2), dtype=np.uint64))
    other.store.gate.clear()
    prefetch = other.manager.prefetch(hashes)
    assert counts(prefetch) == (3, 3, 0, 0)
    other.wait_until(lambda: all(other.lies("host", hashes[::2])))
    other.settle_copies()
    assert not prefetch.done()
    other.store.gate.set()
    assert prefetch.result(PATIENCE_S) == 6
    assert other.num_hit(hashes) == 6


def test_cancelled_prefetch_brings_nothing_that_the_store_turns_out_to_have(
    make_remote: Callable[..., Remote],
) -> None:
    one, other = make_remote(), make_remote(host=32)
    hashes = names(6)
    one.put_below(hashes, "remote")
    other.store.gate.clear()
    prefetch = other.manager.prefetch(hashes)
    other.manager._planner.pump()
    assert prefetch.cancel()
    assert not prefetch.is_draining, "nothing moves"
    other.store.gate.set()
    other.wait_for_probes()
    assert other.lies("remote", hashes) == [True] * 6, "what was learned is kept"
    assert other.lies("host", hashes) == [False] * 6
    assert not other.manager._planner.loader.loading()


def test_prefetch_ends_at_its_deadline_although_the_store_does_not_answer(make_remote: Callable[..., Remote]) -> None:
    tiers = make_remote(away_s=3600.0)
    tiers.store.is_away = True
    tiers.manager.match_sequence_hashes(names(1)).release()
    tiers.wait_for_probes()
    assert tiers.presence.is_away
    prefetch = tiers.manager.prefetch(names(3), timeout=0.05)
    assert counts(prefetch) == (0, 3, 0, 0)
    assert prefetch.result(PATIENCE_S) == 0
    tiers.manager._planner.pump()
    assert not tiers.presence._asked, "nobody wishes for it any more"
    assert not tiers.manager._planner.loader.loading()


def test_close_ends_a_prefetch_that_the_store_has_not_answered(make_remote: Callable[..., Remote]) -> None:
    one, other = make_remote(), make_remote(host=32)
    hashes = names(4)
    one.put_below(hashes, "remote")
    with other.manager._planner._locked():
        other.presence.learn(hashes[:1], np.zeros((1, 2), dtype=np.uint64))
    other.store.gate.clear()
    prefetch = other.manager.prefetch(hashes)
    other.settle_copies()
    other.manager.close(0.01)
    with pytest.raises(PoolClosed):
        prefetch.result(PATIENCE_S)
    other.store.gate.set()


def test_nothing_waits_behind_a_listing(make_remote: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_remote()
    hashes = names(3)
    one.put_below(hashes, "remote")
    may_end = threading.Event()
    inventory = ToyStore.inventory

    def slow(store: ToyStore) -> Any:
        assert may_end.wait(PATIENCE_S)
        return inventory(store)

    monkeypatch.setattr(ToyStore, "inventory", slow)
    other = make_remote(is_listed=False)
    other.manager.match_sequence_hashes(hashes).release()
    other.wait_for_probes()
    assert other.num_hit(hashes) == 3
    other.manager.reset_blocks("remote", hashes[:1])
    may_end.set()
