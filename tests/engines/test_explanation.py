"""What is told of a request: where it matched, why no further, what came, and what was lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from core_site import BLOCK_TOKENS, CoreSite, digests_of
from history_site import MakeHistory, MakeSite, names_of, none, reasons_of, tokens_of, told_of

from kvbm.engines.digests import Digests
from kvbm.engines.explanation import Explanation, explain
from kvbm.engines.requests import Part, Request
from kvbm.errors import TransferTimeout
from kvbm.planner import Advice, EngineCopy
from kvbm.types import Tier

TIERS = [Tier.HOST, Tier.DISK]


def serve(site: CoreSite, request_id: str, tokens: list[int]) -> None:
    """Run a request to its end; the next one comes a second later."""
    site.add(request_id, tokens)
    site.run()
    site.now += 1.0


def ask(site: CoreSite, request_id: str, tokens: list[int]) -> int:
    digests = digests_of(tokens)
    num_tokens, _ = site.core.matched_tokens(request_id, digests, num_tokens=len(tokens), num_computed_tokens=0)
    return num_tokens


def told(site: CoreSite, request_id: str) -> Explanation:
    """Give what the youngest request of this id is explained by."""
    records = site.core.history.records()
    (record, *_) = [one for one in reversed(records) if one.request_id == request_id]
    return explain(record, site.core.history, records)


def hash_of(tokens: list[int], block: int) -> str:
    digests = Digests()
    return str(digests.extend(digests_of(tokens))[block].tobytes().hex())


def forget(site: CoreSite, level: int) -> None:
    """Evict every block of a tier, as if others had needed its room."""
    pool = site.pools[level]
    pool.allocate_blocks(pool.available_blocks).release()
    site.core.orders()


def test_hit_is_told_with_its_tiers_its_first_miss_and_its_load(make_site: MakeSite) -> None:
    site = make_site()
    serve(site, "a", tokens_of(1, 5))
    forget(site, 0)
    serve(site, "b", tokens_of(1, 8))
    found = told(site, "b")
    (answer,) = found.answers
    assert [(run.first, run.num_blocks, run.tier) for run in answer.groups[0].runs] == [(0, 5, "disk"), (5, 3, "none")]
    assert (answer.engine_blocks, answer.there_blocks, answer.promised_blocks, answer.usable_blocks) == (0, 5, 5, 8)
    (miss,) = answer.misses
    assert (miss.block, miss.hash) == (5, hash_of(tokens_of(1, 8), 5))
    (load,) = found.loads
    assert (load.first, load.promised_blocks, load.loaded_blocks, load.losses) == (0, 5, 5, [])
    assert load.sources == {"disk": 5}
    assert load.seconds == 0.0, "by the clock of the site, which stands still"
    assert found.saved_blocks
    assert found.finished_at == found.summary.at
    assert found.first_hash == hash_of(tokens_of(1, 8), 0)
    assert found.last_hash == hash_of(tokens_of(1, 8), 7)
    assert (found.summary.state, found.summary.loaded_blocks, found.summary.sources) == ("finished", 5, {"disk": 5})


def test_block_that_nobody_brought_was_never_seen_and_tiers_that_are_absent_are_named(make_site: MakeSite) -> None:
    site = make_site()
    serve(site, "a", tokens_of(1, 3))
    (answer,) = told(site, "a").answers
    assert reasons_of(answer) == {"host": "never seen", "disk": "never seen", "remote": "tier absent"}
    assert "the host tier has not had it since this process began" in answer.end


def test_evicted_block_is_told_with_the_moment_and_with_what_needed_its_room(make_site: MakeSite) -> None:
    site = make_site(host=6)
    serve(site, "a", tokens_of(1, 5))
    serve(site, "b", tokens_of(2, 5))
    site.pools[1].reset()
    site.now += 4.0
    site.add("a again", tokens_of(1, 5))
    site.step()
    (miss,) = told(site, "a again").answers[0].misses
    by_tier = {reason.tier: reason for reason in miss.reasons}
    assert by_tier["host"].why == "evicted"
    assert by_tier["host"].seconds_before == 5.0
    assert "of request b" in by_tier["host"].text
    assert "of 6 blocks were in use" in by_tier["host"].text
    assert by_tier["disk"].why == "reset"
    site.run()


def test_reset_is_no_eviction(make_site: MakeSite) -> None:
    site = make_site()
    serve(site, "a", tokens_of(1, 3))
    for pool in site.pools:
        pool.reset()
    site.core.orders()
    ask(site, "b", tokens_of(1, 3))
    assert reasons_of(told(site, "b").answers[0]) == {"host": "reset", "disk": "reset", "remote": "tier absent"}


def test_eviction_from_the_lower_tier_is_blamed_on_what_came_down(make_site: MakeSite) -> None:
    site = make_site(disk=6)
    for seed in range(1, 4):
        serve(site, f"r{seed}", tokens_of(seed, 5))
    ask(site, "b", tokens_of(1, 5))
    (miss,) = told(site, "b").answers[0].misses
    by_tier = {reason.tier: reason for reason in miss.reasons}
    assert by_tier["disk"].why == "evicted"
    assert "blocks that came down from the host tier" in by_tier["disk"].text


def test_wrong_checksum_is_named_for_the_load_and_for_the_next_request(make_site: MakeSite) -> None:
    site = make_site()
    prompt = tokens_of(1, 4)
    serve(site, "a", prompt)
    site.pools[1].reset()
    memory = site.ranks[0][Tier.HOST]
    ids = site.pools[0].lookup(Digests().extend(digests_of(prompt)))
    memory.buffers[0][memory.layout.strides.block * int(ids[2]) + 5] ^= 1  # type: ignore[attr-defined]
    site.add("b", prompt)
    site.step()
    while told(site, "b").loads[0].seconds is None:
        site.step()
    (load,) = told(site, "b").loads
    assert load.loaded_blocks == 2
    (loss,) = load.losses
    assert loss == "group 0: block 2 and those behind it: it left the host tier meanwhile (checksum)"
    ask(site, "c", prompt)
    answer = told(site, "c").answers[0]
    assert answer.misses[0].block == 2
    assert reasons_of(answer)["host"] == "checksum"
    site.run()


def test_what_vanished_behind_the_promise_is_named_as_lost(make_site: MakeSite) -> None:
    site = make_site()
    prompt = tokens_of(1, 4)
    serve(site, "a", prompt)
    assert ask(site, "b", prompt) == 4 * BLOCK_TOKENS
    for level in (0, 1):
        forget(site, level)
    site.add("b", prompt)
    site.run()
    (load,) = told(site, "b").loads
    assert (load.loaded_blocks, load.sources) == (0, {})
    assert load.losses == ["group 0: block 0 and those behind it: it left the host tier meanwhile (evicted)"]


def test_tier_that_is_left_alone_is_too_slow(make_site: MakeSite) -> None:
    site = make_site()
    prompt = tokens_of(1, 4)
    serve(site, "a", prompt)
    forget(site, 0)
    for _ in range(3):
        site.core.guard.observe(Tier.DISK, 2.0, 1.0)
    assert ask(site, "b", prompt) == 0
    (answer,) = told(site, "b").answers
    assert reasons_of(answer) == {"disk": "too slow"}
    assert answer.there_blocks == 0
    assert answer.groups[0].runs[0].tier == "disk", "it lies there all the same"


def test_block_on_its_way_into_the_tiers_is_being_saved(make_site: MakeSite) -> None:
    site = make_site()
    prompt = tokens_of(1, 3)
    ask(site, "a", prompt)
    site.core.computed("a", digests_of(prompt), [[0, 1, 2]], num_tokens=len(prompt))
    ask(site, "b", prompt)
    assert "being saved" in [reason.why for reason in told(site, "b").answers[0].misses[0].reasons]
    site.core.finished("a")
    site.held["a"] = []
    site.run()


def test_request_that_missed_the_same_block_before_is_named(make_site: MakeSite) -> None:
    site = make_site()
    prompt = tokens_of(1, 3)
    ask(site, "a", prompt)
    site.now += 2.0
    ask(site, "b", prompt)
    (miss,) = told(site, "b").answers[0].misses
    assert miss.reasons[-1].why == "missed before"
    assert miss.reasons[-1].text.startswith("request a looked for it 2 s before, and was still being computed")
    assert "missed before" not in [reason.why for reason in told(site, "a").answers[0].misses[0].reasons]


def test_tier_that_cannot_be_reached_is_named(make_history: MakeHistory) -> None:
    history = make_history()
    history.asked(
        "a", names_of(1, 4), num_computed=0, most=4, lying=[([Tier.HOST], none(4))], num_there=0, num_blocks=0
    )
    assert reasons_of(told_of(history, "a").answers[0]) == {
        "host": "never seen", "disk": "unreachable", "remote": "tier absent"
    }  # fmt: skip


def test_blocks_that_are_sooner_computed_are_told_with_the_estimate(make_history: MakeHistory) -> None:
    history = make_history()
    advice = Advice(2, 4, (), 0.5, 0.4, 0.6, 0.1, "computing is sooner behind the cut: disk 1 MB/s")
    there = np.ones(4, dtype=np.int8)
    history.asked(
        "a", names_of(1, 4), num_computed=0, most=4, lying=[(TIERS, there)], num_there=4, num_blocks=2, advice=advice
    )
    (answer,) = told_of(history, "a").answers
    assert answer.end == "2 more lie there and are sooner computed: computing is sooner behind the cut: disk 1 MB/s"
    assert (answer.predicted_load_s, answer.predicted_recompute_s) == (0.5, 0.4)
    assert answer.misses == []


@pytest.mark.parametrize(
    ("num_computed", "most", "num_named", "end"),
    [
        (4, 4, 4, "the engine has every block that it can use"),
        (0, 4, 4, "every block that can be used was found"),
        (0, 3, 4, "every block that can be used was found (one token is left to compute)"),
    ],
)
def test_prefix_that_is_all_there_is_told_so(
    make_history: MakeHistory, num_computed: int, most: int, num_named: int, end: str
) -> None:
    history = make_history()
    there = np.zeros(most - num_computed, dtype=np.int8)
    lying = [(TIERS, there)] if len(there) else []
    history.asked(
        "a", names_of(1, num_named), num_computed=num_computed, most=most, lying=lying, num_there=most, num_blocks=most
    )
    (answer,) = told_of(history, "a").answers
    assert answer.end == end
    assert answer.misses == []


@pytest.mark.parametrize(
    ("num_staged", "end", "loaded", "why"),
    [
        (3, [True, False, True], 1, "its copy to the engine failed"),
        (2, [True, True], 2, "it did not come in time"),
        (0, None, 0, "it did not come in time"),
        (3, None, 0, "its copy to the engine failed"),
        (3, TransferTimeout("not settled within 1 s"), 0, "not settled within 1 s"),
    ],
)
def test_load_that_did_not_bring_all_says_from_which_block_on(
    make_history: MakeHistory, num_staged: int, end: list[bool] | Exception | None, loaded: int, why: str
) -> None:
    history = make_history()
    request = Request("a", Digests(), [0])
    names = request.digests.extend([bytes([number] * 32) for number in range(1, 6)])
    history.asked("a", names, num_computed=1, most=4, num_there=4, num_blocks=4)
    history.allocated("a", first=1, last=4)
    copy = EngineCopy(clock=history.clock)
    if isinstance(end, Exception):
        copy.set_exception(end)
    elif end is not None:
        copy.set_result(np.array(end))
    slots = np.arange(3, dtype=np.int32)
    request.parts = [Part(0, slots, copy=copy if num_staged else None, num_staged=num_staged)]
    history.received(request)
    (load,) = told_of(history, "a").loads
    assert load.loaded_blocks == loaded
    assert load.losses == [f"group 0: block {1 + loaded} and those behind it: {why}"]


def test_request_without_a_full_block_is_told(make_history: MakeHistory) -> None:
    history = make_history()
    history.asked("a", names_of(1, 0), num_computed=0, most=0, num_there=0, num_blocks=0)
    found = told_of(history, "a")
    assert (found.summary.chain_blocks, found.first_hash, found.answers[0].misses) == (0, "", [])


def test_window_group_is_asked_for_its_window_only(make_history: MakeHistory) -> None:
    history = make_history(windows=(0, 2))
    whole, window = np.zeros(6, dtype=np.int8), np.array([-1, -1, 0, 0, -1, 0], dtype=np.int8)
    history.asked(
        "a", names_of(1, 6), num_computed=0, most=6, lying=[(TIERS, whole), (TIERS, window)], num_there=4, num_blocks=4
    )
    (answer,) = told_of(history, "a").answers
    assert [(miss.group, miss.block) for miss in answer.misses] == [(1, 4)]
    assert [group.window_blocks for group in answer.groups] == [0, 2]
