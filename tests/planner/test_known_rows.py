"""What was known long ago is asked for again, in the background, and kept or forgotten as the answer says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from presence_view import MakeView, View, chain

from kvbm.planner import known


def see_again(view: View, seconds: float) -> list[list[int]]:
    """Let time pass as the planner's thread sees it, answer what is asked, and give it."""
    view.asked.clear()
    end = view.clock() + seconds
    while True:
        while view.presence.step():
            if view.jobs:
                view.answer()
        if view.clock() >= end:
            return view.asked
        look = view.presence.next_look()
        assert look is not None
        view.clock.advance(min(end, max(look, view.clock() + 1e-3)) - view.clock())


def test_row_is_asked_for_again_after_a_while_and_kept_or_forgotten_as_the_answer_says(make_view: MakeView) -> None:
    view = make_view(known_s=100.0, rows=10)
    view.presence.learn(chain(4), np.zeros((4, 2), dtype=np.uint64))
    view.there = {1, 2, 3}
    assert see_again(view, 99.0) == []
    assert see_again(view, 10.0) == [[1, 2, 3, 4]]
    assert view.known(chain(4)) == [1, 2, 3]
    view.presence.want(chain(4)[3:], 0)
    assert not view.presence.step(), "it is known to be absent"
    assert see_again(view, 80.0) == [], "seen to be true not long ago"
    assert see_again(view, 30.0) == [[1, 2, 3]]


def test_row_of_our_own_write_is_asked_for_again_too(make_view: MakeView) -> None:
    view = make_view(known_s=100.0, rows=10)
    view.pool.register_blocks(view.pool.allocate_blocks(1).complete(chain(1))).release()
    assert see_again(view, 99.0) == []
    assert see_again(view, 100 / 8) == [[1]]
    assert view.known(chain(1)) == []


def test_row_in_use_is_not_forgotten(make_view: MakeView) -> None:
    view = make_view(known_s=100.0, rows=10)
    view.presence.learn(chain(1), np.zeros((1, 2), dtype=np.uint64))
    held = view.pool.match_sequence_hashes(chain(1))
    see_again(view, 110.0)
    assert view.known(chain(1)) == [1]
    held.release()


@pytest.mark.parametrize("trouble", [{"reason": "no answer"}, {"is_away": True}])
def test_question_without_an_answer_forgets_no_row_and_is_put_again(
    make_view: MakeView, trouble: dict[str, Any]
) -> None:
    view = make_view(known_s=100.0, rows=10)
    view.presence.learn(chain(2), np.zeros((2, 2), dtype=np.uint64))
    view.clock.advance(101.0)
    assert view.presence.step()
    view.answer(**trouble)
    assert view.known(chain(2)) == [1, 2]
    assert see_again(view, 15.0) == [[1, 2]]


def test_many_rows_are_asked_for_again_a_question_at_a_time_behind_what_requests_want(
    make_view: MakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_WINDOW", 8)
    view = make_view(known_s=100.0, rows=50, job_blocks=1)
    view.presence.learn(chain(40), np.zeros((40, 2), dtype=np.uint64))
    view.there = set(range(1, 41))
    view.clock.advance(101.0)
    view.presence.want(chain(1, 99), 0)
    asked = see_again(view, 0.0)
    assert asked[0][0] == 99
    assert max(map(len, asked)) == 4
    assert sorted(number for part in asked for number in part) == [*range(1, 41), 99]
    assert view.known(chain(40)) == list(range(1, 41))
