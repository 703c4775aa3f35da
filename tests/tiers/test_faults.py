"""What fails in a thread is heard of, and random work over failing storages stays right (CONFORMANCE 32, 34, 37)."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest
from tier_site import PATIENCE_S, Site, Tiers, content_of, names

from kvbm.errors import NotEnoughBlocksAvailable, TransferCancelled, TransferTimeout
from kvbm.planner.policies import AlwaysPolicy
from kvbm.testing.faults import FaultMode, FaultPlan
from kvbm.types import HashArray

# -- a thread fails --------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a test makes somebody fail with."""


@pytest.mark.parametrize("route", ["host-device", "disk-device"])
@pytest.mark.parametrize("small_copy", [0, 1 << 20])
def test_executor_that_raises_shortens_the_hit_and_is_logged(
    make_tiers: Site, caplog: pytest.LogCaptureFixture, route: str, small_copy: int
) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"runtime": {"small_copy": small_copy}})
    hashes = names(3)
    tiers.put_below(hashes, route.split("-", maxsplit=1)[0])
    gate = make_tiers.gate(tiers)
    gate.errors[route] = [Broken("no more")]
    with caplog.at_level(logging.WARNING, logger="kvbm"):
        assert tiers.num_hit(hashes) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any("job failed" in message for message in messages)
    assert any("reason=Broken('no more')" in message for message in messages)
    assert tiers.route(route).dropped == {"failed": 3}
    tiers.put_below(hashes, "host", "disk")
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


@pytest.mark.parametrize("route", ["device-host", "host-disk"])
def test_executor_that_raises_costs_an_offload_and_the_next_ones_work(make_tiers: Site, route: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, settings={"offload": {"in_flight_share": 1.0}})
    gate = make_tiers.gate(tiers)
    gate.errors[route] = [Broken("no more"), KeyboardInterrupt(), SystemExit()]
    for num_failed in range(1, 4):
        hashes = names(2)
        tiers.put(hashes)
        tiers.manager.flush(PATIENCE_S)
        assert tiers.lies(route.split("-")[1], hashes) == [False] * 2
        assert tiers.route(route).dropped.total() == 2 * num_failed
    hashes = names(2)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 2
    tiers.see_idle()


@pytest.mark.parametrize("verb", ["submit_read", "submit_write"])
def test_storage_that_raises_is_an_answer(make_tiers: Site, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    tiers = make_tiers(device=8, host=8, disk=16, faults=FaultPlan())
    storage: Any = tiers.manager.storage("disk")
    hashes = names(3)
    if verb == "submit_read":
        tiers.put_below(hashes, "disk")

    def fail(*_: Any, **__: Any) -> Any:
        raise Broken("the medium burns")

    with monkeypatch.context() as patch:
        patch.setattr(storage, verb, fail)
        if verb == "submit_write":
            tiers.put(hashes)
            tiers.manager.flush(PATIENCE_S)
            assert tiers.route("host-disk").dropped == {"failed": 3}
        else:
            assert tiers.num_hit(hashes) == 0
            assert tiers.route("disk-device").dropped == {"failed": 3}
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    assert tiers.num_hit(hashes) == 3
    tiers.see_idle()


def test_failure_of_the_planners_thread_is_logged_and_raised_by_the_next_flush(
    make_tiers: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    planner = tiers.manager._planner
    has_failed = threading.Event()

    def fail() -> bool:
        has_failed.set()
        raise Broken("the planner's own fault")

    with monkeypatch.context() as patch:
        patch.setattr(planner, "pump", fail)
        hashes = names(3)
        tiers.put(hashes)
        assert has_failed.wait(PATIENCE_S)
    thread = tiers.manager._thread
    assert thread is not None
    while thread._error is None:
        pass
    with pytest.raises(Broken, match="the planner's own fault"):
        tiers.manager.flush(PATIENCE_S)
    assert any(record.getMessage() == "the planner failed" for record in caplog.records)
    tiers.manager.flush(PATIENCE_S)  # said once
    assert tiers.lies("disk", hashes) == [True] * 3
    tiers.see_idle()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_allocation_below_that_fails_costs_its_blocks_and_keeps_none(
    make_tiers: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    first, second = names(3), names(3)
    pool = tiers.pool(tier)
    allocate, answers = pool.try_allocate_blocks, [None, Broken("the store's own fault")]

    def fail(n: int) -> Any:
        if answers and (error := answers.pop(0)):
            raise error
        return allocate(n)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "try_allocate_blocks", fail)
        for hashes in (first, second):
            tiers.put(hashes)
            tiers.manager.flush(PATIENCE_S)
    assert not answers
    assert any("Broken(" in record.getMessage() for record in caplog.records)
    upper = {"host": "device", "disk": "host"}[tier]
    assert tiers.route(f"{upper}-{tier}").dropped["no_room"] > 0
    for hashes in (first, second):
        with tiers.get(hashes) as blocks:
            assert len(blocks) == 3
    later = names(3)
    tiers.put_below(later, "disk")
    assert tiers.num_hit(later) == 3
    tiers.see_idle()


def test_callback_that_raises_is_logged_and_hurts_nobody(make_tiers: Site, caplog: pytest.LogCaptureFixture) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))

    def fail(_: Any) -> None:
        raise Broken("the user's own fault")

    transfer.add_done_callback(fail)
    gate.open()
    transfer.result(PATIENCE_S).release()
    tiers.manager.close()  # the thread that calls back has ended
    assert any("a callback of a transfer failed" in record.getMessage() for record in caplog.records)


class CallsBack(AlwaysPolicy):
    """Calls its manager, which it must not."""

    tiers: Any = None

    def registered(self, candidates: Any) -> Any:
        self.tiers.manager.statistics()
        return super().registered(candidates)


def test_policy_that_calls_its_manager_is_refused_and_not_waited_for(
    make_tiers: Site, caplog: pytest.LogCaptureFixture
) -> None:
    policy = CallsBack()
    tiers = policy.tiers = make_tiers(device=8, host=8, offload_policy=policy)
    tiers.put(names(2))
    tiers.manager.flush(PATIENCE_S)
    assert tiers.route("device-host").dropped == {"policy_failed": 2}
    assert "must not call back into the manager" in caplog.text
    tiers.see_idle()


# -- random work over failing storages ---------------------------------------------------------------------------

NUM_SEEDS = 100
NUM_THREADS = 3
NUM_REQUESTS = 16
RATES = {FaultMode.FAIL: 0.1, FaultMode.TEAR: 0.1, FaultMode.FLIP: 0.1, FaultMode.DELAY: 0.15}


class Workload:
    """Threads that serve requests of a few prompts with common heads, and one that lets delayed I/O go."""

    def __init__(self, tiers: Tiers, seed: int) -> None:
        self.tiers = tiers
        self.seed = seed
        heads = [names(4) for _ in range(3)]
        self.prompts = [np.concatenate([head[: 1 + i], names(1 + i)]) for head in heads for i in range(4)]
        self.errors: list[BaseException] = []
        self.num_hits = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        workers = [threading.Thread(target=self._work, args=(i,), name=f"worker {i}") for i in range(NUM_THREADS)]
        pump = threading.Thread(target=self._pump, name="pump")
        for thread in (pump, *workers):
            thread.start()
        for thread in workers:
            thread.join(PATIENCE_S)
        self._is_over.set()
        pump.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in (pump, *workers))
        if self.errors:
            raise self.errors[0]

    def _pump(self) -> None:
        storage: Any = self.tiers.manager.storage("disk")
        while not self._is_over.is_set():
            storage.wait_until_held(1, 0.002)
            storage.release()

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        try:
            for _ in range(NUM_REQUESTS):
                self._serve(rng)
        except BaseException as error:
            self.errors.append(error)

    def _serve(self, rng: random.Random) -> None:
        tiers, manager = self.tiers, self.tiers.manager
        hashes = rng.choice(self.prompts)
        try:
            transfer = manager.onboard(manager.match_sequence_hashes(hashes))
        except NotEnoughBlocksAvailable:
            return
        if rng.random() < 0.1:
            transfer.cancel()
        try:
            blocks = transfer.result(PATIENCE_S)
        except TransferCancelled:
            return
        tiers.see_right(blocks, hashes)
        self.num_hits += len(blocks)
        rest: HashArray = hashes[len(blocks) :]
        fresh = manager.try_allocate_blocks(len(rest))
        if fresh is not None:
            manager.storage("device").write(fresh.block_ids, content_of(rest))
            parent = blocks.hashes[-1].tobytes() if len(blocks) else None
            blocks = blocks + manager.register_blocks(fresh.complete(rest, parent=parent))
            tiers.see_right(blocks, hashes)
        blocks.release()
        if rng.random() < 0.15:
            manager.reset_blocks(rng.choice(list(manager.status())[:-1]), hashes)
        if rng.random() < 0.1:
            manager.set_priority(hashes, rng.randrange(101))
        if rng.random() < 0.2:
            with contextlib.suppress(TransferTimeout):  # a busy machine serves all before it has written anything
                manager.flush(0.05)


def let_go(tiers: Tiers, storage: Any) -> None:
    """Release what the faults hold until no job is open; a fault that was chosen before may still be on its way."""
    planner = tiers.manager._planner
    give_up = time.monotonic() + PATIENCE_S
    is_idle = False
    while not is_idle:
        assert time.monotonic() < give_up, "a job stays open"
        storage.release()
        storage.abandon()
        with planner._changed:
            is_idle = planner._changed.wait_for(lambda: not planner.num_open_jobs, 0.05)


@pytest.mark.timeout(300)
def test_no_seed_of_random_work_over_a_failing_disk_gives_a_wrong_byte_or_keeps_a_block(make_tiers: Site) -> None:
    settings = {
        "runtime": {"onboard_timeout_s": 0.01, "offload_timeout_s": 0.05, "small_copy": 0, "io_threads": 1},
        "offload": {"staging_blocks": 8, "queue_blocks": 16, "job_blocks": 3, "in_flight_share": 0.5},
    }
    num_injected = dict.fromkeys(FaultMode, 0)
    num_hits = num_mismatches = 0
    before = set(threading.enumerate())
    for seed in range(4 * NUM_SEEDS):
        is_enough = min(num_injected.values()) > 3 and sum(num_injected.values()) > 100
        if seed >= NUM_SEEDS and is_enough and num_mismatches > 10 and num_hits > 1000:
            break  # a busy machine injects less in a seed, for more comes too late
        rates = {**RATES, FaultMode.NEVER: 0.1} if seed % 4 < 2 else RATES
        plan = FaultPlan(rates=rates, seed=seed, affects="some")
        host = 14 if seed % 2 else 0  # every other one from device to disk through the ring alone
        tiers = make_tiers(device=14, host=host, disk=48, faults=plan, settings=settings)
        storage: Any = tiers.manager.storage("disk")
        work = Workload(tiers, seed)
        work.run()
        plan.is_on = False
        let_go(tiers, storage)
        tiers.see_idle()
        for hashes in work.prompts:  # whatever is cached now is right
            tiers.num_hit(hashes)
            tiers.see_idle()  # what goes down again holds blocks that the next one needs
        statistics = tiers.manager.statistics()
        num_mismatches += statistics.mismatches.total()
        num_hits += work.num_hits
        for mode, number in plan.num_injected.items():
            num_injected[mode] += number
        tiers.manager.close()
        tiers.manager.check()
        assert set(threading.enumerate()) == before
        make_tiers.managers.clear()
        shutil.rmtree(make_tiers.disk_path)  # what it has left, with its priorities, would be in the next one's way
    else:
        pytest.fail(f"too little went wrong to prove anything: {num_injected}, {num_mismatches=}, {num_hits=}")
