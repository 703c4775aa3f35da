"""Transfer: whoever asks hears once that it has ended and that none of its bytes moves any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvbm.jobs import Transfer
from kvbm.landing import wait_until_landed

PATIENCE_S = 60.0

ENDS: dict[str, Callable[[Transfer[int]], Any]] = {
    "result": lambda transfer: transfer.set_result(1, has_landed=False),
    "error": lambda transfer: transfer.set_exception(ValueError("torn"), has_landed=False),
    "cancelled": lambda transfer: transfer.cancel(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("lands_first", [False, True])
def test_landed_callback_waits_for_the_end_and_for_the_bytes(end: str, lands_first: bool) -> None:
    transfer: Transfer[int] = Transfer()
    calls: list[Transfer[int]] = []
    transfer.add_landed_callback(calls.append)
    steps = [Transfer.set_landed, ENDS[end]] if lands_first else [ENDS[end], Transfer.set_landed]
    steps[0](transfer)
    assert not calls
    steps[1](transfer)
    assert calls == [transfer]
    transfer.set_landed()
    transfer.set_result(2)
    assert calls == [transfer], "once"
    transfer.add_landed_callback(calls.append)
    assert calls == [transfer] * 2, "at once when all is over"


@pytest.mark.parametrize("end", ["set_result", "set_exception"])
def test_end_that_also_says_landed_calls_back_in_order_and_in_its_thread(end: str) -> None:
    transfer: Transfer[Any] = Transfer()
    calls: list[tuple[str, int]] = []
    transfer.add_landed_callback(lambda _: calls.append(("landed", threading.get_ident())))
    transfer.add_done_callback(lambda _: calls.append(("done", threading.get_ident())))
    mover = threading.Thread(target=lambda: getattr(transfer, end)(ValueError("7")))
    mover.start()
    mover.join(PATIENCE_S)
    assert calls == [("done", mover.ident), ("landed", mover.ident)]


def test_late_answer_of_a_cancelled_transfer_says_that_its_bytes_have_landed() -> None:
    transfer: Transfer[int] = Transfer()
    calls: list[Transfer[int]] = []
    transfer.add_landed_callback(calls.append)
    transfer.cancel()
    assert not calls
    assert not transfer.set_result(3)
    assert calls == [transfer]


def test_landed_callback_that_fails_is_logged_and_the_next_one_is_called(caplog: pytest.LogCaptureFixture) -> None:
    transfer: Transfer[int] = Transfer()
    calls: list[Transfer[int]] = []

    def bad(_: Transfer[int]) -> None:
        raise ValueError("callback")

    transfer.add_landed_callback(bad)
    transfer.add_landed_callback(calls.append)
    assert transfer.set_result(1)
    assert calls == [transfer]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_deadline_ends_it_for_its_waiter_and_the_bytes_are_still_waited_for() -> None:
    transfer: Transfer[int] = Transfer(deadline_s=0.0)
    calls: list[Transfer[int]] = []
    transfer.add_landed_callback(calls.append)
    assert transfer.done()
    assert not calls
    transfer.set_landed()
    assert calls == [transfer]


def test_of_end_landing_and_asking_at_once_everybody_hears_exactly_once() -> None:
    num_rounds = 5_000
    start = threading.Barrier(3)
    transfers: list[Transfer[int]] = [Transfer() for _ in range(num_rounds)]
    calls: list[list[Transfer[int]]] = [[] for _ in range(num_rounds)]

    def play(act: Callable[[int], Any]) -> None:
        for i in range(num_rounds):
            start.wait()
            act(i)

    acts: list[Callable[[int], Any]] = [
        lambda i: transfers[i].set_landed(),
        lambda i: transfers[i].cancel() if i % 2 else transfers[i].set_result(i, has_landed=False),
    ]
    threads = [threading.Thread(target=play, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    play(lambda i: transfers[i].add_landed_callback(calls[i].append))
    for thread in threads:
        thread.join(PATIENCE_S)
    assert calls == [[transfer] for transfer in transfers]


@pytest.mark.parametrize("end", ENDS)
def test_waiting_until_landed_ends_with_the_bytes(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer: Transfer[int] = Transfer()
    ENDS[end](transfer)
    asked = threading.Event()
    ask = Transfer.add_landed_callback

    def note(self: Transfer[int], callback: Callable[[Transfer[int]], None]) -> None:
        ask(self, callback)
        asked.set()

    monkeypatch.setattr(Transfer, "add_landed_callback", note)
    waiting = threading.Thread(target=wait_until_landed, args=(transfer,))
    waiting.start()
    assert asked.wait(PATIENCE_S)
    assert waiting.is_alive()
    transfer.set_landed()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


def test_waiting_until_landed_waits_for_the_end_too() -> None:
    """An interrupt may come to whoever waited for the result: the rows are in use until the end."""
    has_begun = threading.Event()
    transfer: Transfer[int] = Transfer(on_wait=has_begun.set)
    waiting = threading.Thread(target=wait_until_landed, args=(transfer,))
    waiting.start()
    assert has_begun.wait(PATIENCE_S)
    assert waiting.is_alive()
    transfer.set_result(1)
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
