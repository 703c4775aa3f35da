"""What an engine asks and says of a request whose load has failed, or whose blocks it took away unannounced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_site import BLOCK_TOKENS, CoreSite, digests_of

from kvbm._backend import Backend
from kvbm.engines.messages import decode_report, encode_orders
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.worker import StepNews
from kvbm.jobs import CopyJob
from kvbm.jobs.messages import decode_job
from kvbm.types import Tier

PROMPT = list(range(4 * BLOCK_TOKENS + 1))
SLOTS = [0, 1, 2, 3, 4]


@pytest.fixture
def site(backend: Backend, tmp_path: Path) -> Iterator[CoreSite]:
    site = CoreSite(backend, tmp_path)
    site.add("a", PROMPT)
    site.run()
    yield site
    site.close()


def ask(site: CoreSite, request_id: str) -> int:
    num_tokens, _ = site.core.matched_tokens(
        request_id, digests_of(PROMPT), num_tokens=len(PROMPT), num_computed_tokens=0
    )
    return num_tokens


def load(site: CoreSite, request_id: str) -> StepNews:
    """Load a request and give what the worker says once it has been received."""
    num_tokens = ask(site, request_id)
    assert num_tokens == 16
    site.core.allocated(request_id, [SLOTS], num_computed_tokens=0, num_external_tokens=num_tokens)
    (worker,) = site.workers
    while True:
        worker.begin(encode_orders(site.core.orders()))
        worker.after_forward()
        with worker._has_ended:
            assert worker._has_ended.wait_for(lambda: not worker._open, 60.0)
        news = worker.take()
        site.core.reported(decode_report(news.report))
        site.core.received(news.received)
        if news.received:
            return news


def spoil_memory(site: CoreSite) -> None:
    memory: Any = site.ranks[0][Tier.HOST]
    memory.buffers[0][:] ^= 0xFF


def test_a_request_whose_load_failed_is_computed_although_another_tier_has_its_blocks(site: CoreSite) -> None:
    spoil_memory(site)
    news = load(site, "b")
    assert news.failed == {"b"}
    assert news.lost_slots == {0, 1, 2, 3}
    assert ask(site, "b") == 0, "it has waited once"
    assert ask(site, "c") == 16, "the disk's copies are good"
    site.core.finished("b")
    site.core.finished("c")


def test_a_request_whose_blocks_vanished_is_reported_as_failed(site: CoreSite) -> None:
    assert ask(site, "b") == 16
    for pool in site.pools:
        pool.reset()
    assert load(site, "b").failed == {"b"}
    site.core.finished("b")


def test_a_load_that_brought_everything_has_not_failed(site: CoreSite) -> None:
    news = load(site, "b")
    assert not news.failed
    assert not news.lost_slots
    site.core.finished("b")


def test_a_running_request_that_is_allocated_anew_was_preempted(site: CoreSite) -> None:
    load(site, "b")
    load(site, "b")
    site.core.preempted("b")
    site.core.finished("b")
    site.run()
    site.calm()


def test_a_load_that_takes_longer_than_computing_is_given_up(site: CoreSite) -> None:
    site.core.speed.tokens_per_s = 8.0  # two seconds for sixteen tokens
    site.pools[0].reset()
    assert ask(site, "b") == 16
    site.core.allocated("b", [SLOTS], num_computed_tokens=0, num_external_tokens=16)
    assert not site.core.orders().loads, "the disk reads"
    site.now += 1.9
    assert not site.core.orders().loads
    site.now += 0.2
    (order,) = site.core.orders().loads
    assert order.lost_slots == SLOTS[:4]
    assert not order.job_ids


def test_slots_that_a_window_has_left_are_not_saved_behind_a_load_within_the_step(site: CoreSite) -> None:
    group = dataclasses.replace(site.core._groups[0], window_blocks=2, null_slot=23)
    core = SchedulerCore([group], block_tokens=BLOCK_TOKENS, clock=lambda: site.now, loads_in_step=True)
    tokens = list(range(9 * BLOCK_TOKENS + 1))
    slots = [23, 23, *range(2, 12)]
    assert core.matched_tokens("b", digests_of(tokens), num_tokens=len(tokens), num_computed_tokens=0) == (16, False)
    core.allocated("b", [slots], num_computed_tokens=0, num_external_tokens=16)
    core.computed("b", digests_of(tokens), [slots], num_tokens=len(tokens))
    (worker,) = site.workers
    saved: list[int] = []
    for _ in range(2):
        orders = core.orders()
        jobs = [decode_job(data) for data in orders.jobs[0]]
        saved += [
            slot for job in jobs if isinstance(job, CopyJob) for slot in job.source_ids if job.source is Tier.DEVICE
        ]
        worker.begin(encode_orders(orders))
        worker.begin_sync_loads()
        worker.after_forward()
        with worker._has_ended:
            assert worker._has_ended.wait_for(lambda: not worker._open, 60.0)
        core.reported(decode_report(worker.take().report))
        core.computed("b", digests_of(tokens), [slots], num_tokens=len(tokens) + 1)
    core.finished("b")
    assert not saved, "the engine fills them anew by then"


def test_a_null_slot_is_never_loaded_into(site: CoreSite) -> None:
    group = dataclasses.replace(site.core._groups[0], null_slot=23)
    core = SchedulerCore([group], block_tokens=BLOCK_TOKENS, clock=lambda: site.now)
    core.matched_tokens("b", digests_of(PROMPT), num_tokens=len(PROMPT), num_computed_tokens=0)
    core.allocated("b", [[23, 23, 2, 3, 4]], num_computed_tokens=0, num_external_tokens=16)
    jobs = [decode_job(data) for data in core.orders().jobs[0]]
    assert [slot for job in jobs if isinstance(job, CopyJob) for slot in job.destination_ids] == [2, 3]
