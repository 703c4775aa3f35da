"""Reads through the ring in chunks of bounded bytes, up to four ahead: order, bounds, slow ones, ends; its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keyed_site import PATIENCE_S, Call, KeyedSite

from kvbm.jobs import Outcome
from kvbm.types import Tier

MakeKeyed = Callable[..., KeyedSite]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._CHUNK_NBYTES", MIB)


@pytest.mark.parametrize(
    ("nbytes", "slots", "num_blocks", "chunks", "num_ahead"),
    [
        (1 << 16, 64, 72, [16] * 4 + [8], 4),
        (1 << 16, 128, 80, [16] * 5, 4),  # there is room for more, and no more are read ahead
        (1 << 16, 8, 20, [4] * 5, 2),  # half of the ring each
        (1 << 16, 3, 5, [1] * 5, 3),
        (1 << 16, 1, 3, [1] * 3, 1),
        (1 << 20, 8, 6, [1] * 6, 4),
        (1 << 21, 4, 5, [1] * 5, 4),  # one block is more than a chunk
        (1 << 16, 64, 1, [1], 1),
    ],
)
def test_blocks_are_read_in_chunks_some_of_them_ahead(
    make_keyed: MakeKeyed, nbytes: int, slots: int, num_blocks: int, chunks: list[int], num_ahead: int
) -> None:
    site = make_keyed(num_blocks=num_blocks, nbytes=nbytes, staging_blocks=slots)
    site.fill_store(num_blocks)
    store = site.store
    store.is_held = True
    thread = site.begin(site.job(Tier.REMOTE, Tier.DEVICE, num_blocks))
    for i in range(len(chunks)):
        num_open = min(num_ahead, len(chunks) - i)
        store.wait_for(i + num_open)
        open_calls = store.calls[i:]
        rows = np.concatenate([call.rows for call in open_calls])
        assert len(np.unique(rows)) == len(rows) <= slots, "each has slots of its own"
        assert len(open_calls) == num_open
        store.end(store.calls[i])
    thread.join(PATIENCE_S)
    assert [len(call.ids) for call in store.calls] == chunks
    assert np.concatenate([call.ids for call in store.calls]).tolist() == list(range(num_blocks)), "in order"
    assert np.concatenate([call.hashes for call in store.calls]).tolist() == site.hashes.tolist()
    assert not site.results[0].outcomes.any()
    assert np.array_equal(site.device.read(site.ids), site.data)
    assert site.ring.num_free == slots


def test_slow_chunk_is_waited_for_while_those_behind_it_have_come(make_keyed: MakeKeyed) -> None:
    site = make_keyed(num_blocks=80, staging_blocks=64)
    site.fill_store(80)
    site.store.is_held = True
    thread = site.begin(site.job(Tier.REMOTE, Tier.DEVICE, 80))
    site.store.wait_for(4)
    for call in site.store.calls[1:4]:
        site.store.end(call)
    assert len(site.store.calls) == 4, "the ring is full of them"
    assert site.ring.num_free == 0
    site.store.end(site.store.calls[0])
    site.store.wait_for(5)
    site.store.end(site.store.calls[4])
    thread.join(PATIENCE_S)
    assert not site.results[0].outcomes.any()
    assert np.array_equal(site.device.read(site.ids), site.data)


def test_job_whose_time_ends_between_chunks_keeps_what_has_come(make_keyed: MakeKeyed) -> None:
    """Slots of chunks that were begun come back each when its own read ends, and nothing of them lands."""
    now = [0.0]
    site = make_keyed(num_blocks=80, staging_blocks=64, clock=lambda: now[0])
    site.fill_store(80)
    store = site.store

    def take(call: Call) -> Any:
        store.calls.append(call)
        if len(store.calls) == 1:
            store.end(call)
        if len(store.calls) == 4:
            now[0] = 10.0  # the time passes while the second is awaited
        return call.transfer

    store._take = take  # type: ignore[method-assign]
    result = site.up(80, Tier.DEVICE, deadline=5.0)
    assert [len(call.ids) for call in store.calls] == [16] * 4, "no other is begun"
    assert result.outcomes.tolist() == [Outcome.OK] * 16 + [Outcome.LATE] * 64
    assert result.reason == "its time was over"
    assert result.nbytes == MIB
    assert site.ring.num_free == 16
    for i, num_free in ((2, 32), (1, 48), (3, 64)):
        store.end(store.calls[i])
        assert site.ring.num_free == num_free
    assert np.array_equal(site.device.read(site.ids[:16]), site.data[:16])
    assert not site.device.read(site.ids[16:]).any()


def test_interrupt_costs_the_ring_no_slot(make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_keyed(num_blocks=80, staging_blocks=64)
    site.fill_store(80)
    site.store.is_held = True

    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(site.executor._means, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.up(80, Tier.DEVICE)
    monkeypatch.undo()
    assert site.ring.num_free == 0, "they are still written to"
    site.store.is_held = False
    for i, call in enumerate(site.store.calls[::-1]):
        assert site.ring.num_free == 16 * i
        site.store.end(call)
    assert site.ring.num_free == 64
    assert not site.device.read(site.ids).any()
    assert not site.up(80, Tier.DEVICE).outcomes.any()


def test_chunk_that_fails_costs_its_blocks_alone(make_keyed: MakeKeyed) -> None:
    site = make_keyed(num_blocks=48, staging_blocks=64)
    site.fill_store(48)
    for place in (17, 20):
        del site.store.objects[site.hashes[place].tobytes()]
    result = site.up(48, Tier.DEVICE)
    assert np.flatnonzero(result.outcomes == Outcome.FAILED).tolist() == [17, 20]
    assert result.reason == "read error"
    good = np.flatnonzero(result.outcomes == Outcome.OK)
    assert len(good) == 46
    assert np.array_equal(site.device.read(good.astype(np.int32)), site.data[good])
    assert site.ring.num_free == 64


@pytest.mark.parametrize(
    ("nbytes", "num_slots"),
    [(96, 8192), (4096, 8192), (4128, 4096), (1 << 16, 512), (1 << 20, 32), (1 << 22, 16)],
)
def test_ring_that_is_not_told_its_size_takes_32_mib_and_at_least_16_slots(
    make_keyed: MakeKeyed, nbytes: int, num_slots: int
) -> None:
    site = make_keyed(num_blocks=2, nbytes=nbytes, staging_blocks=0)
    assert site.ring.num_slots == num_slots
    assert site.ring.memory.nbytes == max(32 * MIB, 16 * nbytes)
    site.fill_store(2)
    assert not site.up(2, Tier.DEVICE).outcomes.any()


def test_ring_takes_the_slots_that_it_is_told(make_keyed: MakeKeyed) -> None:
    assert make_keyed(num_blocks=2, staging_blocks=3).ring.num_slots == 3
