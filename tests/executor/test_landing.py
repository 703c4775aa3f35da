"""Writes that have ended for their waiter while the storage still looks at the rows: nothing is given away early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keyed_site import PATIENCE_S, KeyedSite, when_it_waits

from kvbm.errors import StorageError
from kvbm.jobs import Outcome
from kvbm.types import Tier

MakeKeyed = Callable[..., KeyedSite]
SMALL: dict[str, Any] = {"num_blocks": 6, "nbytes": 4096, "staging_blocks": 8}


@pytest.mark.parametrize("how", ["result", "error", "cancelled"])
@pytest.mark.parametrize("kind", ["contiguous", "by layer"])
def test_write_that_ended_and_has_not_landed_is_not_answered_and_keeps_its_slots(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    """From memory in one piece the source stays with the job, through the ring its slots do."""
    site = make_keyed(kind=kind, **SMALL)
    site.store.is_held = True
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((site.ring.num_free, len(site.results)))
        site.store.calls[0].transfer.set_landed()

    when_it_waits(monkeypatch, look)
    thread = site.begin(site.job(Tier.HOST, Tier.REMOTE, 3))
    site.store.wait_for(1)
    (call,) = site.store.calls
    if how == "result":
        site.store.end(call, has_landed=False)
    elif how == "error":
        call.transfer.set_exception(StorageError("the client fell over"), has_landed=False)
    else:
        call.transfer.cancel()
    thread.join(PATIENCE_S)
    assert seen == [(8 if kind == "contiguous" else 5, 0)]
    assert site.results[0].outcomes.tolist() == [Outcome.OK if how == "result" else Outcome.FAILED] * 3
    assert site.ring.num_free == 8
    assert site.store.records == ([[0, 1, 2]] if how == "result" else [])


def test_slots_of_another_write_come_back_meanwhile(make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs costs its slots; the next goes through what is left of the ring."""
    site = make_keyed(kind="by layer", **SMALL)
    site.store.is_held = True
    others: list[Any] = []

    def look() -> None:
        site.store.is_held = False
        others.append(site.down(1))
        site.store.calls[0].transfer.set_landed()

    when_it_waits(monkeypatch, look)
    thread = site.begin(site.job(Tier.HOST, Tier.REMOTE, 2))
    site.store.wait_for(1)
    site.store.end(site.store.calls[0], has_landed=False)
    thread.join(PATIENCE_S)
    assert not others[0].outcomes.any()
    first, second = site.store.of_kind("write")
    assert not set(first.rows) & set(second.rows)
    assert site.ring.num_free == 8


def test_block_read_from_a_store_into_a_store_waits_for_its_landing_too(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(2)
    store = site.store
    seen: list[int] = []

    def take(call: Any) -> Any:
        store.calls.append(call)
        store.end(call, has_landed=call.kind == "read")
        return call.transfer

    def look() -> None:
        seen.append(site.ring.num_free)
        store.of_kind("write")[0].transfer.set_landed()

    when_it_waits(monkeypatch, look)
    store._take = take  # type: ignore[method-assign]
    result = site.executor.execute(site.job(Tier.REMOTE, Tier.REMOTE, 2))
    assert seen == [6]
    assert not result.outcomes.any()
    assert np.array_equal(np.sort(store.of_kind("write")[0].ids), site.ids[:2])
    assert site.ring.num_free == 8
