"""Blocks that somebody waits to hear of: each wish is answered once, bounded, and ends when nobody has it any more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from presence_view import NONE, MakeView, View, chain, numbers

from kvbm.errors import PoolClosed
from kvbm.jobs import JobResult
from kvbm.types import HashArray


def test_whoever_asks_is_told_once_of_those_that_are_there(view: View) -> None:
    told: list[list[int]] = []
    view.there = {2, 4}
    view.ask(chain(5), lambda found: told.append(numbers(found)))
    assert view.presence.step()
    assert told == []
    view.answer()
    assert not view.presence.step()
    assert told == [[2, 4]]


def test_whoever_asks_for_what_is_not_there_is_told_so(view: View) -> None:
    told: list[list[int]] = []
    view.ask(chain(2), lambda found: told.append(numbers(found)))
    view.presence.step()
    view.answer()
    assert told == [[]]


def test_part_of_a_question_that_became_known_meanwhile_is_told_with_the_rest(view: View) -> None:
    told: list[list[int]] = []
    view.ask(chain(3), lambda found: told.append(numbers(found)))
    view.presence.learn(chain(1), np.zeros((1, 2), dtype=np.uint64))
    view.there = {3}
    view.presence.step()
    assert view.asked == [[2, 3]]
    view.answer()
    assert told == [[1, 3]]
    view.ask(chain(1, 8), lambda found: told.append(numbers(found)))
    view.presence.learn(chain(1, 8), np.zeros((1, 2), dtype=np.uint64))
    assert not view.presence.step(), "there is nothing left to ask"
    assert told == [[1, 3], [8]]


@pytest.mark.parametrize("is_away", [False, True])
def test_wish_that_nobody_has_any_more_is_not_asked_for_and_answered(view: View, is_away: bool) -> None:
    told: list[list[int]] = []
    waiting = [True]
    if is_away:
        view.presence.answered([JobResult(job_id=9, outcomes=NONE, is_away=True)])
    view.ask(chain(1), lambda found: told.append(numbers(found)), is_wanted=lambda: waiting[0])
    view.ask(chain(1, 5), lambda found: told.append([5, *numbers(found)]), until=view.clock() + 3.0)
    waiting.clear()
    waiting.append(False)
    view.clock.advance(3.0)
    assert not view.presence.step()
    assert told == [[], [5]]
    assert view.asked == []


def test_wish_outlives_a_short_absence_of_the_store(view: View) -> None:
    told: list[list[int]] = []
    view.there = {1}
    view.ask(chain(1), lambda found: told.append(numbers(found)))
    view.presence.step()
    view.answer(is_away=True)
    assert told == []
    assert view.presence.next_look() == view.clock() + view.limits.away_s
    view.clock.advance(view.limits.away_s)
    assert view.presence.step()
    view.answer()
    assert told == [[1]]


def test_what_requests_missed_while_the_store_was_away_for_long_is_forgotten(view: View) -> None:
    view.presence.want(chain(1), 0)
    view.clock.advance(view.limits.offload_timeout_s)
    view.presence.want(chain(1, 5), 0)
    assert view.presence.step()
    assert view.asked == [[5]]


def test_wishes_are_bounded_and_those_left_out_are_said(make_view: MakeView) -> None:
    view = make_view(job_blocks=1, prefetch_blocks=200)
    assert view.ask(chain(300), lambda found: None) == ([1] * 200, 100)
    assert view.ask(chain(100, 1000), lambda found: None) == ([1] * 56, 44)


def test_whoever_asks_is_not_put_off_by_an_absence_that_is_remembered(view: View) -> None:
    told: list[list[int]] = []
    view.presence.want(chain(1), 0)
    view.presence.step()
    view.answer()
    view.there = {1}
    view.ask(chain(1), lambda found: told.append(numbers(found)))
    assert view.presence.step()
    view.answer()
    assert told == [[1]]


def test_known_blocks_are_not_asked_for(view: View) -> None:
    told: list[Any] = []
    view.presence.learn(chain(3), np.zeros((3, 2), dtype=np.uint64))
    view.ask(chain(3), told.append)
    assert not view.presence.step()
    assert told == []


def test_large_question_is_cut_into_jobs_and_to_what_a_prefetch_may_bring(make_view: MakeView) -> None:
    view = make_view(prefetch_blocks=10, job_blocks=4, rows=16)
    view.there = set(range(1, 50))
    told: list[list[int]] = []
    view.ask(chain(20), lambda found: told.append(numbers(found)))
    while view.presence.step():
        view.answer()
    assert told == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert view.asked == [list(range(1, 11))]


def test_two_who_ask_for_the_same_are_both_told(view: View) -> None:
    view.there = {1, 2, 3}
    told: dict[str, list[int]] = {}
    view.ask(chain(2), lambda found: told.update(first=numbers(found)))
    view.ask(chain(2, 2), lambda found: told.update(second=numbers(found)))
    view.presence.step()
    assert view.asked == [[1, 2, 3]]
    view.answer()
    assert told == {"first": [1, 2], "second": [2, 3]}


def test_blocks_are_told_of_although_there_is_no_row_for_them(make_view: MakeView) -> None:
    view = make_view(rows=2)
    held = view.pool.allocate_blocks(2)
    view.there = {1}
    told: list[list[int]] = []
    view.ask(chain(1), lambda found: told.append(numbers(found)))
    view.presence.step()
    view.answer()
    assert told == [[1]]
    assert view.known(chain(1)) == []
    held.release()


def test_whoever_asked_a_manager_that_was_closed_meanwhile_is_let_be(view: View) -> None:
    def closed(found: HashArray) -> None:
        raise PoolClosed("the manager is closed")

    view.there = {1}
    view.ask(chain(1), closed)
    view.presence.step()
    view.answer()
    view.presence.want(chain(1, 5), 0)
    assert view.presence.step()
