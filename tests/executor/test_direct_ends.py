"""Reads straight into memory whose job ends before they do: nobody hears of it until no byte moves any more.

The blocks are somebody else's once the job was answered, so a read that was called back is waited for (CONFORMANCE 32).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keyed_site import PATIENCE_S, Call, KeyedSite, when_it_waits

from kvbm.errors import StorageError
from kvbm.jobs import Outcome, Transfer
from kvbm.types import Tier

MakeKeyed = Callable[..., KeyedSite]
OK, LATE, FAILED = Outcome.OK, Outcome.LATE, Outcome.FAILED
SMALL: dict[str, Any] = {"num_blocks": 24, "nbytes": 4096, "staging_blocks": 8}
IN_TIME, TOO_LATE = 5.0, 10.0


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut reads of blocks of 4096 bytes after four."""
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 4 * 4096)


class Timed:
    """A site whose reads end when told, and whose time is over once so many were begun."""

    def __init__(self, make_keyed: MakeKeyed, *, num_begun: int, ended: tuple[int, ...] = (), **settings: Any) -> None:
        self.now = 0.0
        self.site = make_keyed(clock=lambda: self.now, **(SMALL | settings))
        self.site.fill_store(24)
        self.site.host.has_checksum[:] = True  # of what the blocks held before
        self.store = self.site.store
        self._num_begun, self._ended = num_begun, ended
        self.store._take = self._take  # type: ignore[method-assign]

    def _take(self, call: Call) -> Transfer[Any]:
        self.store.calls.append(call)
        if len(self.store.calls) - 1 in self._ended:
            self.store.end(call)
        if len(self.store.calls) == self._num_begun:
            self.now = TOO_LATE
        return call.transfer

    def check_rows(self, num_good: int) -> None:
        """See that the first blocks are good, and that no other counts."""
        host = self.site.host
        assert np.array_equal(host.read(self.site.ids[:num_good]), self.site.data[:num_good])
        assert host.has_checksum[:num_good].all()
        num_begun = 4 * len(self.store.calls)
        assert not host.has_checksum[num_good:num_begun].any()
        assert host.has_checksum[num_begun:].all(), "nothing was begun there"


# -- the deadline ----------------------------------------------------------------------------------------------------


def test_job_whose_time_is_over_reads_nothing(make_keyed: MakeKeyed) -> None:
    timed = Timed(make_keyed, num_begun=0)
    timed.now = IN_TIME
    result = timed.site.up(24, deadline=IN_TIME)
    assert timed.store.calls == []
    assert result.outcomes.tolist() == [LATE] * 24
    assert result.reason == "its time was over before it began"
    timed.check_rows(0)


@pytest.mark.parametrize("num_begun", [1, 2, 3])
def test_no_read_is_begun_after_the_deadline(make_keyed: MakeKeyed, num_begun: int) -> None:
    """What was begun in time and has come by then counts."""
    timed = Timed(make_keyed, num_begun=num_begun, ended=(0, 1, 2))
    result = timed.site.up(24, deadline=IN_TIME)
    assert len(timed.store.calls) == num_begun
    num_good = 4 * num_begun
    assert result.outcomes.tolist() == [OK] * num_good + [LATE] * (24 - num_good)
    assert result.reason == "its time was over"
    assert result.nbytes == num_good * 4096
    timed.check_rows(num_good)


def test_job_that_ends_just_at_its_deadline_is_whole(make_keyed: MakeKeyed) -> None:
    timed = Timed(make_keyed, num_begun=6, ended=(0, 1, 2, 3, 4, 5))
    result = timed.site.up(24, deadline=IN_TIME)
    assert (result.outcomes.tolist(), result.reason) == ([OK] * 24, "")
    timed.check_rows(24)


@pytest.mark.parametrize("ended", [(), (0,), (0, 2), (1, 2, 3)])
def test_reads_under_way_at_the_deadline_have_landed_before_the_answer(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, ended: tuple[int, ...]
) -> None:
    """Each is cancelled, then waited for; its bytes may come in between, and count for nothing."""
    timed = Timed(make_keyed, num_begun=4, ended=ended)
    store, landed, num_cancelled = timed.store, [], []
    under_way = [i for i in range(4) if i not in ended]

    def land_next() -> None:
        assert timed.site.results == []
        num_cancelled.append(sum(store.calls[i].transfer.cancelled() for i in under_way))
        landed.append(under_way[len(landed)])
        store.end(store.calls[landed[-1]])

    when_it_waits(monkeypatch, land_next)
    timed.site.begin(timed.site.job(Tier.REMOTE, Tier.HOST, 24), IN_TIME).join(PATIENCE_S)
    assert landed == under_way
    assert num_cancelled == [len(under_way)] * len(under_way), "all are called back before one is waited for"
    (result,) = timed.site.results
    num_good = 4 * under_way[0]
    assert result.outcomes.tolist() == [OK] * num_good + [LATE] * (24 - num_good)
    assert result.reason == "its time was over"
    assert len(store.calls) == 4
    timed.check_rows(num_good)


def test_rows_do_not_change_after_the_answer(make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the store ends the reads one by one while the job waits; a new owner writes once it has answered."""
    timed = Timed(make_keyed, num_begun=3)
    store, is_awaited = timed.store, threading.Event()
    when_it_waits(monkeypatch, is_awaited.set)
    thread = timed.site.begin(timed.site.job(Tier.REMOTE, Tier.HOST, 12), IN_TIME)

    def end_all() -> None:
        assert is_awaited.wait(PATIENCE_S)
        for call in store.calls[::-1]:
            store.end(call)

    mover = threading.Thread(target=end_all)
    mover.start()
    thread.join(PATIENCE_S)
    noise = np.random.default_rng(9).integers(0, 256, timed.site.data.shape, dtype=np.uint8)
    timed.site.host.write(timed.site.ids, noise)
    mover.join(PATIENCE_S)
    assert timed.site.results[0].outcomes.tolist() == [LATE] * 12
    assert np.array_equal(timed.site.host.read(timed.site.ids), noise)


def test_blocks_that_came_late_are_read_again(make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(make_keyed, num_begun=2)

    def land_all() -> None:
        for call in timed.store.calls:
            timed.store.end(call)

    when_it_waits(monkeypatch, land_all)
    assert timed.site.up(24, deadline=IN_TIME).outcomes.tolist() == [LATE] * 24
    del timed.store._take
    assert timed.site.up(24, deadline=TOO_LATE + 1).outcomes.tolist() == [OK] * 24
    timed.check_rows(24)


@pytest.mark.parametrize("how", ["result", "error"])
def test_read_that_ended_and_has_not_landed_is_waited_for(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(4)
    store = site.store
    seen: list[int] = []

    def take(call: Call) -> Transfer[Any]:
        store.calls.append(call)
        if how == "result":
            store.end(call, has_landed=False)
        else:
            call.transfer.set_exception(StorageError("the client fell over"), has_landed=False)
        return call.transfer

    def land() -> None:
        seen.append(len(site.results))
        store.calls[0].transfer.set_landed()

    store._take = take  # type: ignore[method-assign]
    when_it_waits(monkeypatch, land)
    site.begin(site.job(Tier.REMOTE, Tier.HOST, 4)).join(PATIENCE_S)
    assert seen == [0]
    assert site.results[0].outcomes.tolist() == [OK if how == "result" else FAILED] * 4


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["submit", "wait", "compare"])
def test_interrupt_leaves_only_when_reads_under_way_have_landed(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    timed = Timed(make_keyed, num_begun=99, ended=(0,))
    site, store, landed = timed.site, timed.store, []
    means = site.executor._means
    if moment == "submit":
        take = store._take

        def interrupt_third(call: Call) -> Transfer[Any]:
            if len(store.calls) == 2:
                raise KeyboardInterrupt
            return take(call)

        store._take = interrupt_third  # type: ignore[method-assign]
        under_way = [0, 1]
    else:

        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(means, "wait" if moment == "wait" else "compute_checksums", interrupt)
        under_way = [0, 1, 2, 3] if moment == "wait" else [1, 2, 3]

    def land_next() -> None:
        assert site.errors == []
        waiting = [i for i in under_way if i not in landed and store.calls[i].transfer.is_draining]
        assert len(waiting) == len([i for i in under_way if i not in landed and i])
        landed.append(waiting[0])
        store.end(store.calls[landed[-1]])

    when_it_waits(monkeypatch, land_next)
    site.begin(site.job(Tier.REMOTE, Tier.HOST, 24)).join(PATIENCE_S)
    assert [type(error) for error in site.errors] == [KeyboardInterrupt]
    assert site.results == []
    assert landed == [i for i in under_way if i], "the first had come by itself"
    assert not site.host.has_checksum[: 4 * len(store.calls)].any()
    monkeypatch.undo()
    del store._take
    assert site.up(24).outcomes.tolist() == [OK] * 24, "the executor goes on"


def test_interrupt_while_a_landing_is_awaited_leaves_when_it_has_come(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(make_keyed, num_begun=99)
    site, store = timed.site, timed.store
    moments: list[str] = []

    def take(call: Call) -> Transfer[Any]:
        store.calls.append(call)
        store.end(call, has_landed=False)
        return call.transfer

    def interrupt_once() -> None:
        moments.append("waits")
        if len(moments) == 1:
            raise KeyboardInterrupt
        store.calls[0].transfer.set_landed()

    store._take = take  # type: ignore[method-assign]
    when_it_waits(monkeypatch, interrupt_once)
    site.begin(site.job(Tier.REMOTE, Tier.HOST, 4)).join(PATIENCE_S)
    assert [type(error) for error in site.errors] == [KeyboardInterrupt]
    assert moments == ["waits"] * 2
    assert not site.host.has_checksum[:4].any()


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_that_is_closed_stays_until_the_read_has_landed(make_keyed: MakeKeyed) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(4)
    site.store.is_held = True
    thread = site.begin(site.job(Tier.REMOTE, Tier.HOST, 4))
    site.store.wait_for(1)
    memory = weakref.ref(site.host.buffers[0])
    site.host.close()
    assert memory() is not None
    (call,) = site.store.calls
    site.store.end(call)
    assert np.array_equal(call.memory[call.rows, :4096], site.data[:4])
    thread.join(PATIENCE_S)
    assert site.results[0].outcomes.tolist() == [FAILED] * 4
    assert "closed" in site.results[0].reason
    site.store.calls.clear()
    del call
    assert memory() is None
