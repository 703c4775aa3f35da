"""Retries with jitter and the breaker, with a store and sleeps that do as they are told."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from object_site import PATIENCE_S, Blocks, FakeClient, MakeStorage, Sleeper

from kvbm.errors import StorageError
from kvbm.storage.object_store import CircuitBreaker, RetryLimits
from kvbm.storage.object_store.breaker import BreakerState


class PermissionDeniedError(Exception):
    """As obstore calls it."""


def limits(sleeper: Sleeper, **settings: Any) -> RetryLimits:
    return RetryLimits(sleep=sleeper, **settings)


def test_a_failed_request_is_made_again_after_a_drawn_wait(make_storage: MakeStorage) -> None:
    client, sleeper, blocks = FakeClient(), Sleeper(), Blocks(1)
    draws = iter([0.5, 0.25, 1.0, 0.0])
    retries = limits(sleeper, max_attempts=5, backoff_s=1.0, max_backoff_s=3.0, draw=lambda: next(draws))
    storage = make_storage(client=client, retries=retries)
    client.plan = [OSError("one"), OSError("two"), OSError("three"), OSError("four"), None]
    assert blocks.write(storage) == [True]
    assert sleeper.seconds == [0.5 * 1, 0.25 * 2, 1.0 * 3, 0.0]  # 1, 2, then 3 at most
    counters = storage.counters
    assert (counters.num_retries, counters.num_failures, counters.num_requests) == (4, 4, 5)
    assert counters.last_error == "four"
    assert blocks.read(storage) == [True]


def test_attempts_are_bounded(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client, retries=limits(Sleeper(), max_attempts=3))
    client.plan = [OSError("x")] * 9
    assert blocks.write(storage) == [False]
    assert client.seen == ["put"] * 3
    assert not storage.has_checksum.any()


def test_what_is_refused_for_good_is_not_asked_again(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client, retries=limits(Sleeper()))
    client.plan = [PermissionDeniedError("no")]
    assert blocks.read(storage) == [False]
    assert client.seen == ["get"]
    assert storage.counters.num_failures == 1


def test_a_request_without_an_answer_is_given_up_after_its_time(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(2)
    storage = make_storage(client=client, timeout_s=0.01, retries=limits(Sleeper(), max_attempts=2))
    client.is_gated = True
    assert blocks.read(storage) == [False] * 2
    assert storage.counters.num_timeouts == storage.counters.num_failures == 4
    assert storage.counters.last_error == "no answer within 0.01 s"
    assert client.num_at_once == 0
    client.release()


def test_a_miss_is_an_answer(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(4)
    storage = make_storage(client=client, max_failures=2)
    for _ in range(3):
        assert not any(blocks.read(storage))
    assert not storage.holds(blocks.ids, blocks.hashes).any()
    assert storage.is_available
    assert (storage.counters.num_misses, storage.counters.num_failures) == (12, 0)


def test_a_bucket_that_is_not_there_is_a_failure(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(1)
    storage = make_storage(client=client)
    client.plan = [FileNotFoundError("no such bucket")]
    assert blocks.write(storage) == [False]
    assert storage.counters.num_failures == 1
    assert storage.counters.last_error == "no such bucket"


def test_failures_in_a_row_open_the_breaker_and_a_probe_closes_it(
    make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    client, sleeper, blocks = FakeClient(), Sleeper(is_gated=True), Blocks(1)
    retries = limits(sleeper, max_attempts=1)
    storage = make_storage(client=client, retries=retries, max_failures=3, cool_down_s=7.0)
    heard: list[bool] = []
    is_back = threading.Event()

    def listen(is_available: bool) -> None:
        heard.append(is_available)
        if is_available:
            is_back.set()

    storage.on_availability(listen)
    assert blocks.write(storage) == [True]
    client.plan = [OSError("gone"), OSError("gone"), None, OSError("gone"), OSError("gone"), OSError("gone")]
    assert [blocks.read(storage)[0] for _ in range(6)] == [False, False, True, False, False, False]
    assert not storage.is_available
    assert heard == [False]

    client.seen.clear()  # nothing is asked now, and every call fails at once
    assert blocks.read(storage) == [False]
    assert blocks.write(storage) == [False]
    assert storage.holds(blocks.ids, blocks.hashes).tolist() == [False]
    assert [len(part) for part in storage.inventory()] == [0] * 4
    for forget in (lambda: storage.forget(blocks.hashes), storage.clear):
        with pytest.raises(StorageError, match="not available: gone"):
            forget()
    assert client.seen == []

    client.plan = [OSError("still gone")]
    sleeper.wait_for_sleeper()
    sleeper.wake()  # the first probe fails
    sleeper.wait_for_sleeper()
    assert sleeper.seconds == [7.0, 14.0]
    assert not storage.is_available
    assert client.seen == ["head"]

    sleeper.wake()  # the second is answered: there is no such object
    assert is_back.wait(PATIENCE_S)
    assert storage.is_available
    assert heard == [False, True]
    assert storage.counters.num_breaker_opens == 1
    assert blocks.read(storage) == [True]
    assert caplog.text.count("object store given up") == caplog.text.count("object store is back") == 1


def test_waits_between_attempts_end_when_the_breaker_opens(make_storage: MakeStorage) -> None:
    client, blocks = FakeClient(), Blocks(4)
    storage = make_storage(client=client, retries=limits(Sleeper(), max_attempts=100), max_failures=5, cool_down_s=60.0)
    client.plan = [OSError("gone")] * 400
    sleeper = Sleeper(is_gated=True)
    object.__setattr__(storage._books._requests._limits, "sleep", sleeper)
    transfer = blocks.submit_read(storage)
    for _ in range(4):
        sleeper.wait_for_sleeper()
    sleeper.wake()
    assert transfer.result(PATIENCE_S).tolist() == [False] * 4
    assert len(client.seen) <= 8
    assert storage.counters.num_late == 0  # nobody slept until the deadline


def test_who_listens_late_hears_at_once_that_the_store_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    breaker = CircuitBreaker(max_failures=1, cool_down_s=1.0, max_cool_down_s=3.0)
    assert breaker.fail()
    heard: list[bool] = []
    breaker.listen(heard.append)

    def fail(_: bool) -> None:
        raise ValueError("listener")

    breaker.listen(fail)  # logged, and no harm to others
    assert heard == [False]
    assert not breaker.fail()  # a late failure opens nothing
    breaker.succeed()  # and a late answer closes nothing
    assert breaker.state is BreakerState.OPEN
    for cool_down_s in (2.0, 3.0, 3.0):
        breaker.begin_probe()
        assert breaker.state is BreakerState.HALF_OPEN
        breaker.end_probe(False)
        assert breaker.cool_down_s == cool_down_s
    breaker.begin_probe()
    breaker.end_probe(True)
    assert breaker.is_available
    assert heard == [False, True]
    assert "listener" in caplog.text
    assert breaker.fail()
    assert breaker.cool_down_s == 1.0
    assert breaker.num_opens == 2
