"""What is remembered of recent requests: where they matched, why no further, what came, and that it stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_site import BLOCK_TOKENS, CoreSite, digests_of

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.engines.explanation import Answer, Explanation, explain, summarise
from kvbm.engines.groups import Group
from kvbm.engines.history import History
from kvbm.engines.removals import Removals
from kvbm.engines.requests import Part, Request
from kvbm.errors import TransferTimeout
from kvbm.planner import Advice, EngineCopy, Planner
from kvbm.pool import BlockPool
from kvbm.types import HashArray, Tier

MakeSite = Callable[..., CoreSite]
MakeHistory = Callable[..., History]
TIERS = [Tier.HOST, Tier.DISK]


@pytest.fixture
def make_site(backend: Backend, tmp_path: Path) -> Iterator[MakeSite]:
    sites: list[CoreSite] = []

    def make(**given: Any) -> CoreSite:
        folder = tmp_path / str(len(sites))
        folder.mkdir()
        sites.append(CoreSite(backend, folder, **given))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


def tokens_of(seed: int, num_blocks: int) -> list[int]:
    return [seed * 1000 + i for i in range(num_blocks * BLOCK_TOKENS + 1)]


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


def reasons_of(answer: Answer) -> dict[str, str]:
    """Give for each tier why it did not have the first block that was missed."""
    (miss,) = answer.misses
    return {reason.tier: reason.why for reason in miss.reasons}


def hash_of(tokens: list[int], block: int) -> str:
    digests = Digests()
    return str(digests.extend(digests_of(tokens))[block].tobytes().hex())


def forget(site: CoreSite, level: int) -> None:
    """Evict every block of a tier, as if others had needed its room."""
    pool = site.pools[level]
    pool.allocate_blocks(pool.available_blocks).release()
    site.core.orders()


# -- what is told ----------------------------------------------------------------------------------------------


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
    assert by_tier["disk"].why == "never seen", "its reset has not been noticed yet: no step came between"
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


# -- what is kept ----------------------------------------------------------------------------------------------


def names_of(seed: int, num_blocks: int) -> HashArray:
    return np.random.default_rng(seed).integers(1, 2**63, (num_blocks, 2)).astype(np.uint64)


def none(num_blocks: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.full(num_blocks, -1, dtype=np.int8)


def told_of(history: History, request_id: str) -> Explanation:
    records = history.records()
    (record,) = [one for one in records if one.request_id == request_id]
    return explain(record, history, records)


@pytest.fixture
def make_history(make_site: MakeSite) -> MakeHistory:
    """Make a history over the pools of a site that serves nothing."""

    def make(windows: tuple[int, ...] = (0,), **given: Any) -> History:
        site = make_site()
        groups = [Group(site.planner, site.channels, window_blocks=window) for window in windows]
        return History(groups, block_tokens=BLOCK_TOKENS, clock=lambda: site.now, **given)

    return make


def test_oldest_request_goes_first(make_history: MakeHistory) -> None:
    history = make_history(num_requests=2)
    for request_id in "abc":
        history.asked(request_id, names_of(1, 1), num_computed=0, most=0, num_there=0, num_blocks=0)
    assert [record.request_id for record in history.records()] == ["b", "c"]
    history.saved("a", 5)  # which is not known any more
    history.saved("b", 5)
    assert [record.num_saved for record in history.records()] == [5, 0]


def test_arrays_of_long_prompts_push_the_oldest_out(make_history: MakeHistory) -> None:
    history = make_history()
    names = names_of(1, 2)
    for number in range(5):
        long = np.zeros(6 << 20, dtype=np.int8)
        history.asked(f"r{number}", names, num_computed=0, most=2, lying=[(TIERS, long)], num_there=2, num_blocks=2)
    assert [record.request_id for record in history.records()] == ["r3", "r4"]
    history.asked("huge", names, num_computed=0, most=2, lying=[(TIERS, np.zeros(20 << 20, dtype=np.int8))],
                  num_there=2, num_blocks=2)  # fmt: skip
    assert [record.request_id for record in history.records()] == ["huge"]
    history.asked("next", names, num_computed=0, most=2, num_there=2, num_blocks=2)
    assert [record.request_id for record in history.records()] == ["next"]


def test_same_answer_again_is_counted_not_kept(make_history: MakeHistory) -> None:
    history = make_history()
    for _ in range(5):
        history.asked("a", names_of(1, 2), num_computed=0, most=2, lying=[(TIERS, none(2))], num_there=0, num_blocks=0)
    (answer,) = told_of(history, "a").answers
    assert answer.num_times == 5


def test_answers_and_loads_and_notes_of_one_request_are_few(make_history: MakeHistory) -> None:
    history = make_history()
    for number in range(50):
        history.asked("a", names_of(1, 60), num_computed=number, most=60, lying=[(TIERS, none(60 - number))],
                      num_there=number, num_blocks=number)  # fmt: skip
        history.allocated("a", first=0, last=number)
        history.staged("a", {"host": number})
        history.noted("a", f"note {number}")
    found = told_of(history, "a")
    assert [answer.engine_blocks for answer in found.answers] == [0, 1, 48, 49]
    assert [len(answer.groups) for answer in found.answers] == [0, 0, 0, 1], "only the last one block by block"
    assert [load.promised_blocks for load in found.loads] == list(range(42, 50))
    assert [note.text for note in found.notes] == [f"note {number}" for number in range(42, 50)]


def test_sources_of_all_groups_are_added_up(make_history: MakeHistory) -> None:
    history = make_history()
    history.asked("a", names_of(1, 4), num_computed=0, most=4, num_there=4, num_blocks=4)
    history.allocated("a", first=0, last=4)
    history.staged("a", {"host": 3, "disk": 1})
    history.staged("a", {"disk": 2})
    assert summarise(history.records()[0], history).sources == {"host": 3, "disk": 3}
    assert summarise(history.records()[0], history).state == "loading"


def test_id_that_comes_again_behind_its_end_is_another_request(make_history: MakeHistory) -> None:
    history = make_history(num_requests=2)
    for _ in range(2):
        history.asked("a", names_of(1, 1), num_computed=0, most=1, num_there=0, num_blocks=0)
        history.finished("a")
    assert [record.request_id for record in history.records()] == ["a", "a"]
    history.asked("b", names_of(1, 1), num_computed=0, most=1, num_there=0, num_blocks=0)
    history.saved("a", 3)
    assert [(record.request_id, record.num_saved) for record in history.records()] == [("a", 3), ("b", 0)]


def test_calls_about_unknown_requests_change_nothing(make_history: MakeHistory) -> None:
    history = make_history()
    history.allocated("x", first=0, last=1)
    history.staged("x", {})
    history.noted("x", "")
    history.saved("x", 1)
    history.preempted("x")
    history.finished("x")
    assert history.records() == []


# -- what left the pools ---------------------------------------------------------------------------------------


def make_removals(backend: Backend, num_blocks: int) -> tuple[BlockPool, Removals]:
    pool = BlockPool(num_blocks, tier=Tier.HOST, backend=backend)
    return pool, Removals(pool, Planner([pool]))


def fill(pool: BlockPool, names: HashArray) -> None:
    pool.register_blocks(pool.allocate_blocks(len(names)).complete(names)).release()


def quiet() -> str:
    return ""


def test_what_left_is_found_with_its_cause_and_moment(backend: Backend) -> None:
    pool, removals = make_removals(backend, 8)
    names = names_of(1, 24)
    fill(pool, names[:8])
    assert removals.note(1.0, quiet) == 0
    fill(pool, names[8:16])
    assert removals.note(2.0, lambda: "something") == 8
    pool.reset_blocks(names[8:10])
    fill(pool, names[16:18])  # into the free ones
    assert removals.note(3.0, quiet) == 2
    found = [removals.find(name) for name in names]
    assert [one.causes[0] if one else "" for one in found] == ["evicted"] * 8 + ["reset"] * 2 + [""] * 14
    assert found[0] is not None
    assert found[8] is not None
    assert (found[0].at, found[8].at) == (2.0, 3.0)
    assert found[0].batch is not None
    assert (found[0].batch.num_removed, found[0].batch.pressure, found[0].total_blocks) == (8, "something", 8)
    assert removals.memory is None


def test_where_two_causes_meet_in_one_step_both_are_named(backend: Backend) -> None:
    pool, removals = make_removals(backend, 4)
    names = names_of(1, 8)
    fill(pool, names[:4])
    fill(pool, names[4:6])  # evicts the two oldest
    pool.reset_blocks(names[4:5])
    removals.note(1.0, quiet)
    found = removals.find(names[4])
    assert found is not None
    assert found.causes == ("evicted", "reset")


def test_more_names_than_places_are_forgotten_not_mixed_up(backend: Backend) -> None:
    pool, removals = make_removals(backend, 512)
    names = names_of(1, 12 * 512)
    for start in range(0, len(names), 512):
        fill(pool, names[start : start + 512])
        removals.note(float(start), quiet)
    found = [removals.find(name) for name in names]
    assert found[-512:] == [None] * 512, "they are there"
    assert sum(one is not None for one in found) <= 1024
    wrong = [place for place, one in enumerate(found) if one is not None and one.at != (place // 512 + 1) * 512.0]
    assert wrong == []
    assert removals.memory == 1024
    youngest = sum(one is not None for one in found[-2 * 512 : -512])
    assert youngest > 256, "most of those that left last are known"


def test_removals_that_were_overlooked_are_admitted(backend: Backend) -> None:
    pool, removals = make_removals(backend, 40)
    pool._hub.capacity = 20  # rows that wait for one reader
    for seed in range(2):
        fill(pool, names_of(seed, 40))
        removals.note(1.0, quiet)
    assert removals.memory is not None


def test_closed_history_reads_no_events_any_more(make_history: MakeHistory) -> None:
    history = make_history()
    history.close()
    history.close()
    assert not any(one._events.is_open for removals in history._removals for one in removals)
