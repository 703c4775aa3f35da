"""What is remembered of recent requests: the youngest, a few of everything, and that it stays small."""

from __future__ import annotations

import numpy as np
from history_site import MakeHistory, names_of, none, told_of

from kvbm.engines.explanation import summarise
from kvbm.types import Tier

TIERS = [Tier.HOST, Tier.DISK]


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


def test_closed_history_reads_no_events_any_more(make_history: MakeHistory) -> None:
    history = make_history()
    history.close()
    history.close()
    assert not any(one._events.is_open for removals in history._removals for one in removals)
