"""Ctrl-C between any two steps of an onboard: whoever waits is answered, and no block stays held (CONFORMANCE 32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.blocks import ImmutableBlocks
from kvbm.errors import PoolClosed, TransferCancelled
from kvbm.jobs import CopyJob, Job, JobResult, Outcome, Transfer
from kvbm.planner import Planner
from kvbm.planner.onboarding import Onboarding
from kvbm.planner.prefetch import Prefetch, Staging
from kvbm.pool import BlockPool
from kvbm.testing.channels import SteppedChannel, SteppedClock
from kvbm.types import Tier

NAMES = np.array([[1 + i, 7] for i in range(4)], dtype=np.uint64)


def all_ok(job: Job, deadline: float | None) -> JobResult:
    assert isinstance(job, CopyJob)
    return JobResult(job_id=job.job_id, outcomes=np.zeros(len(job.hashes), dtype=np.uint8))


class Interrupted(SteppedChannel):
    """A channel whose calls are interrupted as told: before a job is taken, or just after."""

    def __init__(self, *, takes: bool, answers: bool = False) -> None:
        super().__init__(all_ok)
        self.takes = takes
        self.answers = answers
        self.num_left = 1  # interrupts
        self.revoked: list[int] = []

    def send(self, job: Job) -> None:
        if not self.num_left:
            super().send(job)
            return
        self.num_left -= 1
        if self.takes:
            super().send(job)
        if self.answers:
            self.step()
        raise KeyboardInterrupt

    def revoke(self, job_id: int) -> bool:
        self.revoked.append(job_id)
        return super().revoke(job_id)


class Site:
    """A device and a host tier; four blocks lie in the latter."""

    def __init__(self, backend: Backend, *channels: Any) -> None:
        self.device = BlockPool(16, backend=backend)
        self.host = BlockPool(16, tier=Tier.HOST, backend=backend)
        self.host.register_blocks(self.host.allocate_blocks(4).complete(NAMES)).release()
        self.clock = SteppedClock()
        self.channel = SteppedChannel(all_ok)
        self.planner = Planner([self.device, self.host], channels or [self.channel], clock=self.clock)

    def onboard(self, num_blocks: int = 4, timeout_s: float | None = None) -> Transfer[ImmutableBlocks]:
        return self.planner.onboard(self.planner.match(NAMES[:num_blocks]), timeout_s)

    def see_idle(self) -> None:
        assert self.planner.num_open_jobs == 0
        for pool in (self.device, self.host):
            pool.check()
            assert pool.available_blocks == 16


@pytest.fixture
def site(backend: Backend) -> Site:
    return Site(backend)


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


# -- between the end of an onboard and the end of its transfer -------------------------------------------------------


class Deaf(Transfer[Any]):
    """A transfer whose end is interrupted once: before it has ended, or after."""

    def __init__(self, *, is_ended: bool) -> None:
        super().__init__()
        self._is_ended_first = is_ended
        self._num_left = 1

    def _interrupted(self, end: Callable[[], bool]) -> bool:
        if self._num_left:
            self._num_left -= 1
            if self._is_ended_first:
                end()
            raise KeyboardInterrupt
        return end()

    def set_result(self, result: Any, *, has_landed: bool = True) -> bool:
        return self._interrupted(lambda: super(Deaf, self).set_result(result, has_landed=has_landed))

    def set_exception(self, error: BaseException, *, has_landed: bool = True) -> bool:
        return self._interrupted(lambda: super(Deaf, self).set_exception(error, has_landed=has_landed))


@pytest.mark.parametrize("error", [None, PoolClosed("the manager was closed")])
@pytest.mark.parametrize("kind", [Onboarding, Staging])
def test_onboard_that_was_finished_and_not_ended_is_ended_by_the_next_who_looks(
    site: Site, kind: Any, error: Exception | None
) -> None:
    transfer: Any = Prefetch() if kind is Staging else Transfer()
    onboarding = kind(site.device, NAMES, transfer, deadline=0.0)
    onboarding.num_open = 1
    onboarding.finish(error)  # whoever asked was interrupted before the call of what this gives
    assert not transfer.done()
    onboarding.finish()()
    assert transfer.done()
    assert transfer.is_draining, "its job still moves"
    assert transfer.exception() is error
    onboarding.num_open = 0
    onboarding.finish()()
    assert not transfer.is_draining


@pytest.mark.parametrize("error", [None, PoolClosed("the manager was closed")])
@pytest.mark.parametrize("is_ended", [False, True])
@pytest.mark.parametrize("kind", [Onboarding, Staging])
def test_interrupt_while_a_transfer_is_ended_leaves_it_to_the_next_who_looks(
    site: Site, kind: Any, is_ended: bool, error: Exception | None
) -> None:
    transfer: Any = Deaf(is_ended=is_ended)
    onboarding = kind(site.host, NAMES, transfer, deadline=0.0)
    held, _ = site.host.hold_blocks(site.host.lookup(NAMES), NAMES)
    onboarding.add(np.arange(4), held)
    with pytest.raises(KeyboardInterrupt):
        onboarding.finish(error)()
    assert transfer.done() is is_ended
    onboarding.finish()()
    assert transfer.done()
    assert not transfer.is_draining
    if error is not None:
        assert transfer.exception() is error
    elif kind is Onboarding:
        with transfer.result() as blocks:  # given once, and not taken away again
            assert site.host.available_blocks == 12
            assert blocks.hashes.tolist() == NAMES.tolist()
    else:
        assert transfer.result() == 4
    onboarding.finish()()
    assert site.host.available_blocks == 16


def test_interrupt_while_blocks_are_collected_costs_hits_and_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer: Transfer[Any] = Transfer()
    onboarding = Onboarding(site.host, NAMES, transfer, deadline=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(onboarding, "take_pieces", lambda: interrupt(None))
        with pytest.raises(KeyboardInterrupt):
            onboarding.finish()
    onboarding.finish()()
    assert len(transfer.result()) == 0


def test_blocks_of_an_onboard_that_was_cancelled_meanwhile_are_let_go(site: Site) -> None:
    transfer: Transfer[Any] = Transfer()
    onboarding = Onboarding(site.host, NAMES, transfer, deadline=0.0)
    held, _ = site.host.hold_blocks(site.host.lookup(NAMES), NAMES)
    onboarding.add(np.arange(4), held)
    end = onboarding.finish()
    transfer.cancel()
    end()
    end()
    with pytest.raises(TransferCancelled):
        transfer.result()
    assert site.host.available_blocks == 16
    assert not transfer.is_draining


# -- in a callback of one of several who wait for the same job -------------------------------------------------------


def test_interrupt_in_a_callback_of_one_who_waits_does_not_cost_the_other_its_end(site: Site) -> None:
    first, second = site.onboard(), site.onboard()
    assert len(site.channel.waiting) == 1, "the second joins"
    first.add_done_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.channel.step()
    assert first.done()
    assert second.done()
    for transfer in (first, second):
        with transfer.result() as blocks:
            assert len(blocks) == 4
    site.see_idle()


def test_interrupt_before_the_second_is_ended_leaves_it_to_its_deadline(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = site.onboard(), site.onboard()

    def run_first(calls: Any) -> None:
        calls[0]()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvbm.planner.dispatch.run_all", run_first)
        with pytest.raises(KeyboardInterrupt):
            site.channel.step()
    assert (first.done(), second.done()) == (True, False)
    site.clock.advance(1000.0)
    assert second.done()
    for transfer in (first, second):
        with transfer.result() as blocks:
            assert len(blocks) == 4
    site.see_idle()


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_block_that_is_loading_is_joined_although_an_older_job_for_it_has_ended(site: Site) -> None:
    """The first job has too little time to be joined, so a second loads the same; then the first one's end comes."""
    transfers = [site.onboard(timeout_s=1.0), site.onboard(timeout_s=30.0)]
    transfers.append(site.onboard(1, 30.0))  # looks where blocks are loaded, so that both are listed
    assert len(site.channel.waiting) == 2
    _, second = site.channel.waiting
    site.channel.answer(0, Outcome.LATE)
    transfers.append(site.onboard(timeout_s=30.0))
    assert site.channel.waiting == [second], "it is not loaded a third time"
    site.channel.step_all()
    num_blocks = []
    for transfer in transfers:
        with transfer.result(0) as blocks:
            num_blocks.append(len(blocks))
    assert num_blocks == [0, 4, 1, 4]
    site.see_idle()


def test_job_that_was_not_taken_when_its_sender_was_interrupted_holds_nothing(backend: Backend) -> None:
    channel = Interrupted(takes=False)
    site = Site(backend, channel)
    with pytest.raises(KeyboardInterrupt):
        site.onboard()
    site.see_idle()
    transfer = site.onboard()
    channel.step_all()
    with transfer.result(0) as blocks:
        assert len(blocks) == 4, "the sources are as good as ever"
    site.see_idle()


def test_job_that_was_taken_when_its_sender_was_interrupted_is_left_to_its_channel(backend: Backend) -> None:
    channel = Interrupted(takes=True)
    site = Site(backend, channel)
    with pytest.raises(KeyboardInterrupt):
        site.onboard()
    assert site.planner.num_open_jobs == 1
    assert site.device.available_blocks == 12, "its bytes may move"
    channel.step_all()
    site.see_idle()
    assert (site.device.lookup(NAMES) >= 0).all()


def test_job_that_was_answered_when_its_sender_was_interrupted_is_answered_once(backend: Backend) -> None:
    channel = Interrupted(takes=True, answers=True)
    site = Site(backend, channel)
    with pytest.raises(KeyboardInterrupt):
        site.onboard()
    site.see_idle()
    assert (site.device.lookup(NAMES) >= 0).all()


def test_ranks_that_a_job_was_not_sent_to_are_answered_for(backend: Backend) -> None:
    """The second of three ranks has not taken it; the first has, and moves bytes."""
    channels = [SteppedChannel(all_ok), Interrupted(takes=False), SteppedChannel(all_ok)]
    site = Site(backend, *channels)
    with pytest.raises(KeyboardInterrupt):
        site.onboard()
    assert [len(channel.waiting) for channel in channels] == [1, 0, 0]
    assert len(channels[1].revoked) == 1
    assert site.planner.num_open_jobs == 1
    channels[0].step_all()
    site.see_idle()
    assert (site.device.lookup(NAMES) < 0).all(), "it is not on every rank"
