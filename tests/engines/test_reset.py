"""An engine forgets what was cached, e.g. because its weights have changed, while blocks are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from books_site import DIGESTS, NUM_BLOCKS, NUM_TOKENS, BooksSite
from core_site import BLOCK_TOKENS, CoreSite, digests_of

from kvbm._backend import Backend
from kvbm.jobs import InventoryJob
from kvbm.jobs.messages import decode_job
from kvbm.types import HashArray, Tier

PROMPT = list(range(6 * BLOCK_TOKENS + 1))


@pytest.fixture
def site(backend: Backend, tmp_path: Path) -> Iterator[CoreSite]:
    site = CoreSite(backend, tmp_path)
    yield site
    site.close()


def names_of(tokens: list[int]) -> HashArray:
    return np.frombuffer(b"".join(digest[-16:] for digest in digests_of(tokens)), dtype="<u8").reshape(-1, 2)


def on_disk(site: CoreSite) -> int:
    """Count what a restart would find."""
    result = site.executors[0].execute(InventoryJob(job_id=0, tier=Tier.DISK))
    return len(result.hashes)


def test_a_reset_forgets_every_tier_for_whoever_asks_and_the_disk_for_whoever_restarts(site: CoreSite) -> None:
    site.add("a", PROMPT)
    site.run()
    assert on_disk(site) == 6
    assert site.core.reset()
    for pool in site.pools:
        assert (pool.lookup(names_of(PROMPT)) < 0).all(), pool.name
    assert site.core.has_work, "the disk has to be told"
    site.run()
    assert on_disk(site) == 0
    site.add("b", PROMPT)
    site.run()
    assert site.num_loaded == 0
    assert on_disk(site) == 6, "what is computed afterwards is kept"
    site.calm()


def test_saves_and_offloads_that_are_under_way_are_not_kept(site: CoreSite) -> None:
    site.add("a", PROMPT)
    for _ in range(4):  # saved, not reported; some on their way down
        site.step()
    if site.requests:
        site.abort("a")
    assert site.planner.num_open_jobs, "else this proves nothing"
    assert site.core.reset()
    site.run()
    for pool in site.pools:
        assert (pool.lookup(names_of(PROMPT)) < 0).all(), pool.name
    assert on_disk(site) == 0
    site.calm()


def test_a_reset_is_refused_while_a_request_loads(site: CoreSite) -> None:
    site.add("a", PROMPT)
    site.run()
    site.add("b", PROMPT)
    site.step()
    assert site.requests["b"].is_waiting
    assert not site.core.reset()
    assert (site.pools[0].lookup(names_of(PROMPT)) >= 0).all(), "nothing was forgotten"
    site.run()
    assert site.num_loaded == 6
    assert site.core.reset()
    site.run()
    site.calm()


def test_what_a_running_request_computes_after_a_reset_is_not_kept_until_it_begins_again(site: CoreSite) -> None:
    site.add("a", PROMPT)
    site.step()
    assert site.core.reset()
    site.run()
    site.step()
    assert (site.pools[0].lookup(names_of(PROMPT)) < 0).all(), "computed from blocks of before"
    site.add("b", PROMPT)
    site.step()
    assert site.core.reset()
    site.preempt("b")
    site.run()
    assert (site.pools[0].lookup(names_of(PROMPT)) >= 0).all(), "computed from nothing"
    site.calm()


def test_resets_in_a_row_leave_nothing(site: CoreSite) -> None:
    for turn in range(5):
        site.add(str(turn), [*range(turn, turn + 4 * BLOCK_TOKENS), 0])
        site.step()
        site.step()
        assert site.core.reset()
        assert site.core.reset()
    site.run()
    assert on_disk(site) == 0
    assert all(pool.status().inactive == 0 for pool in site.pools)
    site.calm()


# -- over books without bytes ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(backend: Backend) -> BooksSite:
    return BooksSite(backend)


def test_a_reset_is_not_refused_for_blocks_that_only_measure_a_tier_and_they_do_not_stay(disk: BooksSite) -> None:
    disk.believe(Tier.DISK, Tier.HOST, 20e6)
    disk.clock.advance(60.0)
    assert disk.ask("a") == 0
    (probe,) = disk.serve("a")
    assert disk.core.num_requests == 0
    assert disk.core.reset()
    for pool in disk.planner.pools:
        assert (pool.lookup(probe.hashes) < 0).all(), pool.name
    disk.answer([probe], 1e9)
    disk.core.orders()
    for pool in disk.planner.pools:
        assert (pool.lookup(probe.hashes) < 0).all(), pool.name
        assert pool.status().free == NUM_BLOCKS, pool.name


def test_a_reset_is_not_refused_for_a_load_that_was_given_up(disk: BooksSite) -> None:
    num_tokens = disk.ask("a") * 16
    disk.core.allocated("a", [list(range(NUM_BLOCKS))], num_computed_tokens=0, num_external_tokens=num_tokens)
    (hanging,) = [decode_job(data) for data in disk.core.orders().jobs[0]]
    assert not disk.core.reset()
    disk.clock.advance(60.0)
    disk.core.orders()
    disk.core.received(["a"])
    assert disk.core.reset()
    disk.answer([hanging], 1e9)
    disk.core.orders()
    for pool in disk.planner.pools:
        assert pool.status().free == NUM_BLOCKS, pool.name


def test_what_is_computed_behind_a_load_of_which_nothing_was_left_is_not_kept_after_a_reset(backend: Backend) -> None:
    site = BooksSite(backend, tier=Tier.HOST)
    slots, pool = [list(range(NUM_BLOCKS))], site.planner.pools[0]
    num_tokens, _ = site.core.matched_tokens("a", DIGESTS, num_tokens=NUM_TOKENS, num_computed_tokens=8 * 16)
    pool.allocate_blocks(NUM_BLOCKS).release()  # evicts all
    site.core.allocated("a", slots, num_computed_tokens=8 * 16, num_external_tokens=num_tokens or 0)
    site.core.orders()
    assert site.core.reset(), "nothing is on its way"
    site.core.received(["a"])
    site.core.computed("a", DIGESTS, slots, num_tokens=NUM_TOKENS)
    assert site.core.orders().jobs == [[]], "its first blocks are from before the reset"
    site.core.preempted("a")
    site.core.computed("a", DIGESTS, slots, num_tokens=NUM_TOKENS)
    assert site.core.orders().jobs != [[]], "it has begun again"
