"""Golden blocks: bytes that say what they are, sent from an engine's memory to each tier and back, and compared.

They go the way of every block: as jobs in a step's orders, through the worker's half, its executor and its storages.
What lies in the engine's memory is written and read by the engine's own index, never by our addresses, so a layout
that was misread shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.engines.messages import LoadOrder, StepOrders, decode_report, encode_orders
from kvbm.engines.worker import WorkerCore
from kvbm.errors import KvbmError, TransferError, TransferTimeout
from kvbm.jobs import CopyJob, ForgetJob, Job, JobResult, Outcome, encode
from kvbm.jobs.messages import decode_result
from kvbm.storage import Storage
from kvbm.types import HashArray, IdArray, Tier

_POISON = 0xA5  # of slots that hold nothing
_MOST_BLOCKS = 8  # that travel at once
_POLL_S = 0.0005

ByteArray = npt.NDArray[np.uint8]


class EngineMemory(Protocol):
    """An engine's memory of one group of layers, as the engine itself sees it."""

    @property
    def num_slots(self) -> int:
        """Blocks."""

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all layers."""

    def write(self, slots: IdArray, data: ByteArray) -> None:
        """Write blocks: (num_slots, block_nbytes) uint8, host."""

    def read(self, slots: IdArray) -> ByteArray:
        """Read blocks: (num_slots, block_nbytes) uint8, host."""


@dataclass(frozen=True)
class GoldenResult:
    """What came of one tier, or of the flipped byte.

    Attributes
    ----------
    tier : str
        "host", "disk", "remote"; "flip" for the byte that was flipped in the host tier, to be noticed.
    group, rank : int
    num_blocks, nbytes : int
        That travelled.
    seconds : float
        There and back.
    problem : str
        Empty where every byte was right.
    """

    tier: str
    group: int
    rank: int
    num_blocks: int
    nbytes: int
    seconds: float
    problem: str

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return vars(self).copy()


def golden_blocks(label: str, num_blocks: int, nbytes: int) -> tuple[HashArray, ByteArray]:
    """Make names and bytes of blocks.

    Returns
    -------
    hashes : (num_blocks, 2) uint64
    data : (num_blocks, nbytes) uint8
    """
    names = [hashlib.blake2b(f"{label} {i}".encode(), digest_size=16).digest() for i in range(num_blocks)]
    rows = [np.random.default_rng(list(name)).integers(0, 256, nbytes, dtype=np.uint8) for name in names]
    hashes: HashArray = np.frombuffer(b"".join(names), dtype="<u8").reshape(-1, 2)
    return hashes, np.stack(rows) if rows else np.empty((0, nbytes), dtype=np.uint8)


class GoldenRun:
    """Sends golden blocks through one worker's half.

    Parameters
    ----------
    core : WorkerCore
        Which has no other jobs.
    storages : sequence of mapping of Tier to Storage
        For each group of layers, those of the core's executors.
    memories : sequence of EngineMemory
        For each group; what they hold is overwritten.
    rank : int
    timeout_s : float
        Of each copy.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        core: WorkerCore,
        storages: Sequence[Mapping[Tier, Storage]],
        memories: Sequence[EngineMemory],
        *,
        rank: int = 0,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._storages = storages
        self._memories = memories
        self._rank = rank
        self._timeout_s = timeout_s
        self._clock = clock
        self._numbers = itertools.count(1)

    def run(self, on_begin: Callable[[str], None] = lambda what: None) -> list[GoldenResult]:
        """Try every tier of every group.

        Parameters
        ----------
        on_begin : callable
            Told what is tried next, for those who watch a process that hangs.
        """
        results = []
        for group, storages in enumerate(self._storages):
            for tier in storages:
                if tier is not Tier.DEVICE:
                    on_begin(f"golden blocks to the {tier.value} tier, group {group}, rank {self._rank}")
                    results.append(self._try(tier.value, group, partial(self._send, group, tier)))
            if Tier.HOST in storages:
                on_begin(f"a flipped byte in the host tier, group {group}, rank {self._rank}")
                results.append(self._try("flip", group, partial(self._flip, group)))
        return results

    # -- private -----------------------------------------------------------------------------------------------

    def _try(self, name: str, group: int, attempt: Callable[[], tuple[int, str]]) -> GoldenResult:
        began = self._clock()
        try:
            num_blocks, problem = attempt()
        except (KvbmError, OSError, ValueError, RuntimeError) as error:
            num_blocks, problem = 0, f"{type(error).__name__}: {error}"
        nbytes = num_blocks * self._memories[group].block_nbytes
        return GoldenResult(name, group, self._rank, num_blocks, nbytes, self._clock() - began, problem)

    def _places(self, group: int, *tiers: Tier) -> tuple[IdArray, IdArray]:
        """Choose slots to save from and to load into: at both ends of the engine's memory, its null block left out."""
        memory, storages = self._memories[group], self._storages[group]
        room = min(storages[tier].num_blocks // (2 if tier is Tier.HOST else 1) for tier in tiers)
        num_blocks = min(_MOST_BLOCKS, (memory.num_slots - 1) // 2, room)
        if num_blocks < 1:
            raise ValueError(f"the engine has {memory.num_slots} blocks and tiers room for {room}: nothing can be sent")
        source = np.arange(1, 1 + num_blocks, dtype=np.int32)
        return source, np.arange(memory.num_slots - 1, memory.num_slots - 1 - num_blocks, -1, dtype=np.int32)

    def _send(self, group: int, tier: Tier) -> tuple[int, str]:
        """Send blocks to a tier and back; say what was wrong."""
        memory = self._memories[group]
        source, destination = self._places(group, Tier.HOST, tier)
        num_blocks = len(source)
        hashes, data = golden_blocks(f"{tier.value} {group} {self._rank}", num_blocks, memory.block_nbytes)
        self._fill(memory, source, data)
        first, second = self._host_slots(num_blocks)
        self._copy(group, (Tier.DEVICE, source), (Tier.HOST, first), hashes)
        self._fill(memory, source[:0], data[:0])
        here = first
        if tier is not Tier.HOST:
            there = np.arange(num_blocks, dtype=np.int32)
            try:
                self._copy(group, (Tier.HOST, first), (tier, there), hashes)
                self._copy(group, (tier, there), (Tier.HOST, second), hashes)
            finally:
                with contextlib.suppress(TransferError):  # the place is the doctor's own
                    self._do(group, ForgetJob(job_id=next(self._numbers), tier=tier, hashes=hashes, ids=there))
            here = second
        self._copy(group, (Tier.HOST, here), (Tier.DEVICE, destination), hashes)
        return num_blocks, self._compare(memory, destination, data)

    def _flip(self, group: int) -> tuple[int, str]:
        """Flip a byte in the host tier: the block must be refused, the others not."""
        memory, host = self._memories[group], self._storages[group][Tier.HOST]
        source, destination = self._places(group, Tier.HOST)
        num_blocks = len(source)
        hashes, data = golden_blocks(f"flip {group} {self._rank}", num_blocks, memory.block_nbytes)
        self._fill(memory, source, data)
        slots, _ = self._host_slots(num_blocks)
        self._copy(group, (Tier.DEVICE, source), (Tier.HOST, slots), hashes)
        kept = host.checksums[slots[:1]].copy()
        if not host.has_checksum[slots[0]]:
            return num_blocks, "the host tier keeps no checksums: offload.verify_checksums is off"
        block = host.read(slots[:1])
        block[0, -1] ^= 1
        host.write(slots[:1], block)
        host.checksums[slots[0]], host.has_checksum[slots[0]] = kept[0], True
        self._fill(memory, source[:0], data[:0])
        result, lost = self._load(group, slots, destination, hashes)
        expected = np.full(num_blocks, Outcome.OK)
        expected[0] = Outcome.CORRUPT
        if (result.outcomes != expected).any() or lost != {int(destination[0])}:
            return num_blocks, f"a flipped byte was not noticed: outcomes {result.outcomes.tolist()}, refused {lost}"
        return num_blocks, ""

    def _host_slots(self, num_blocks: int) -> tuple[IdArray, IdArray]:
        return np.arange(num_blocks, dtype=np.int32), np.arange(num_blocks, 2 * num_blocks, dtype=np.int32)

    def _fill(self, memory: EngineMemory, slots: IdArray, data: ByteArray) -> None:
        """Write these blocks, and poison into all others."""
        everywhere = np.arange(memory.num_slots, dtype=np.int32)
        memory.write(everywhere, np.full((memory.num_slots, memory.block_nbytes), _POISON, dtype=np.uint8))
        if len(slots):
            memory.write(slots, data)

    def _compare(self, memory: EngineMemory, slots: IdArray, data: ByteArray) -> str:
        expected = np.full((memory.num_slots, memory.block_nbytes), _POISON, dtype=np.uint8)
        expected[slots] = data
        wrong = memory.read(np.arange(memory.num_slots, dtype=np.int32)) != expected
        if not wrong.any():
            return ""
        blocks, places = wrong.nonzero()
        is_near = ~np.isin(blocks, slots)
        beside = f", {int(is_near.sum()):,} of them in blocks that nothing was loaded into" if is_near.any() else ""
        return f"{len(blocks):,} wrong bytes, first in block {blocks[0]} at byte {places[0]}{beside}"

    # -- jobs --------------------------------------------------------------------------------------------------

    def _copy(
        self, group: int, source: tuple[Tier, IdArray], destination: tuple[Tier, IdArray], hashes: HashArray
    ) -> None:
        if destination[0] is Tier.DEVICE:
            result, lost = self._load(group, source[1], destination[1], hashes)
        else:
            result, lost = self._do(group, self._job(source, destination, hashes)), set()
        names = [Outcome(outcome).name.lower() for outcome in result.outcomes if outcome != Outcome.OK]
        if names or lost:
            what = f"{source[0].value} to {destination[0].value}: {len(names)} of {len(hashes)} blocks"
            raise TransferError(f"{what} {', '.join(sorted(set(names)))} ({result.reason or 'no reason given'})")

    def _job(self, source: tuple[Tier, IdArray], destination: tuple[Tier, IdArray], hashes: HashArray) -> CopyJob:
        parents = np.zeros_like(hashes)
        parents[1:] = hashes[:-1]
        return CopyJob(
            job_id=next(self._numbers),
            source=source[0],
            destination=destination[0],
            source_ids=source[1],
            destination_ids=destination[1],
            hashes=hashes,
            parents=parents,
            priorities=np.full(len(hashes), 50, dtype=np.uint8),
            timeout_s=self._timeout_s,
            is_urgent=destination[0] is not Tier.REMOTE and source[0] is not Tier.DEVICE,
        )

    def _load(self, group: int, host: IdArray, slots: IdArray, hashes: HashArray) -> tuple[JobResult, set[int]]:
        """Load into the engine's memory as a request does; give the slots that are reported as lost, too."""
        job = self._job((Tier.HOST, host), (Tier.DEVICE, slots), hashes)
        lost: set[int] = set()
        result = self._do(group, job, lost)
        return result, lost

    def _do(self, group: int, job: Job, lost: set[int] | None = None) -> JobResult:
        """Put a job into the orders of a step, and make empty steps until it is answered."""
        request_id = f"golden-{job.job_id}"
        orders = StepOrders(
            jobs=[[encode(job)] if index == group else [] for index in range(len(self._storages))],
            loads=[] if lost is None else [LoadOrder(request_id=request_id, job_ids=[(group, job.job_id)])],
        )
        self._core.begin(encode_orders(orders))
        self._core.after_forward()
        until = self._clock() + 2 * self._timeout_s
        answer: JobResult | None = None
        is_received = lost is None
        while answer is None or not is_received:
            news = self._core.take()
            for data in decode_report(news.report).results[group]:
                result = decode_result(data)
                answer = result if result.job_id == job.job_id else answer
            is_received |= request_id in news.received
            if lost is not None:
                lost |= news.lost_slots
            if self._clock() > until:
                raise TransferTimeout(f"{type(job).__name__} was not answered in {2 * self._timeout_s:g} s")
            time.sleep(_POLL_S)
        return answer
