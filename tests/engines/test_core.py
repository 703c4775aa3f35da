"""The two halves of a connector around an engine without a model: bytes, books, and every awkward order of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_site import BLOCK_TOKENS, CoreSite, digests_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.errors import BlockStateError, HashFormatError
from kvbm.jobs.messages import decode_job
from kvbm.planner import Limits
from kvbm.types import Tier

MakeCore = Callable[..., CoreSite]


@pytest.fixture
def make_core(backend: Backend, tmp_path: Path) -> Iterator[MakeCore]:
    sites: list[CoreSite] = []

    def make(**given_settings: Any) -> CoreSite:
        folder = tmp_path / str(len(sites))
        folder.mkdir()
        sites.append(CoreSite(backend, folder, **given_settings))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


def tokens_of(seed: int, num_blocks: int, more: int = 1) -> list[int]:
    return [seed * 1000 + i for i in range(num_blocks * BLOCK_TOKENS + more)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_second_request_with_the_same_prompt_computes_nothing_but_the_rest(make_core: MakeCore, num_ranks: int) -> None:
    site = make_core(num_ranks=num_ranks)
    prompt = tokens_of(1, 5)
    site.add("a", prompt)
    site.run()
    assert site.num_loaded == 0
    site.add("b", prompt)
    site.run()
    assert site.num_loaded == 5
    site.calm()


def test_a_prompt_of_whole_blocks_leaves_one_to_compute(make_core: MakeCore) -> None:
    site = make_core()
    prompt = tokens_of(1, 4, more=0)
    for request_id in "ab":
        site.add(request_id, prompt)
        site.run()
    assert site.num_loaded == 3
    site.calm()


def test_blocks_that_only_the_disk_has_are_loaded_through_the_host_tier(make_core: MakeCore) -> None:
    site = make_core()
    prompt = tokens_of(1, 6)
    site.add("a", prompt)
    site.run()
    site.pools[0].reset()
    site.add("b", prompt)
    site.run()
    assert site.num_loaded == 6
    names = np.frombuffer(b"".join(d[-16:] for d in digests_of(prompt)), dtype="<u8").reshape(-1, 2)
    assert (site.pools[0].lookup(names) >= 0).all(), "they are in memory now"
    site.calm()


def test_what_vanished_between_the_promise_and_the_load_is_computed(make_core: MakeCore) -> None:
    site = make_core(disk=10)
    prompt = tokens_of(1, 6)
    site.add("a", prompt)
    site.run()
    digests = digests_of(prompt)
    core = site.core
    assert core.matched_tokens("b", digests, num_tokens=len(prompt), num_computed_tokens=0) == (24, True)
    for pool in site.pools:
        pool.reset()
    site.add("b", prompt)
    site.run()
    assert site.num_lost == 6
    assert site.num_loaded == 0
    site.calm()


def test_a_flipped_bit_is_computed_again_and_the_text_stays_right(make_core: MakeCore) -> None:
    site = make_core()
    prompt = tokens_of(1, 4)
    site.add("a", prompt)
    site.run()
    site.pools[1].reset()
    memory = site.ranks[0][Tier.HOST]
    memory.buffers[0][memory.layout.strides.block * 2 + 5] ^= 1  # type: ignore[attr-defined]
    site.add("b", prompt)
    site.run()
    assert site.num_lost
    assert site.planner.statistics().mismatches["host"] == 1
    site.add("c", prompt)
    site.run()
    assert site.num_loaded >= 4, "what was computed again is kept again"
    site.calm()


def test_one_rank_that_has_lost_a_block_makes_all_compute_it(make_core: MakeCore) -> None:
    site = make_core(num_ranks=2)
    prompt = tokens_of(1, 3)
    site.add("a", prompt)
    site.run()
    memory = site.ranks[1][Tier.HOST]
    memory.buffers[0][:] ^= 0xFF  # type: ignore[attr-defined]
    site.pools[1].reset()
    site.add("b", prompt)
    site.run()
    assert site.num_lost == 3
    site.calm()


def test_asking_is_free_of_side_effects(make_core: MakeCore) -> None:
    site = make_core()
    prompt = tokens_of(1, 3)
    site.add("a", prompt)
    site.run()
    before = site.planner.statistics().hits.copy(), [pool.status() for pool in site.pools]
    for _ in range(100):
        site.core.matched_tokens("b", digests_of(prompt), num_tokens=len(prompt), num_computed_tokens=0)
    assert (site.planner.statistics().hits, [pool.status() for pool in site.pools]) == before
    assert not site.core.finished("b")
    assert not site.core.finished("nobody")
    site.calm()


def test_tokens_that_are_no_whole_blocks_are_the_engines_own(make_core: MakeCore) -> None:
    core = make_core().core
    assert core.matched_tokens("a", digests_of(tokens_of(1, 3)), num_tokens=13, num_computed_tokens=3) == (0, False)
    assert core.matched_tokens("a", [], num_tokens=0, num_computed_tokens=0) == (0, False)
    core.finished("a")


def test_calls_in_an_impossible_order_say_so(make_core: MakeCore) -> None:
    site = make_core()
    prompt = tokens_of(1, 2)
    site.add("a", prompt)
    site.run()
    core = site.core
    core.matched_tokens("b", digests_of(prompt), num_tokens=9, num_computed_tokens=0)
    core.allocated("b", [[0, 1]], num_computed_tokens=0, num_external_tokens=8)
    with pytest.raises(BlockStateError, match="cannot go from"):
        core.allocated("b", [[0, 1]], num_computed_tokens=0, num_external_tokens=8)
    core.allocated("b", [[0, 1]], num_computed_tokens=0, num_external_tokens=0)
    assert not core.finished("b")
    site.held["b"] = []
    site.run()
    site.calm()


def test_a_session_that_goes_on_without_its_last_token_is_saved_under_its_new_name(make_core: MakeCore) -> None:
    site = make_core()
    core, taken_back, kept = site.core, tokens_of(1, 2, more=0), tokens_of(2, 2, more=0)
    kept[:BLOCK_TOKENS] = taken_back[:BLOCK_TOKENS]
    core.matched_tokens("a", digests_of(taken_back), num_tokens=9, num_computed_tokens=0)
    assert core.computed("a", digests_of(taken_back), [[0, 1]], num_tokens=7) == 8
    assert core.computed("a", digests_of(kept)[:1], [[0, 1]], num_tokens=7) == 8
    core.computed("a", digests_of(kept), [[0, 1]], num_tokens=8)
    (first, second) = (job for data in core.orders().jobs[0] for job in [decode_job(data)])
    names = np.concatenate([first.hashes, second.hashes])
    assert [row.tobytes() for row in names] == [digest[-16:] for digest in digests_of(kept)]


def test_blocks_that_are_computed_again_are_saved_again(make_core: MakeCore) -> None:
    site = make_core()
    site.add("a", tokens_of(1, 6))
    site.step()
    site.step()
    while site.core.has_work:
        site.step(may_compute=False)
    for pool in site.pools:
        pool.reset()  # as if others had needed the room
    site.preempt("a")
    site.run()
    site.add("b", tokens_of(1, 6))
    site.run()
    assert site.num_loaded == 6
    site.calm()


def test_an_answer_does_not_outlive_the_names_that_it_was_of(make_core: MakeCore) -> None:
    site = make_core()
    prompt, other = tokens_of(1, 3), tokens_of(2, 3)
    site.add("a", prompt)
    site.run()
    core = site.core
    assert core.matched_tokens("b", digests_of(prompt), num_tokens=13, num_computed_tokens=0) == (12, True)
    assert core.matched_tokens("b", digests_of(other), num_tokens=13, num_computed_tokens=0) == (0, False)
    core.finished("b")


def test_short_digests_are_refused(make_core: MakeCore) -> None:
    core = make_core().core
    with pytest.raises(HashFormatError, match="8 bytes, need 16 or more"):
        core.matched_tokens("a", [b"12345678"], num_tokens=5, num_computed_tokens=0)
    core.finished("a")


prompts = st.tuples(st.integers(1, 3), st.integers(1, 5)).map(lambda pair: tokens_of(*pair))


verbs = st.sampled_from(["add", "step", "step", "abort", "preempt", "evict", "flip"])
acts = st.lists(st.tuples(verbs, st.integers(0, 2**20), prompts), min_size=1, max_size=25)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    acts=acts,
    num_slots=st.integers(6, 16),
    host=st.integers(1, 8),
    ranks=st.sampled_from([(1, False), (2, False), (2, True)]),
    job_blocks=st.integers(1, 3),
    share=st.sampled_from([0.25, 1.0]),
)
def test_no_schedule_gives_a_request_a_wrong_byte_or_leaks_a_block(
    make_core: MakeCore,
    acts: list[Any],
    num_slots: int,
    host: int,
    ranks: tuple[int, bool],
    job_blocks: int,
    share: float,
) -> None:
    """Jobs run on threads, so nothing is drawn that depends on how far they are."""
    limits = Limits(job_blocks=job_blocks, in_flight_share=share)
    site = make_core(num_slots=num_slots, host=host, disk=12, num_ranks=ranks[0], is_shared=ranks[1], limits=limits)
    for number, (verb, choice, prompt) in enumerate(acts):
        known = sorted(site.requests)
        if verb == "add" and len(known) < 4:
            site.add(f"r{number}", prompt)
        elif verb == "step":
            site.step(num_blocks=1 + choice % 3)
        elif verb in ("abort", "preempt") and known:
            getattr(site, verb)(known[choice % len(known)])
        elif verb == "evict":
            pool = site.pools[choice % 2]
            pool.allocate_blocks(pool.available_blocks).release()
        elif verb == "flip" and not site.core.has_work:
            memory = site.ranks[0][Tier.HOST].buffers[0]  # type: ignore[attr-defined]
            memory[choice % len(memory)] ^= 8
    site.run()
    site.calm()
