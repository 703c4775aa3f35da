"""A channel to an executor in another process, over any connection that sends and receives bytes in whole messages.

`PipeChannel` is bookkeeping's end, `serve` the executor's. `serve` ends the connection when none of its jobs moves a
byte any more, and a process that dies ends it too: so the end of the connection is the end of the open jobs. One that
talks nonsense is asked to end, and counts as working until it has.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvbm.errors import MessageError, PoolClosed
from kvbm.jobs.channel import Execute, LocalChannel, Receive, remaining_s
from kvbm.jobs.messages import Job, JobResult, decode_job, decode_result, encode

_log = logging.getLogger("kvbm.jobs")
_GOODBYE = b""


class Connection(Protocol):
    """What `multiprocessing.Pipe` gives, or anything like it."""

    def send_bytes(self, buf: bytes) -> None:
        """Send one message."""

    def recv_bytes(self) -> bytes:
        """Wait for one message; raises EOFError or OSError at the end."""

    def close(self) -> None:
        """Let go of it."""


class PipeChannel:
    """An executor behind a connection.

    Parameters
    ----------
    connection : Connection
        Owned by the channel from now on.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # one message at a time
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: nothing comes any more
        self._open: set[int] = set()  # ids of jobs that were sent and are not answered
        self._opening = threading.Lock()
        self._is_closed = False
        self._is_lost = False
        self._reader: threading.Thread | None = None
        self._writer: threading.Thread | None = None

    def open(self, receive: Receive, lost: Callable[[str], None]) -> None:
        """Start to talk and to listen, each on a thread of its own."""
        self._reader = threading.Thread(target=self._listen, args=(receive, lost), name="kvbm-pipe", daemon=True)
        self._writer = threading.Thread(target=self._talk, name="kvbm-pipe-send", daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, job: Job) -> None:
        """Queue a job, so that an executor that reads nothing holds nobody up; raises `PoolClosed` when it is gone."""
        if self._is_closed or self._is_lost:
            raise PoolClosed("the channel to the executor is closed")
        data = encode(job)
        with self._opening:  # before it can be answered
            self._open.add(job.job_id)
        self._outgoing.put(data)

    def close(self, timeout_s: float | None = None) -> bool:
        """Ask the executor to finish what it has and end; return whether it did in time."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._is_closed:
            self._is_closed = True
            self._outgoing.put(_GOODBYE)
            self._outgoing.put(None)
            if self._writer is None:  # never opened
                self._talk()
                self._connection.close()
        threads = [thread for thread in (self._writer, self._reader) if thread is not None]
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(remaining_s(give_up))
        return not any(thread.is_alive() for thread in others)

    def _talk(self) -> None:
        while (data := self._outgoing.get()) is not None:
            with contextlib.suppress(OSError, ValueError), self._lock:  # it is gone: whoever listens says so
                self._connection.send_bytes(data)

    def _wait_for_the_end(self) -> None:
        """Ask an executor that talks nonsense to end; until it has, its jobs may still move bytes."""
        self._is_lost = True
        self._outgoing.put(_GOODBYE)
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._connection.recv_bytes()

    def revoke(self, job_id: int) -> bool:
        """Nothing: whether the executor has begun a job is not known here; it looks at the job's time itself."""
        return False

    def knows(self, job_id: int) -> bool:
        """Whether a job was sent, no answer has come, and the executor is not lost."""
        with self._opening:
            return job_id in self._open

    def run_here(self, job_id: int) -> bool:
        """Nothing: the bytes lie elsewhere."""
        return False

    def _listen(self, receive: Receive, lost: Callable[[str], None]) -> None:
        reason = "its process ended"
        try:
            while True:
                result = decode_result(self._connection.recv_bytes())
                try:
                    receive(result)
                except Exception:
                    _log.exception("a result could not be taken job_id=%d", result.job_id)
                with self._opening:
                    self._open.discard(result.job_id)
        except (EOFError, OSError) as error:
            reason = f"{reason} {error}".rstrip()
        except MessageError as error:
            reason = f"it sent nonsense: {error}"
            _log.error("executor is not understood, waiting for its end reason=%s", reason)
            self._wait_for_the_end()
        finally:
            self._is_lost = True  # before `lost`: what is sent after it is refused
            self._outgoing.put(None)
            lost(reason)
            with self._opening:
                self._open.clear()
            with self._lock:  # or a send under way could write into whatever gets the same descriptor
                self._connection.close()


def serve(
    connection: Connection,
    execute: Execute,
    *,
    is_small: Callable[[Job], bool] | None = None,
    is_bounded: Callable[[Job], bool] | None = None,
) -> None:
    """Execute the jobs that come over a connection until it says goodbye or ends.

    Parameters
    ----------
    connection : Connection
    execute, is_small, is_bounded : callable
        As for `LocalChannel`, usually an executor's; several routes run at once. Small jobs run in the thread that
        reads, and without `is_bounded` a route to or from a disk has one thread only.

    Raises
    ------
    MessageError
        What came is not a job; those that came before were executed.
    """
    lock = threading.Lock()

    def answer(result: JobResult) -> None:
        with lock, contextlib.suppress(ConnectionError):  # bookkeeping is gone: reading will tell
            connection.send_bytes(encode(result))

    channel = LocalChannel(execute, is_small=is_small, is_bounded=is_bounded)
    channel.open(answer, lambda reason: None)
    try:
        while (data := connection.recv_bytes()) != _GOODBYE:
            channel.send(decode_job(data))
    except (EOFError, OSError):
        _log.info("bookkeeping is gone, the executor ends")
        channel.abandon()  # what was not begun could write into memory that has another owner by then
    finally:
        channel.close()
        connection.close()
