"""Transfer: it ends once, in one of four ways, for whoever waits and however they wait."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvbm.errors import TransferCancelled, TransferTimeout
from kvbm.jobs import Transfer, TransferState

PATIENCE_S = 60.0
TIME_OUT = "the transfer did not end before its deadline"


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_new_transfer_is_pending() -> None:
    transfer: Transfer[int] = Transfer()
    assert transfer.state is TransferState.PENDING
    assert (transfer.done(), transfer.cancelled(), transfer.is_draining) == (False, False, False)
    assert not transfer.wait(0)
    assert repr(transfer) == "Transfer(pending)"


def test_result_ends_it_once() -> None:
    transfer: Transfer[int] = Transfer()
    assert transfer.set_result(5)
    assert not transfer.set_result(6)
    assert not transfer.set_exception(ValueError("late"))
    assert not transfer.cancel()
    assert (transfer.state, transfer.result(), transfer.exception()) == (TransferState.DONE, 5, None)
    assert transfer.wait()
    assert Transfer.completed([1]).result(0) == [1]


def test_failure_is_raised_at_every_wait() -> None:
    transfer: Transfer[int] = Transfer()
    error = ValueError("torn")
    assert transfer.set_exception(error)
    assert not transfer.set_result(1)
    assert (transfer.state, transfer.exception()) == (TransferState.FAILED, error)
    for _ in range(2):
        with pytest.raises(ValueError, match="torn"):
            transfer.result()


def test_cancelled_is_ended_for_its_waiter_and_drains_until_it_has_landed() -> None:
    transfer: Transfer[int] = Transfer()
    assert transfer.cancel()
    assert not transfer.cancel()
    assert (transfer.state, transfer.cancelled(), transfer.is_draining) == (TransferState.CANCELLED, True, True)
    assert repr(transfer) == "Transfer(cancelled, draining)"
    with pytest.raises(TransferCancelled, match="was cancelled"):
        transfer.result()
    assert not transfer.set_result(3), "the bytes came late"
    assert not transfer.is_draining
    assert transfer.cancelled()
    assert repr(transfer) == "Transfer(cancelled)"


@pytest.mark.parametrize("end", ["set_result", "set_exception"])
def test_end_may_come_before_the_bytes_have_landed(end: str) -> None:
    transfer: Transfer[Any] = Transfer()
    assert getattr(transfer, end)(ValueError("partial"), has_landed=False)
    assert transfer.done()
    assert transfer.is_draining
    transfer.set_landed()
    assert not transfer.is_draining


def test_landed_before_the_end_is_not_draining() -> None:
    transfer: Transfer[int] = Transfer()
    transfer.set_landed()
    assert not transfer.done()
    transfer.cancel()
    assert not transfer.is_draining


def test_deadline_ends_it_exactly_when_it_is_reached() -> None:
    clock = FakeClock()
    transfer: Transfer[int] = Transfer(deadline_s=2.0, clock=clock)
    clock.now = 101.999
    assert not transfer.done()
    clock.now = 102.0
    assert transfer.state is TransferState.TIMED_OUT
    assert transfer.is_draining
    for _ in range(2):
        with pytest.raises(TransferTimeout, match=TIME_OUT):
            transfer.result()
    assert not transfer.set_result(1)
    assert not transfer.is_draining


def test_result_before_the_deadline_stays() -> None:
    clock = FakeClock()
    transfer: Transfer[int] = Transfer(deadline_s=2.0, clock=clock)
    transfer.set_result(9)
    clock.now = 200.0
    assert transfer.result() == 9


@pytest.mark.parametrize("deadline_s", [0.0, -1.0])
def test_deadline_that_is_over_ends_at_the_first_look(deadline_s: float) -> None:
    with pytest.raises(TransferTimeout, match=TIME_OUT):
        Transfer(deadline_s=deadline_s, clock=FakeClock()).result()


def test_what_is_done_at_the_deadline_may_end_it_with_what_there_is() -> None:
    clock = FakeClock()
    calls: list[str] = []

    def expire() -> None:
        calls.append(transfer.state.value)  # looks again, from within
        transfer.set_result("half", has_landed=False)

    transfer: Transfer[str] = Transfer(deadline_s=1.0, clock=clock, on_deadline=expire)
    clock.now = 99.0
    assert not transfer.wait(0)
    clock.now = 101.0
    assert transfer.result(0) == "half"
    assert transfer.is_draining
    assert calls == ["pending"]


def test_what_is_done_at_the_deadline_is_done_once_and_everybody_hears_its_result() -> None:
    clock = FakeClock()
    has_begun, may_end = threading.Event(), threading.Event()
    calls: list[int] = []

    def expire() -> None:
        calls.append(1)
        has_begun.set()
        assert may_end.wait(PATIENCE_S)
        transfer.set_result("half")

    transfer: Transfer[str] = Transfer(deadline_s=1.0, clock=clock, on_deadline=expire)
    clock.now = 101.0
    first, first_answers = in_thread(transfer.result)
    assert has_begun.wait(PATIENCE_S)
    second, second_answers = in_thread(transfer.result)
    assert transfer.state is TransferState.PENDING, "whoever looks meanwhile does not end it with nothing"
    may_end.set()
    for thread in (first, second):
        thread.join(PATIENCE_S)
    assert (first_answers, second_answers, calls) == (["half"], ["half"], [1])


def test_what_fails_at_the_deadline_is_logged_and_the_transfer_times_out(caplog: pytest.LogCaptureFixture) -> None:
    def expire() -> None:
        raise RuntimeError("books are shut")

    transfer: Transfer[str] = Transfer(deadline_s=0, on_deadline=expire)
    assert transfer.state is TransferState.TIMED_OUT
    assert "what a transfer does at its deadline failed" in caplog.text


def test_waiting_ends_with_the_time_given_and_may_be_repeated() -> None:
    transfer: Transfer[int] = Transfer()
    for _ in range(2):
        assert not transfer.wait(0.001)
        with pytest.raises(TransferTimeout, match=r"did not end within 0\.001 s; it goes on"):
            transfer.result(0.001)
        with pytest.raises(TransferTimeout):
            transfer.exception(0)
    transfer.set_result(4)
    assert transfer.result(0) == 4


@pytest.mark.parametrize("settings", [{}, {"deadline_s": float("inf")}, {"deadline_s": 1e300}])
@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300])
def test_waiting_for_ever_is_waiting_until_it_ends(settings: dict[str, float], timeout: float | None) -> None:
    has_looked = threading.Event()

    def clock() -> float:
        has_looked.set()
        return 0.0

    transfer: Transfer[int] = Transfer(clock=clock, **settings)
    has_looked.clear()
    thread, answers = in_thread(lambda: transfer.result(timeout))
    if settings or timeout is not None:
        assert has_looked.wait(PATIENCE_S)
    assert thread.is_alive()
    transfer.set_result(8)
    thread.join(PATIENCE_S)
    assert answers == [8]


def test_waiter_is_woken_by_the_real_deadline() -> None:
    transfer: Transfer[int] = Transfer(deadline_s=0.01)
    assert transfer.wait()
    assert transfer.state is TransferState.TIMED_OUT


def test_callbacks_are_called_once_each_in_order_also_when_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, TransferState]] = []
    transfer: Transfer[int] = Transfer()

    def bad(ended: Transfer[int]) -> None:
        calls.append((1, ended.state))
        raise ValueError("callback")

    transfer.add_done_callback(lambda ended: calls.append((0, ended.state)))
    transfer.add_done_callback(bad)
    transfer.add_done_callback(lambda ended: calls.append((2, ended.state)))
    assert calls == []
    transfer.cancel()
    transfer.set_result(1)
    assert calls == [(i, TransferState.CANCELLED) for i in range(3)]
    transfer.add_done_callback(bad)
    assert calls[3:] == [(1, TransferState.CANCELLED)], "at once when it has ended"
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_callback_may_use_the_transfer() -> None:
    transfer: Transfer[int] = Transfer()
    seen: list[Any] = []
    transfer.add_done_callback(lambda ended: seen.extend([ended.result(0), ended.cancel(), ended.wait(), repr(ended)]))
    transfer.set_result(1)
    assert seen == [1, False, True, "Transfer(done)"]


def test_of_cancel_and_result_exactly_one_wins() -> None:
    num_rounds = 10_000
    start = threading.Barrier(2)
    transfers: list[Transfer[int]] = [Transfer() for _ in range(num_rounds)]
    calls: list[list[int]] = [[] for _ in range(num_rounds)]
    wins: dict[str, list[bool]] = {"cancel": [], "result": []}

    def count(i: int) -> Callable[[Transfer[int]], None]:
        def add(_: Transfer[int]) -> None:
            calls[i].append(i)

        return add

    def play(name: str, end: Callable[[Transfer[int]], bool]) -> None:
        for i, transfer in enumerate(transfers):
            start.wait()
            if i % 2:  # a callback that is added while it ends, and one from before
                transfer.add_done_callback(count(i))
            wins[name].append(end(transfer))

    for i in range(0, num_rounds, 2):
        transfers[i].add_done_callback(count(i))
        transfers[i].add_done_callback(count(i))
    canceller = threading.Thread(target=play, args=("cancel", Transfer.cancel))
    canceller.start()
    play("result", lambda transfer: transfer.set_result(7))
    canceller.join(PATIENCE_S)
    assert all(a != b for a, b in zip(wins["cancel"], wins["result"], strict=True))
    assert calls == [[i, i] for i in range(num_rounds)]
    for transfer, is_cancelled in zip(transfers, wins["cancel"], strict=True):
        assert transfer.cancelled() is is_cancelled
        assert not transfer.is_draining
        assert isinstance(transfer.exception(), TransferCancelled) if is_cancelled else transfer.result() == 7


# -- in asyncio ------------------------------------------------------------------------------------------------------


def end_in_thread(end: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=end)
    thread.start()
    return thread


def test_await_gives_the_result_that_another_thread_sets() -> None:
    async def main() -> int:
        transfer: Transfer[int] = Transfer(deadline_s=PATIENCE_S)
        waiting = asyncio.ensure_future(_await(transfer))
        await asyncio.sleep(0)
        thread = end_in_thread(lambda: transfer.set_result(6))
        got = await waiting
        thread.join(PATIENCE_S)
        return got + await transfer

    assert asyncio.run(main()) == 12


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda transfer: transfer.set_exception(ValueError("torn")), ValueError),
        (lambda transfer: transfer.cancel(), TransferCancelled),
    ],
)
def test_await_raises_failure_and_cancellation(end: Callable[[Any], Any], error: type[Exception]) -> None:
    async def main() -> None:
        transfer: Transfer[int] = Transfer()
        waiting = [asyncio.ensure_future(_await(transfer)) for _ in range(2)]
        await asyncio.sleep(0)
        end_in_thread(lambda: end(transfer)).join(PATIENCE_S)
        for task in waiting:
            with pytest.raises(error):
                await task

    asyncio.run(main())


def test_await_ends_at_the_deadline_with_what_there_is() -> None:
    async def main() -> str:
        transfer: Transfer[str] = Transfer(deadline_s=0.01, on_deadline=lambda: transfer.set_result("half") and None)
        return await transfer

    assert asyncio.run(main()) == "half"


def test_await_looks_again_where_the_loops_clock_runs_ahead() -> None:
    clock = FakeClock()
    num_looks = 0

    def slow_clock() -> float:
        nonlocal num_looks
        num_looks += 1
        clock.now += 0.001
        return clock.now

    async def main() -> None:
        await Transfer(deadline_s=0.02, clock=slow_clock)

    with pytest.raises(TransferTimeout, match=TIME_OUT):
        asyncio.run(main())
    assert num_looks > 3


def test_task_that_is_cancelled_leaves_the_transfer_alone(caplog: pytest.LogCaptureFixture) -> None:
    transfer: Transfer[int] = Transfer(deadline_s=PATIENCE_S)

    async def main() -> None:
        task = asyncio.ensure_future(_await(transfer))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert transfer.state is TransferState.PENDING
    transfer.set_result(2)
    assert transfer.result() == 2
    assert not caplog.records, "that its loop is closed by now concerns nobody"


async def _await(transfer: Transfer[Any]) -> Any:
    return await transfer


def test_whoever_waits_without_a_limit_may_do_the_work_once() -> None:
    calls: list[str] = []

    def work() -> None:
        calls.append("worked")
        transfer.set_result("done")

    transfer: Transfer[str] = Transfer(on_wait=work)
    assert not transfer.wait(0)
    assert calls == [], "who waits for a while only must not be held up"
    assert transfer.result() == "done"
    assert transfer.result() == "done"
    assert calls == ["worked"]
