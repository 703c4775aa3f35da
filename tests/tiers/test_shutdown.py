"""Cancel, deadline and close with work under way: all ends, nothing is held, no thread stays (CONFORMANCE 32)."""

from __future__ import annotations

import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from tier_site import PATIENCE_S, GatedOs, Site, content_of, disk_layout, names, open_files

from kvbm.errors import PoolClosed, TransferCancelled, TransferTimeout
from kvbm.storage.disk import DiskStorage
from kvbm.testing.faults import FaultMode, FaultPlan
from kvbm.types import Tier


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call in a thread; give what waits for its answer, an exception being one."""
    answers: list[Any] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def wait() -> Any:
        thread.join(PATIENCE_S / 2)
        assert answers, "it did not end"
        return answers[0]

    return wait


# -- close -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("mode", [FaultMode.DELAY, FaultMode.NEVER])
def test_close_ends_every_transfer_though_bytes_do_not_end(make_tiers: Site, mode: FaultMode, verb: str) -> None:
    plan = FaultPlan(rates={mode: 1.0}, on=verb)
    plan.is_on = False
    tiers = make_tiers(device=8, host=8, disk=16, faults=plan)
    storage: Any = tiers.manager.storage("disk")
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    plan.is_on = True
    transfers = []
    if verb == "read":
        transfers = [tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes)) for _ in range(2)]
    else:
        tiers.put(names(3))
    assert storage.wait_until_held(1)
    tiers.manager.close(timeout=0.01)
    for transfer in transfers:
        assert transfer.done()
        with pytest.raises(PoolClosed, match="the manager was closed while blocks were on their way"):
            transfer.result(0)


@pytest.mark.parametrize("route", ["device-host", "host-disk", "disk-device"])
def test_close_waits_for_bytes_that_move_then_lets_go(make_tiers: Site, route: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, route)
    transfer = None
    if route == "disk-device":
        transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    else:
        tiers.put(names(3))
    gate.wait_for(1)
    if transfer is not None:
        transfer.add_done_callback(lambda _: gate.open())  # close ends it first, then waits for the job
    else:
        in_thread(gate.open)()
    tiers.manager.close()
    assert transfer is None or transfer.done()
    assert tiers.manager._planner.num_open_jobs == 0


def test_close_with_jobs_at_a_gate_gives_up_in_time_and_they_are_let_go_of_later(
    make_tiers: Site, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"runtime": {"close_timeout_s": 0.01}})
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device", "device-host")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    tiers.put(names(2))
    gate.wait_for(2)
    with caplog.at_level(logging.WARNING, logger="kvbm.planner"):
        tiers.manager.close()
    assert any("executors still work num_jobs=2" in record.getMessage() for record in caplog.records)
    assert transfer.done()
    status = tiers.manager.status()
    assert (status["device"].mutable, status["disk"].active) == (3, 3)  # nobody else may have them yet
    tiers.manager.close()
    gate.open()
    tiers.settle()
    assert [s.mutable + s.active for s in tiers.manager.status().values()] == [0, 0, 0]


def test_close_gives_up_a_disk_that_hangs(make_tiers: Site) -> None:
    calls = GatedOs()
    disk = DiskStorage(disk_layout(16), make_tiers.disk_path, os_calls=calls)
    tiers = make_tiers(device=8, host=8, storages={Tier.DISK: disk})
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    calls.gate.clear()
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    assert calls.has_begun.wait(PATIENCE_S)
    closing = in_thread(lambda: tiers.manager.close(timeout=0.01))
    try:
        assert closing() is None
    finally:
        calls.gate.set()
    assert transfer.done()
    tiers.settle()
    disk.close()
    assert open_files(make_tiers.directory) == []


def test_close_may_be_called_twice_and_from_many_threads(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    gate.wait_for(1)
    closing = [in_thread(tiers.manager.close) for _ in range(4)]
    assert isinstance(transfer.exception(PATIENCE_S), PoolClosed)
    gate.open()
    assert [wait() for wait in closing] == [None] * 4
    tiers.manager.close()
    assert tiers.manager._planner.num_open_jobs == 0


@pytest.mark.parametrize("route", ["host-device", "disk-device"])
@pytest.mark.parametrize("small_copy", [0, 1 << 20])
def test_close_may_be_called_from_a_callback_of_a_transfer(make_tiers: Site, route: str, small_copy: int) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"runtime": {"small_copy": small_copy}})
    hashes, others = names(3), names(2)
    tiers.put_below(others, "disk")
    tiers.put_below(hashes, route.split("-", maxsplit=1)[0])
    gate = make_tiers.gate(tiers)
    is_in_callers_thread = route == "host-device" and small_copy
    if not is_in_callers_thread:
        gate.shut(route)
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    has_closed = threading.Event()

    def close(_: Any) -> None:
        tiers.manager.close()
        has_closed.set()

    if is_in_callers_thread:
        assert transfer.done()
    other = tiers.manager.onboard(tiers.manager.match_sequence_hashes(others))  # behind it, or beside it
    transfer.add_done_callback(close)
    gate.open()
    assert has_closed.wait(PATIENCE_S)
    assert other.wait(PATIENCE_S)
    for ended in (transfer, other):
        if ended.exception(0) is None:
            ended.result().release()


def test_close_from_a_callback_of_a_cancelled_transfer(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    transfer.add_done_callback(lambda _: tiers.manager.close(timeout=0.01))
    gate.wait_for(1)
    assert transfer.cancel()
    with pytest.raises(PoolClosed):
        tiers.manager.lookup(hashes)
    gate.open()
    tiers.settle()


@pytest.mark.parametrize("timeout", [PATIENCE_S, math.inf])
def test_close_ends_an_allocation_that_waits(make_tiers: Site, timeout: float) -> None:
    tiers = make_tiers(device=4, host=8)
    held = tiers.manager.allocate_blocks(4)
    waiting = in_thread(lambda: tiers.manager.allocate_blocks(2, timeout=timeout))
    while not len(tiers.manager.device._waiters):
        pass
    tiers.manager.close()
    assert isinstance(waiting(), PoolClosed)
    held.release()


def test_close_ends_a_flush_that_waits(make_tiers: Site) -> None:
    tiers = make_tiers(device=4, host=8)
    gate = make_tiers.gate(tiers, "device-host")
    tiers.put(names(1))
    gate.wait_for(1)
    flushing = in_thread(tiers.manager.flush)
    while not tiers.manager._planner._changed._waiters:  # type: ignore[attr-defined]
        pass
    closing = in_thread(tiers.manager.close)
    assert isinstance(flushing(), PoolClosed)
    gate.open()
    closing()


@pytest.mark.usefixtures("cpu_device")  # a layer as a NumPy array
def test_calls_after_close_raise_pool_closed_and_guards_still_work(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    manager = tiers.manager
    hashes, below = names(2), names(2)
    tiers.put_below(below, "disk")
    held = tiers.fill(hashes)
    fresh = manager.allocate_blocks(1)
    complete = manager.allocate_blocks(1).complete(names(1))
    hits = [manager.match_sequence_hashes(below) for _ in range(2)]
    array = held[0].layer(0).numpy()
    manager.close()
    for call in (
        lambda: manager.match_sequence_hashes(hashes),
        lambda: manager.lookup(hashes),
        lambda: manager.onboard(hits[0]),
        lambda: manager.allocate_blocks(1),
        lambda: manager.try_allocate_blocks(1),
        lambda: manager.register_blocks(complete),
        lambda: manager.set_priority(hashes, 3),
        lambda: manager.reset_pool("host"),
        lambda: manager.reset_blocks("disk", hashes),
        lambda: manager.reset_all(),
        lambda: manager.subscribe_events(),
        lambda: manager.flush(),
        lambda: manager.flush(0),
        lambda: manager.storage("disk").read([0]),  # type: ignore[arg-type]
        lambda: manager.load_kv(held[0], 0),
    ):
        with pytest.raises(PoolClosed):
            call()
    assert bytes(array.tobytes()) == content_of(hashes)[0, : array.nbytes].tobytes()
    assert manager.status()["device"].active == 2
    assert manager.statistics().routes
    for guard in (held, fresh, complete, *hits):
        guard.release()
    manager.check()
    assert repr(manager).startswith("BlockManager(device=8, host=8, disk=16 blocks of ")


def test_manager_that_is_dropped_without_close_lets_go_of_its_memory(make_tiers: Site) -> None:
    tiers = make_tiers(device=4)
    tiers.put(names(2))
    ref = weakref.ref(tiers.manager)
    make_tiers.managers.clear()
    del tiers
    gc.collect()
    assert ref() is None


def test_managers_that_come_and_go_leave_nothing(make_tiers: Site) -> None:
    before = threading.active_count()
    for _ in range(10):
        tiers = make_tiers(device=4, host=8, disk=16)
        hashes = names(3)
        with tiers.manager:
            tiers.put_below(hashes, "disk")
            assert tiers.num_hit(hashes) == 3
        assert threading.active_count() == before
        assert open_files(make_tiers.directory) == []


# -- cancel and deadline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["host", "disk"])
def test_cancelled_onboard_holds_nothing_once_its_bytes_have_ended(make_tiers: Site, source: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"runtime": {"small_copy": 0}})
    hashes = names(4)
    tiers.put_below(hashes, source)
    gate = make_tiers.gate(tiers, f"{source}-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    gate.wait_for(1)
    assert transfer.cancel()
    assert not transfer.cancel()
    assert transfer.cancelled()
    assert transfer.is_draining
    with pytest.raises(TransferCancelled):
        transfer.result(0)
    assert tiers.manager.status()[source].active == 4
    gate.open()
    tiers.settle()
    assert not transfer.is_draining
    tiers.see_idle()
    assert tiers.lies("device", hashes) == [True] * 4  # the bytes came: the next request has them


def test_cancelled_onboard_gives_back_what_lay_in_the_top_tier(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(4)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes[:2]) == 2
    tiers.manager.flush(PATIENCE_S)  # which holds them while they sink
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    gate.wait_for(1)
    assert tiers.manager.status()["device"].active == 2
    assert transfer.cancel()
    assert tiers.manager.status()["device"].active == 0
    gate.open()
    tiers.see_idle()


def test_waiting_shorter_than_the_deadline_leaves_the_onboard_as_it_is(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(2)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    with pytest.raises(TransferTimeout, match=r"the transfer did not end within 0.01 s; it goes on"):
        transfer.result(0.01)
    assert not transfer.done()
    gate.open()
    with transfer.result(PATIENCE_S) as blocks:
        assert len(blocks) == 2
    tiers.see_idle()


def test_onboard_ends_at_its_deadline_for_a_waiter_that_only_asked_to_be_called_back(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"runtime": {"onboard_timeout_s": 0.02}})
    hashes = names(2)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    has_ended = threading.Event()
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    transfer.add_done_callback(lambda _: has_ended.set())
    assert has_ended.wait(PATIENCE_S)
    with transfer.result(0) as blocks:
        assert len(blocks) == 0
    gate.open()
    tiers.see_idle()


def test_onboard_whose_time_is_over_at_once_gives_what_lies_in_the_top_tier(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes[:1]) == 1
    for timeout in (0.0, 1e-9, -1.0):
        with tiers.get(hashes, timeout=timeout) as blocks:
            assert len(blocks) >= 1
        tiers.settle()
    tiers.see_idle()


def test_offload_whose_time_is_over_is_counted_and_settles_when_it_is_answered(make_tiers: Site) -> None:
    plan = FaultPlan([FaultMode.DELAY], on="write")
    tiers = make_tiers(device=8, disk=16, faults=plan, settings={"runtime": {"offload_timeout_s": 0.01}})
    storage: Any = tiers.manager.storage("disk")
    hashes = names(2)
    tiers.put(hashes)
    assert storage.wait_until_held(1)
    with pytest.raises(TransferTimeout):
        tiers.manager.flush(0.05)
    assert tiers.route("device-disk").draining == 2
    storage.release()
    tiers.see_idle()
    assert tiers.lies("disk", hashes) == [True, True]


def test_transfers_that_nobody_keeps_let_go_of_their_blocks(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    tiers.settle()
    gc.collect()
    tiers.see_idle()
