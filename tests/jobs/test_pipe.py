"""The channel to another process: real ones that work, die, talk nonsense or are left alone; fakes for the rest."""

from __future__ import annotations

import importlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.errors import MessageError, PoolClosed
from kvbm.jobs import CopyJob, Job, JobResult, Outcome, decode_job, encode
from kvbm.jobs.pipe import PipeChannel, serve
from kvbm.types import Tier

PATIENCE_S = 60.0
TO_DISK = (Tier.HOST, Tier.DISK)
MakeJob = Callable[..., CopyJob]

SERVERS = """
import threading

import numpy as np

from kvbm.jobs import JobResult
from kvbm.jobs.pipe import serve


def execute(job, deadline):
    if job.job_id >= 1000:
        threading.Event().wait()  # for ever
    if job.job_id >= 500:
        raise OSError(f"no space for {job.job_id}")
    outcomes = (job.source_ids % 4).astype(np.uint8)
    reason = "" if deadline is None else "timed"
    return JobResult(job_id=job.job_id, outcomes=outcomes, nbytes=64, seconds=0.5, reason=reason)


def work(connection):
    serve(connection, execute)


def talk_nonsense(connection):
    connection.recv_bytes()
    connection.send_bytes(b"\\x01 what a day")
    threading.Event().wait()


def talk_of_another_version(connection):
    connection.send_bytes(b"\\x07")


def fall(connection):
    connection.recv_bytes()
    raise SystemExit(0)
"""


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a module that a spawned process can import too."""
    (tmp_path / "kvbm_test_servers.py").write_text(SERVERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("kvbm_test_servers")
    importlib.sys.modules.pop("kvbm_test_servers")  # type: ignore[attr-defined]


@pytest.fixture
def spawn(servers: Any) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """Start a server in a process of its own: gives the process and our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []

    def start(name: str) -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=getattr(servers, name), args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    yield start
    for process in processes:
        process.kill()
        process.join(PATIENCE_S)


def opened(connection: Any, box: Any) -> PipeChannel:
    channel = PipeChannel(connection)
    channel.open(box.receive, box.lose)
    return channel


def pipe_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvbm-")]


def test_jobs_are_answered_from_another_process_until_it_is_told_to_end(
    spawn: Any, box: Any, copy_job: MakeJob
) -> None:
    process, connection = spawn("work")
    channel = opened(connection, box)
    for job_id in range(20):
        channel.send(copy_job(job_id, TO_DISK, num_blocks=job_id))
    channel.send(copy_job(20, timeout_s=5.0, is_urgent=True))
    channel.send(copy_job(500))
    assert channel.close(PATIENCE_S), "what was sent is done first"
    assert box.lost == ["its process ended"], "in order too, so that nobody waits for ever"
    by_id = {result.job_id: result for result in box.results}
    assert sorted(by_id) == [*range(21), 500]
    for job_id in range(20):
        assert by_id[job_id].outcomes.tolist() == [i % 4 for i in range(job_id)]
        assert (by_id[job_id].nbytes, by_id[job_id].seconds, by_id[job_id].reason) == (64, 0.5, "")
    assert by_id[20].reason == "timed"
    assert by_id[500].outcomes.tolist() == [Outcome.FAILED] * 2
    assert by_id[500].reason == "OSError('no space for 500')"
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    with pytest.raises(PoolClosed, match="the channel to the executor is closed"):
        channel.send(copy_job(30))
    assert channel.close(PATIENCE_S)
    assert pipe_threads() == []


def test_killed_process_is_lost_once_and_takes_no_more_jobs(spawn: Any, box: Any, copy_job: MakeJob) -> None:
    process, connection = spawn("work")
    channel = opened(connection, box)
    channel.send(copy_job(1000))
    channel.send(copy_job(1, TO_DISK))
    box.wait_for(lambda box: box.ids == [1])
    process.kill()
    box.wait_for(lambda box: box.lost)
    with pytest.raises(PoolClosed):
        channel.send(copy_job(2))
    assert channel.close(PATIENCE_S)
    assert channel.close(PATIENCE_S)
    assert box.ids == [1], "the other job is lost with it"
    assert len(box.lost) == 1
    assert box.lost[0].startswith("its process ended")
    assert pipe_threads() == []


def test_every_job_is_answered_refused_or_lost_when_the_process_dies_under_fire(
    spawn: Any, box: Any, copy_job: MakeJob
) -> None:
    process, connection = spawn("work")
    channel = opened(connection, box)
    is_under_fire = threading.Event()
    was_refused: list[int] = []

    def fire() -> None:
        for job_id in range(500):
            try:
                channel.send(copy_job(job_id, TO_DISK))
            except PoolClosed:
                was_refused.append(job_id)
            if job_id == 50:
                is_under_fire.set()

    sender = threading.Thread(target=fire)
    sender.start()
    assert is_under_fire.wait(PATIENCE_S)
    process.kill()
    sender.join(PATIENCE_S)
    box.wait_for(lambda box: box.lost)
    assert len(box.lost) == 1
    assert len(set(box.ids)) == len(box.ids)
    assert not set(box.ids) & set(was_refused)
    assert channel.close(PATIENCE_S)


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ("talk_nonsense", "it sent nonsense: not a message"),
        ("talk_of_another_version", "it sent nonsense: expected a message of version 1, got version 7"),
        ("fall", "its process ended"),
    ],
)
def test_process_that_does_not_keep_to_the_language_is_lost_with_the_reason(
    spawn: Any, box: Any, copy_job: MakeJob, server: str, reason: str
) -> None:
    process, connection = spawn(server)
    channel = opened(connection, box)
    if server != "talk_of_another_version":
        channel.send(copy_job(0))
    if server == "talk_nonsense":
        while not channel._is_lost:
            process.join(0.001)
        assert box.lost == [], "a process that lives may still move the bytes of its jobs"
        with pytest.raises(PoolClosed):
            channel.send(copy_job(1))
        process.kill()
    box.wait_for(lambda box: box.lost)
    assert box.lost[0].startswith(reason)
    assert box.ids == []
    with pytest.raises(PoolClosed):
        channel.send(copy_job(1))
    assert channel.close(PATIENCE_S)
    assert connection.closed
    assert pipe_threads() == []


def test_server_whose_bookkeeping_dies_ends(spawn: Any, copy_job: MakeJob) -> None:
    process, connection = spawn("work")
    connection.send_bytes(encode(copy_job(0)))
    assert connection.poll(PATIENCE_S)
    connection.close()
    process.join(PATIENCE_S)
    assert process.exitcode == 0


def test_close_gives_up_in_time_on_a_process_that_is_stuck(spawn: Any, box: Any, copy_job: MakeJob) -> None:
    process, connection = spawn("work")
    channel = opened(connection, box)
    channel.send(copy_job(1000))
    assert not channel.close(0.05)
    assert not channel.close(0)
    assert box.lost == []
    process.kill()
    assert channel.close(float("inf"))
    assert len(box.lost) == 1


# -- with fakes in place of a process --------------------------------------------------------------------------------


class FakeConnection:
    """A connection in this process whose sends can be held at a gate."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.was_closed_while_sending = False
        self.may_send = threading.Event()
        self.may_send.set()
        self.is_sending = threading.Event()
        self.closed = threading.Event()
        self.incoming: list[bytes | Exception] = []
        self.has_incoming = threading.Semaphore(0)

    def send_bytes(self, buf: bytes) -> None:
        self.is_sending.set()
        assert self.may_send.wait(PATIENCE_S)
        self.is_sending.clear()
        self.sent.append(buf)

    def feed(self, data: bytes | Exception) -> None:
        self.incoming.append(data)
        self.has_incoming.release()

    def recv_bytes(self) -> bytes:
        assert self.has_incoming.acquire(timeout=PATIENCE_S)
        data = self.incoming.pop(0)
        if isinstance(data, Exception):
            raise data
        return data

    def close(self) -> None:
        self.was_closed_while_sending = self.is_sending.is_set()
        self.closed.set()


def done(job_id: int) -> bytes:
    return encode(JobResult(job_id=job_id, outcomes=np.zeros(2, dtype=np.uint8)))


def test_close_gives_up_in_time_on_a_process_that_reads_nothing(box: Any, copy_job: MakeJob) -> None:
    connection = FakeConnection()
    channel = opened(connection, box)
    connection.may_send.clear()
    sender = threading.Thread(target=channel.send, args=(copy_job(0),))
    sender.start()
    assert connection.is_sending.wait(PATIENCE_S)
    assert not channel.close(0.01)
    connection.may_send.set()
    sender.join(PATIENCE_S)
    connection.feed(EOFError())
    assert channel.close(PATIENCE_S)
    assert box.lost == ["its process ended"]


def test_connection_is_not_closed_under_a_send(box: Any, copy_job: MakeJob) -> None:
    connection = FakeConnection()
    channel = opened(connection, box)
    connection.may_send.clear()
    sender = threading.Thread(target=channel.send, args=(copy_job(0),))
    sender.start()
    assert connection.is_sending.wait(PATIENCE_S)
    connection.feed(ConnectionResetError("reset"))
    box.wait_for(lambda box: box.lost == ["its process ended reset"])
    assert not connection.closed.is_set(), "its descriptor may be given to a file before the send gets there"
    connection.may_send.set()
    assert connection.closed.wait(PATIENCE_S)
    assert not connection.was_closed_while_sending
    sender.join(PATIENCE_S)
    assert channel.close(PATIENCE_S)


def test_receiver_that_raises_is_logged_and_the_executor_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[int] = []
    has_ended = threading.Event()

    def receive(result: JobResult) -> None:
        taken.append(result.job_id)
        if result.job_id == 0:
            raise KeyError("books")

    connection = FakeConnection()
    channel = PipeChannel(connection)
    channel.open(receive, lambda reason: has_ended.set())
    connection.feed(done(0))
    connection.feed(done(1))
    connection.feed(EOFError())
    assert has_ended.wait(PATIENCE_S)
    assert channel.close(PATIENCE_S)
    assert taken == [0, 1]
    assert "a result could not be taken job_id=0" in caplog.text


def test_callback_may_close_the_channel(box: Any) -> None:
    connection = FakeConnection()
    channel = PipeChannel(connection)
    closed: list[bool] = []
    channel.open(lambda result: closed.append(channel.close()), box.lose)
    connection.feed(done(0))
    connection.feed(EOFError())
    box.wait_for(lambda box: box.lost)
    assert closed == [True]
    assert channel.close(PATIENCE_S)
    assert connection.sent == [b""]


def test_channel_that_was_never_opened_lets_go_of_its_connection() -> None:
    connection = FakeConnection()
    channel = PipeChannel(connection)
    assert channel.close(PATIENCE_S)
    assert connection.closed.wait(PATIENCE_S)
    assert connection.sent == [b""]


def test_server_refuses_what_is_no_job_after_it_has_done_what_came_before(copy_job: MakeJob) -> None:
    executed: list[Job] = []

    def execute(job: Job, deadline: float | None) -> JobResult:
        executed.append(job)
        return JobResult(job_id=job.job_id, outcomes=np.zeros(2, dtype=np.uint8))

    connection = FakeConnection()
    connection.feed(encode(copy_job(4)))
    connection.feed(done(5))
    with pytest.raises(MessageError):
        serve(connection, execute)
    assert [job.job_id for job in executed] == [4]
    assert connection.sent == [done(4)]
    assert connection.closed.is_set()
    assert decode_job(encode(executed[0])).job_id == 4


@pytest.mark.parametrize("error", [BrokenPipeError(32, "broken pipe"), ConnectionResetError(104, "reset")])
def test_server_whose_bookkeeping_is_gone_ends_quietly_with_jobs_begun_and_waiting(
    copy_job: MakeJob, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    """Nobody can be told of those that wait, nor of the one that ends later; none of them is begun."""
    has_begun, may_end = threading.Event(), threading.Event()
    executed: list[int] = []

    def execute(job: Job, deadline: float | None) -> JobResult:
        executed.append(job.job_id)
        has_begun.set()
        assert may_end.wait(PATIENCE_S)
        return JobResult(job_id=job.job_id, outcomes=np.zeros(2, dtype=np.uint8))

    class Gone(FakeConnection):
        def recv_bytes(self) -> bytes:
            if not self.incoming:
                assert has_begun.wait(PATIENCE_S)
                raise EOFError
            return super().recv_bytes()

        def send_bytes(self, buf: bytes) -> None:
            may_end.set()  # the first who is answered is one that was not begun
            raise error

    connection = Gone()
    for job_id in range(5):
        connection.feed(encode(copy_job(job_id, TO_DISK)))
    serve(connection, execute)
    assert executed == [0]
    assert connection.closed.is_set()
    assert "could not be taken" not in caplog.text
    assert pipe_threads() == []
