"""Ctrl-C reaches long work even where Python drops it."""

from __future__ import annotations

import signal

import pytest

from kvbm.cli.interrupts import Interrupts


class Interrupting:
    """Sends ctrl-C from a finaliser, where Python prints the exception and goes on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_finaliser_swallows_is_raised_at_the_next_check() -> None:
    with Interrupts() as interrupts:
        Interrupting()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_an_interrupt_is_raised_at_once_and_the_former_handler_comes_back() -> None:
    former = signal.getsignal(signal.SIGINT)
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former
