"""The socket of ``kvbm explain``: what it answers, what it makes of nonsense, and that nobody is kept waiting."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from explain_site import LIST, Serve, connect, make_history_of, read_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm.engines import explain_socket
from kvbm.engines.explain_client import ask
from kvbm.engines.explain_socket import MOST_QUESTION_NBYTES, VERSION, Question, Reply, answer, frame, make_folder
from kvbm.errors import MessageError, StorageError

# -- questions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "told"), [(0, ""), (1, "c"), (2, "cb"), (3, "cba"), (4, "cba")])
def test_recent_requests_are_listed_youngest_first(serve: Serve, limit: int, told: str) -> None:
    reply = ask(serve("a", "b", "c").path, Question(VERSION, "list", limit=limit))
    assert [one.request_id for one in reply.summaries] == list(told)
    assert (reply.pid, reply.num_known) == (os.getpid(), 3)


def test_ids_of_any_length_make_short_answers(serve: Serve) -> None:
    one = serve("long" + "x" * 100_000)
    assert len(ask(one.path, LIST).summaries[0].request_id) < 300
    assert ask(one.path, Question(VERSION, "explain", "long")).explanation is not None


@pytest.mark.parametrize(("asked", "meant"), [("cmpl-1", "cmpl-1"), ("cmpl-2", "cmpl-22"), ("chat", "chat-1")], ids=str)
def test_request_is_found_by_its_id_or_its_beginning(serve: Serve, asked: str, meant: str) -> None:
    reply = ask(serve("cmpl-1", "cmpl-11", "cmpl-22", "chat-1").path, Question(VERSION, "explain", asked))
    assert reply.explanation is not None
    assert reply.explanation.summary.request_id == meant
    assert reply.explanation.pid == os.getpid()


def test_beginning_of_several_is_answered_with_all_of_them(serve: Serve) -> None:
    reply = ask(serve("cmpl-1", "cmpl-2", "chat-1").path, Question(VERSION, "explain", "cmpl"))
    assert reply.explanation is None
    assert [one.request_id for one in reply.summaries] == ["cmpl-2", "cmpl-1"]
    assert ask(serve("a").path, Question(VERSION, "explain", "b")).summaries == []


def test_candidates_are_few(serve: Serve) -> None:
    many = serve(*(f"r{number}" for number in range(100)))
    assert len(ask(many.path, Question(VERSION, "explain", "r")).summaries) == 20


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no question"),
        (b"{", "no question"),
        (b"[1, 2]", "no question"),
        (b'{"version": 1, "verb": "delete"}', "no question"),
        (b'{"version": 1, "verb": "list", "limit": -1}', "no question"),
        (b'{"version": 1, "verb": "list", "x": ' + b"[" * 4000, "no question"),
        (b'{"version": 9, "verb": "list"}', "speaks version 1, was asked in 9"),
        (b"\xff" * 8, "no question"),
    ],
    ids=["empty", "cut", "list", "verb", "limit", "deep", "version", "bytes"],
)
def test_what_cannot_be_read_is_answered_with_an_error(data: bytes, text: str) -> None:
    assert text in answer(data, make_history_of("a")).error


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))))
def test_no_bytes_make_the_decoder_fail(data: bytes) -> None:
    reply = answer(data, make_history_of("a"))
    assert msgspec.json.decode(msgspec.json.encode(reply), type=Reply).error


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_no_bytes_end_the_socket(serve: Serve, data: bytes) -> None:
    one = serve("a")
    with connect(one.path) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    assert ask(one.path, LIST).num_known == 1
    one.close()


def test_question_that_is_too_long_is_not_read(serve: Serve) -> None:
    with connect(serve().path) as client:
        client.sendall(struct.pack(">I", MOST_QUESTION_NBYTES + 1))
        reply = msgspec.json.decode(read_all(client)[4:], type=Reply)
    assert reply.error == "a question has 4097 bytes, at most 4096 are read"


def test_question_that_comes_byte_by_byte_is_answered(serve: Serve) -> None:
    with connect(serve("a").path) as client:
        for byte in frame(msgspec.json.encode(LIST)):
            client.sendall(bytes([byte]))
        assert msgspec.json.decode(read_all(client)[4:], type=Reply).num_known == 1


# -- who waits -------------------------------------------------------------------------------------------------


def test_client_that_asks_nothing_is_left_when_its_time_is_over(serve: Serve) -> None:
    one = serve("a", deadline_s=0.05)
    with connect(one.path) as silent:
        silent.sendall(b"\0")
        assert ask(one.path, LIST, timeout_s=60.0).num_known == 1
        assert read_all(silent) == b""


def test_client_that_does_not_read_is_left_when_its_time_is_over(serve: Serve) -> None:
    one = serve(*(f"{number}" + "x" * 3000 for number in range(1024)), deadline_s=0.5)  # more than a socket keeps
    with connect(one.path) as deaf:
        deaf.sendall(frame(msgspec.json.encode(Question(VERSION, "list", limit=1024))))
        assert ask(one.path, LIST, timeout_s=60.0).num_known == 1024
        with pytest.raises(msgspec.DecodeError):
            msgspec.json.decode(read_all(deaf)[4:])


def test_close_does_not_wait_for_a_client(serve: Serve) -> None:
    one = serve("a", deadline_s=1e6)
    with connect(one.path) as client:
        client.sendall(b"\0\0")
        one.close()
        one.close()
        assert read_all(client) == b""
    assert not one.path.exists()
    assert "kvbm-explain" not in [thread.name for thread in threading.enumerate()]


def test_asking_one_that_does_not_answer_ends_in_time(folder: Path) -> None:
    make_folder(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(str(folder / "kvbm-1.sock"))
        mute.listen()
        with pytest.raises(StorageError, match=r"does not answer within 0\.05 s"):
            ask(folder / "kvbm-1.sock", LIST, timeout_s=0.05)
    with pytest.raises(StorageError, match="does not answer"):
        ask(folder / "kvbm-1.sock", LIST)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (frame(b'{"version": 1}'), MessageError, "cannot read"),
        (frame(msgspec.json.encode(Reply(1, 7, error="no"))), MessageError, "process 7 does not answer: no"),
        (struct.pack(">I", 1 << 31), MessageError, "at most"),
        (b"\0\0", StorageError, "it has gone"),
    ],
    ids=["fields", "error", "length", "cut"],
)
def test_answer_that_cannot_be_read_says_so(folder: Path, data: bytes, error: type[Exception], text: str) -> None:
    make_folder(folder)
    path = folder / "kvbm-1.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as strange:
        strange.bind(str(path))
        strange.listen()

        def reply() -> None:
            client, _ = strange.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(data)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(error, match=text):
            ask(path, LIST)
        thread.join()


def test_failure_of_ours_does_not_end_the_thread(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = serve("a")
    with monkeypatch.context() as patch:
        patch.setattr(explain_socket, "summarise", lambda *_: 1 / 0)
        with pytest.raises(StorageError, match="it has gone"):
            ask(one.path, LIST)
    assert "could not be answered" in caplog.text
    assert ask(one.path, LIST).num_known == 1


def test_asking_while_requests_come_never_fails(serve: Serve) -> None:
    history = make_history_of()
    one = serve()
    one._history = history
    stop = threading.Event()
    failures: list[BaseException] = []

    def go_on() -> None:
        number, names = 0, np.ones((64, 2), dtype=np.uint64)
        try:
            while not stop.is_set():
                number += 1
                history.asked(f"r{number}", names, num_computed=0, most=64, num_there=64, num_blocks=64)
                history.allocated(f"r{number}", first=0, last=64)
                history.staged(f"r{number}", {"host": 64})
                history.finished(f"r{number - 5}")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(10):
            reply = ask(one.path, Question(VERSION, "list", limit=1024))
            assert not reply.summaries or ask(one.path, Question(VERSION, "explain", reply.summaries[0].request_id))
    finally:
        stop.set()
        thread.join()
    assert failures == []
