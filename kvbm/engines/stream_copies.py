"""Copies between an engine's memory on a GPU and host memory, each in order with the engine's own stream.

A copy waits, on the device, for what the engine had queued when the copy was ordered: the pass that fills its blocks,
or the last one that reads them. The engine's stream in turn waits for copies, on the device too: for saves before
their blocks are overwritten (`hold_back`), for layers before they are read (`LayerLoad`). Jobs run on the threads of a
channel; what is told of them from the engine's thread is guarded by one lock, never held while bytes move.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvbm.engines.clearing import clear_lost
from kvbm.errors import TransferError
from kvbm.gpu import as_stream
from kvbm.jobs import CopyJob, JobResult, Outcome, Transfer
from kvbm.jobs.messages import answer_all
from kvbm.landing import wait_until_landed
from kvbm.storage import CudaStorage
from kvbm.storage.base import Storage
from kvbm.transfer import GpuTransferEngine, submit_layers
from kvbm.transfer.engine import CopyResult
from kvbm.transfer.layers import LayerTransfer
from kvbm.types import Tier

if TYPE_CHECKING:
    from kvbm._backend import Event

_log = logging.getLogger("kvbm.engines")
_IN_FLIGHT = 1024  # submissions of a lane: those of a load by layers must never make the engine's thread wait


class StreamCopies:
    """Runs copies between an engine's GPU memory and another storage with addresses.

    Parameters
    ----------
    storages : dict of Tier to Storage
        The engine's memory (a `CudaStorage` without attached streams) and the one below it; they stay the caller's.
    tier : Tier
        Of the engine's memory in jobs.
    verifies : bool
        Compute checksums on the way down, compare them on the way up.
    num_thread_blocks : int
        Of a copy kernel at most; 0 takes a few.
    clock : callable
        Gives seconds; monotonic.
    engine : GpuTransferEngine, optional
        Closed with this. None makes one.
    """

    def __init__(
        self,
        storages: dict[Tier, Storage],
        *,
        tier: Tier = Tier.DEVICE,
        verifies: bool = True,
        num_thread_blocks: int = 0,
        clock: Callable[[], float] = time.monotonic,
        engine: GpuTransferEngine | None = None,
    ) -> None:
        memory = storages[tier]
        assert isinstance(memory, CudaStorage), "made for memory of a GPU only"
        self._storages = dict(storages)
        self._tier = tier
        self._verifies = verifies
        self._clock = clock
        self._gpu = memory.gpu
        self._engine = engine or GpuTransferEngine(
            memory.gpu, max_in_flight=_IN_FLIGHT, num_thread_blocks=num_thread_blocks
        )
        self._lock = threading.Lock()
        self._announced: dict[int, _Copy] = {}  # until they are answered

    def mark(self, stream: Any = None) -> Event:
        """Note how far an engine's stream has come.

        Parameters
        ----------
        stream : object, optional
            As for `kvbm.gpu.stream_handle`; None is the legacy default stream.

        Returns
        -------
        Event
            Done when the device has done all that is queued on it by now.
        """
        event = self._gpu.device.create_event()
        as_stream(self._gpu, stream).record(event)
        return event

    def announce(self, job: CopyJob, after: Event) -> None:
        """Say, before a job is sent, what its copy waits for."""
        with self._lock:
            self._announced[job.job_id] = _Copy(job, after)

    def execute(self, job: CopyJob, deadline: float | None = None) -> JobResult:
        """Run a job; parameters and notes as for `Executor.execute`."""
        began = self._clock()
        with self._lock:
            copy = self._announced.get(job.job_id)
        if copy is None:
            copy = _Copy(job, None)
        is_over = deadline is not None and began >= deadline
        if is_over and copy.drop():
            return answer_all(job, Outcome.LATE, "its time was over before it began")
        try:
            transfer = copy.begin(self._begin)
        except Exception as error:
            return _failed(job, error)
        return self._end(job, transfer, began)

    def forget(self, job_id: int) -> None:
        """Drop what was announced of a job that has been answered, however."""
        with self._lock:
            self._announced.pop(job_id, None)

    def hold_back(self, stream: Any = None) -> None:
        """Let what is queued on a stream from now on wait for every save that was announced.

        Parameters
        ----------
        stream : object, optional
            As for `mark`.

        Notes
        -----
        Queues here the saves that no thread has queued yet, and waits for none of them.
        """
        with self._lock:
            copies = list(self._announced.values())
        for copy in copies:
            if copy.job.source is self._tier:
                with contextlib.suppress(Exception):  # it is the job's answer
                    copy.begin(self._begin)
        last = self._engine.submit("down", lambda own: None, lambda error: None)  # behind them on their stream
        if last.event is None:
            last.wait()
        else:
            as_stream(self._gpu, stream).wait(last.event)

    def begin_layers(self, jobs: Sequence[CopyJob], after: Event) -> LayerLoad:
        """Begin to copy the blocks of several jobs together, the first layer first; the caller's thread queues it."""
        memory = self._storages[self._tier]
        return LayerLoad(jobs, lambda: self._begin_layers(jobs, after), memory=memory, clock=self._clock)

    def close(self) -> None:
        """Wait for what is under way; let go of streams and scratch memory."""
        self._engine.close()

    # -- private -----------------------------------------------------------------------------------------------

    def _begin(self, job: CopyJob, after: Event | None) -> Transfer[CopyResult]:
        return self._engine.copy(
            self._storages[job.source],
            self._storages[job.destination],
            job.source_ids,
            job.destination_ids,
            hashes=job.hashes if self._verifies else None,
            is_urgent=job.is_urgent,
            wait_for=[after],  # None, of a job that nobody announced: the legacy default stream
        )

    def _begin_layers(self, jobs: Sequence[CopyJob], after: Event) -> LayerTransfer:
        return submit_layers(
            self._engine,
            self._storages[jobs[0].source],
            self._storages[self._tier],
            np.concatenate([job.source_ids for job in jobs]),
            np.concatenate([job.destination_ids for job in jobs]),
            hashes=np.concatenate([job.hashes for job in jobs]) if self._verifies else None,
            wait_for=[after],
        )

    def _end(self, job: CopyJob, transfer: Transfer[CopyResult], began: float) -> JobResult:
        try:
            result = transfer.result()
        except Exception as error:
            return _failed(job, error)
        finally:  # whoever hears of an interrupt gives the blocks to others
            wait_until_landed(transfer)
        return _answer(job, result.good, result.nbytes, self._clock() - began)


class _Copy:
    """A job's copy, queued once by whoever comes first."""

    def __init__(self, job: CopyJob, after: Event | None) -> None:
        self.job = job
        self._after = after
        self._lock = threading.Lock()  # held while it is queued
        self._transfer: Transfer[CopyResult] | None = None
        self._error: Exception | None = None
        self._is_dropped = False

    def begin(self, queue: Callable[[CopyJob, Event | None], Transfer[CopyResult]]) -> Transfer[CopyResult]:
        """Queue it, or give what was queued before; raises what queueing it raised."""
        with self._lock:
            if self._is_dropped:
                raise TransferError("its time was over before it began")
            if self._error is not None:
                raise self._error
            if self._transfer is None:
                try:
                    self._transfer = queue(self.job, self._after)
                except Exception as error:
                    self._error = error
                    raise
            return self._transfer

    def drop(self) -> bool:
        """See to it that it is not queued any more; False where it was."""
        with self._lock:
            self._is_dropped = self._transfer is None
            return self._is_dropped


class LayerLoad:
    """Blocks on their way into an engine's memory, whose layers the engine's stream waits for one by one.

    Parameters
    ----------
    jobs : sequence of CopyJob
        One or more, with the same source.
    begin : callable
        Begins the copy of all of them.
    memory : Storage
        The engine's.
    clock : callable
    """

    def __init__(
        self,
        jobs: Sequence[CopyJob],
        begin: Callable[[], LayerTransfer],
        *,
        memory: Storage,
        clock: Callable[[], float],
    ) -> None:
        self._jobs = list(jobs)
        self._memory = memory
        self._clock = clock
        self._began = clock()
        self._layers: LayerTransfer | None = None
        self._error: Exception | None = None
        try:
            self._layers = begin()
        except Exception as error:
            self._error = error

    def wait(self, layer: int, stream: Any = None) -> None:
        """Let what is queued on a stream from now on wait for a layer; the caller does not wait.

        Parameters
        ----------
        layer : int
        stream : object, optional
            As for `StreamCopies.mark`.

        Notes
        -----
        A copy that failed holds nothing back: `finish` tells, before what was computed is used.
        """
        if self._layers is not None:
            with contextlib.suppress(TransferError):
                self._layers.wait_layer(layer, 0 if stream is None else stream)

    def wait_all(self, stream: Any = None) -> None:
        """Let what is queued on a stream from now on wait for all layers."""
        if self._layers is not None:
            self.wait(self._layers.num_layers - 1, stream)  # they come in order

    def finish(self) -> list[JobResult]:
        """Wait until every layer is there and was compared with its checksum; give the result of each job."""
        results = self._finish()
        for job, result in zip(self._jobs, results, strict=True):
            clear_lost(self._memory, job, result)
        return results

    def _finish(self) -> list[JobResult]:
        if self._layers is not None:
            try:
                result = self._layers.transfer.result()
            except Exception as error:
                self._error = error
            else:
                return self._split(result)
            finally:
                wait_until_landed(self._layers.transfer)
        assert self._error is not None, "a load without layers has failed"
        return [_failed(job, self._error) for job in self._jobs]

    def _split(self, result: CopyResult) -> list[JobResult]:
        seconds, start = self._clock() - self._began, 0
        block_nbytes = result.nbytes // max(1, result.num_blocks)
        results = []
        for job in self._jobs:
            end = start + len(job.hashes)
            results.append(_answer(job, result.good[start:end], (end - start) * block_nbytes, seconds))
            start = end
        return results


def _answer(job: CopyJob, good: npt.NDArray[np.bool_], nbytes: int, seconds: float) -> JobResult:
    outcomes = np.where(good, Outcome.OK, Outcome.CORRUPT).astype(np.uint8)
    num_good = int(np.count_nonzero(good))
    if num_good == len(good):
        return JobResult(job_id=job.job_id, outcomes=outcomes, nbytes=nbytes, seconds=seconds)
    _log.warning(
        "checksum mismatch tier=%s block_id=%d num_blocks=%d",
        job.source.value, int(job.source_ids[~good][0]), len(good) - num_good,
    )  # fmt: skip
    nbytes = nbytes // max(1, len(good)) * num_good
    return JobResult(job_id=job.job_id, outcomes=outcomes, nbytes=nbytes, seconds=seconds, reason="checksum mismatch")


def _failed(job: CopyJob, error: Exception) -> JobResult:
    _log.error(
        "copy failed job_id=%d source=%s destination=%s num_blocks=%d error=%r",
        job.job_id, job.source.value, job.destination.value, len(job.hashes), error,
    )  # fmt: skip
    return answer_all(job, Outcome.FAILED, str(error) or repr(error))
