"""What is known of a keyed tier: one question at a time, bounded, each answer told once; listings of several ranks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from presence_view import NONE, PATIENCE_S, MakeView, View, chain

from kvbm.errors import PoolClosed
from kvbm.jobs import InventoryJob, JobResult

# -- what requests missed --------------------------------------------------------------------------------------------


def test_blocks_that_a_request_missed_are_asked_for_and_known_with_their_parents(view: View) -> None:
    hashes = chain(6)
    view.there = {3, 4, 6}
    view.presence.want(hashes, 2)
    assert view.presence.step()
    assert view.asked == [[3, 4, 5, 6]]
    view.answer()
    assert view.known(hashes) == [3, 4, 6]
    assert view.parents(hashes[[2, 3, 5]]) == [2, 3, 5]
    view.presence.want(hashes, 0)
    assert view.presence.step()
    assert view.asked[1:] == [[1, 2]], "5 is known to be absent, others to be there"


def test_first_block_of_a_sequence_has_no_parent(view: View) -> None:
    view.there = {1}
    view.presence.want(chain(1), 0)
    view.presence.step()
    view.answer()
    assert view.parents(chain(1)) == [0]


def test_absent_blocks_are_asked_for_again_after_a_while(view: View) -> None:
    view.presence.want(chain(1), 0)
    view.presence.step()
    view.answer()
    for seconds, is_asked in ((view.limits.absent_s - 0.1, False), (0.1, True)):
        view.clock.advance(seconds)
        view.presence.want(chain(1), 0)
        assert view.presence.step() is is_asked


def test_what_was_found_meanwhile_is_not_remembered_as_absent(view: View) -> None:
    view.presence.want(chain(1), 0)
    view.presence.step()
    view.answer()
    view.presence.learn(chain(1), np.zeros((1, 2), dtype=np.uint64))
    view.pool.reset()
    view.presence.want(chain(1), 0)
    assert view.presence.step()


def test_absences_are_bounded_and_the_oldest_are_forgotten(make_view: MakeView) -> None:
    view = make_view(absent_blocks=3)
    view.presence.want(chain(5), 0)
    view.presence.step()
    view.answer()
    view.presence.want(chain(5), 0)
    assert view.presence.step()
    assert view.asked[1] == [1, 2]


@pytest.mark.parametrize("trouble", [{"reason": "the store does not answer"}, {"is_away": True}, {"is_too_late": True}])
def test_question_that_was_not_answered_teaches_nothing(view: View, trouble: dict[str, Any]) -> None:
    view.presence.want(chain(2), 0)
    view.presence.step()
    view.answer(**trouble)
    view.clock.advance(view.limits.away_s)
    view.presence.want(chain(2), 0)
    assert view.presence.step(), "neither is remembered as absent"
    assert view.asked == [[1, 2], [1, 2]]


def test_questions_are_bounded_and_one_at_a_time(make_view: MakeView) -> None:
    view = make_view(probe_blocks=5, job_blocks=4)
    for i in range(10):
        view.presence.want(chain(9, 1 + 100 * i), 0)
    assert view.presence.step()
    assert not view.presence.step(), "the first is open"
    assert [len(asked) for asked in view.asked] == [20], "five blocks of each request, four jobs' worth, the last whole"
    view.answer()
    assert view.presence.step()
    assert [len(asked) for asked in view.asked] == [20, 20]
    assert len({number for asked in view.asked for number in asked}) == 40


def test_requests_that_nobody_could_ask_for_are_forgotten_oldest_first(view: View) -> None:
    for i in range(300):
        view.presence.want(chain(1, 1 + i), 0)
    while view.presence.step():
        view.answer()
    assert [number for asked in view.asked for number in asked] == list(range(45, 301))


def test_same_block_is_asked_for_once(view: View) -> None:
    for _ in range(3):
        view.presence.want(chain(2), 0)
    view.presence.step()
    assert view.asked == [[1, 2]]


# -- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no room"), PoolClosed("closed"), KeyboardInterrupt()])
def test_question_that_could_not_be_sent_does_not_stop_later_ones(view: View, error: BaseException) -> None:
    view.errors = [error]
    view.presence.want(chain(1), 0)
    view.ask(chain(1, 3), lambda found: None)
    with pytest.raises(type(error)):
        view.presence.step()
    view.presence.want(chain(1, 5), 0)
    assert view.presence.step()
    assert view.asked == [[3, 5]], "what somebody waits for is kept"


def test_tier_that_is_away_is_left_alone_for_a_while(view: View, caplog: pytest.LogCaptureFixture) -> None:
    view.presence.want(chain(1), 0)
    view.presence.step()
    view.answer(is_away=True)
    assert view.presence.is_away
    view.presence.answered([JobResult(job_id=9, outcomes=NONE, is_away=True)])
    assert [record.getMessage() for record in caplog.records] == ["tier out of reach tier=remote seconds=5.0"]
    view.presence.want(chain(1), 0)
    view.clock.advance(view.limits.away_s - 0.1)
    assert not view.presence.step()
    view.clock.advance(0.1)
    assert not view.presence.is_away
    assert view.presence.step()
    view.presence.answered([JobResult(job_id=9, outcomes=NONE)])
    assert not view.presence.is_away


def test_two_threads_never_ask_at_once(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    is_sending, may_send = threading.Event(), threading.Event()
    submit = view.submit

    def slow(jobs: Any) -> None:
        is_sending.set()
        assert may_send.wait(PATIENCE_S)
        submit(jobs)

    view.presence._submit = slow  # type: ignore[assignment]
    view.presence.want(chain(1), 0)
    sent: list[bool] = []
    thread = threading.Thread(target=lambda: sent.append(view.presence.step()))
    thread.start()
    assert is_sending.wait(PATIENCE_S)
    view.presence.want(chain(1, 5), 0)
    assert not view.presence.step()
    may_send.set()
    thread.join(PATIENCE_S)
    assert sent == [True]
    assert not view.presence.step(), "it is open until it is answered"
    view.answer()
    assert view.presence.step()
    assert view.asked == [[1], [5]]


# -- the listing -----------------------------------------------------------------------------------------------------


def listing(found: list[int]) -> JobResult:
    hashes = np.array([[number, 7] for number in found], dtype=np.uint64).reshape(-1, 2)
    return JobResult(job_id=1, outcomes=NONE, hashes=hashes, parents=hashes - np.uint64(1))


def list_with(view: View, *ranks: JobResult, **trouble: Any) -> list[int]:
    view.presence.list()
    assert isinstance(view.jobs[0][0], InventoryJob)
    view.answer(*ranks, **trouble)
    return view.known(chain(20))


def test_listing_makes_known_what_is_there_with_its_parents(view: View) -> None:
    assert list_with(view, listing([3, 9, 4])) == [3, 4, 9]
    assert view.parents(chain(3, 3)[[0, 1]]) == [2, 3]
    assert not view.presence.step(), "a listing asks for nothing"


def test_ranks_that_disagree_make_known_what_all_of_them_have(view: View) -> None:
    assert list_with(view, listing([1, 2, 3, 4]), listing([4, 9, 2]), listing([2, 4, 5])) == [2, 4]
    assert view.parents(chain(1, 4)) == [3]


def test_listing_of_more_than_there_are_rows_keeps_the_youngest(make_view: MakeView) -> None:
    view = make_view(rows=3)
    assert list_with(view, listing([5, 1, 2, 7, 3])) == [2, 3, 7]
    other = make_view(rows=2)
    assert list_with(other, listing([5, 1, 2, 7, 3]), listing([3, 2, 1])) == [2, 3], "of those that all have"


def test_listing_longer_than_one_piece_is_learned_whole(make_view: MakeView) -> None:
    view = make_view(rows=10_000)
    found = list(range(1, 9001))
    list_with(view, listing(found))
    assert view.known(chain(9001)) == found


@pytest.mark.parametrize(
    ("ranks", "trouble"),
    [
        ([[1, 2], None], {}),
        ([None], {}),
        ([[1, 2]], {"reason": "the store does not answer"}),
        ([[1, 2]], {"is_too_late": True}),
        ([[]], {}),
        ([[1], [2]], {}),
    ],
)
def test_listing_that_is_not_whole_makes_nothing_known(view: View, ranks: Any, trouble: dict[str, Any]) -> None:
    results = [JobResult(job_id=1, outcomes=NONE) if found is None else listing(found) for found in ranks]
    assert list_with(view, *results, **trouble) == []


def test_what_is_known_already_takes_no_second_row(view: View) -> None:
    for _ in range(2):
        list_with(view, listing([1, 2, 3]))
    assert view.pool.status().inactive == 3
    view.pool.check()
