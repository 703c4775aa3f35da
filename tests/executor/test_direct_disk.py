"""Reads of a slab straight into host memory, by every engine: bytes, errors, and reads that end after the deadline.

CONFORMANCE 26, 27, 32. A gate holds what an engine has under way: the call itself under Python's threads, the answer of
the kernel under a native queue, whose bytes have moved by then.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_native import KINDS, PAGE, PATIENCE_S
from keyed_site import when_it_waits

from kvbm._backend import load_backend
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, JobResult, Outcome
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.calls import OsCalls
from kvbm.types import Tier

OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT
ENGINES = [("pure", "python"), *(("native", kind) for kind in (["python", *KINDS] if KINDS else []))]
NUM_BLOCKS = 12
DIMENSIONS: dict[str, Any] = {
    "num_blocks": NUM_BLOCKS, "num_layers": 3, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"
}  # fmt: skip
LAYOUTS = {  # rows that I/O takes as they are, and rows that are too short for a whole slot
    "whole slots": BlockLayout.fully_contiguous(**DIMENSIONS, alignment=PAGE),
    "short rows": BlockLayout.fully_contiguous(**DIMENSIONS),
}
IN_TIME, TOO_LATE = 5.0, 10.0


class GatedCalls(OsCalls):
    """Holds reads at a gate, and fails those of bad slots."""

    def __init__(self) -> None:
        self.gate, self.has_come = threading.Event(), threading.Event()
        self.gate.set()
        self.bad_slots: set[int] = set()

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if not self.gate.is_set():
            self.has_come.set()
            assert self.gate.wait(PATIENCE_S)
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if any(offset <= slot * PAGE < offset + nbytes for slot in self.bad_slots):
            raise OSError(errno.EIO, "a bad sector")
        return super().preadv(fd, buffers, offset)


class GatedQueue:
    """A native queue whose answers wait at a gate."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.gate, self.has_come = threading.Event(), threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)

    def wait(self) -> Any:
        answers = self.queue.wait()
        if not self.gate.is_set():
            self.has_come.set()
            assert self.gate.wait(PATIENCE_S)
        return answers


class DiskSite:
    """Host memory over a slab that holds a block in every slot; the host holds others."""

    def __init__(self, directory: Path, twin: str, engine: str, layout: BlockLayout) -> None:
        backend = load_backend(twin)
        self.now = 0.0
        self.host = HostStorage(layout, backend=backend)
        self.is_native = engine != "python"
        calls = None if self.is_native else GatedCalls()
        self.disk = DiskStorage(
            layout, directory / "slab", engine=engine, num_threads=1, depth=1, os_calls=calls, backend=backend
        )
        assert self.disk.engine_name == engine
        self.queue: Any = calls
        if self.is_native:
            self.queue = self.disk._engine._queue = GatedQueue(self.disk._engine._queue)
        storages = {Tier.HOST: self.host, Tier.DISK: self.disk}
        self.executor = Executor(storages, backend=backend, copy_threads=1, clock=lambda: self.now)
        self.ids = np.arange(NUM_BLOCKS, dtype=np.int32)
        rng = np.random.default_rng(4)
        self.hashes = rng.integers(0, 2**63, (NUM_BLOCKS, 2), dtype=np.uint64)
        self.data, self.others = rng.integers(0, 256, (2, NUM_BLOCKS, layout.block_nbytes), dtype=np.uint8)
        self.host.write(self.ids, self.data)
        assert not self._run(Tier.HOST, Tier.DISK, self.ids, self.ids, None).outcomes.any()
        self.host.write(self.ids, self.others)
        self.host.has_checksum[:] = True  # of what the blocks held before
        self.results: list[JobResult] = []

    def up(self, places: Any = None, deadline: float | None = None) -> JobResult:
        """Read every block; they go to places of the host, block by block unless told otherwise."""
        to_ids = self.ids if places is None else np.array(places, dtype=np.int32)
        return self._run(Tier.DISK, Tier.HOST, self.ids, to_ids, deadline)

    def begin_up(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.results.append(self.up(deadline=IN_TIME)))
        thread.start()
        return thread

    def when_submitted(self, num_calls: int, action: Callable[[], None]) -> list[Any]:
        """Act once so many reads were submitted; give the list of their transfers."""
        submit, transfers = self.disk.submit_read, []

        def submit_and_look(*arguments: Any, **names: Any) -> Any:
            transfers.append(submit(*arguments, **names))
            if len(transfers) == num_calls:
                action()
            return transfers[-1]

        self.disk.submit_read = submit_and_look  # type: ignore[method-assign]
        return transfers

    def fail_block_0(self) -> None:
        """Give block 0 a bad sector: a run fails, and then that block by itself."""
        if self.is_native:
            self.queue.inject([-errno.EIO] * 2)
        else:
            self.queue.bad_slots.add(0)

    def _run(self, source: Tier, destination: Tier, from_ids: Any, to_ids: Any, deadline: float | None) -> JobResult:
        job = CopyJob(
            job_id=3, source=source, destination=destination, source_ids=from_ids, destination_ids=to_ids,
            hashes=self.hashes, is_urgent=source is Tier.DISK,
        )  # fmt: skip
        return self.executor.execute(job, deadline)

    def close(self) -> None:
        self.queue.gate.set()
        self.executor.close()
        self.disk.close()
        self.host.close()


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 4 * LAYOUTS["short rows"].block_nbytes)


@pytest.fixture(params=ENGINES, ids="-".join)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., DiskSite]]:
    sites: list[DiskSite] = []

    def make(rows: str = "whole slots") -> DiskSite:
        sites.append(DiskSite(tmp_path, *request.param, LAYOUTS[rows]))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.mark.parametrize("rows", list(LAYOUTS))
def test_blocks_come_to_their_places_with_their_checksums(make: Callable[..., DiskSite], rows: str) -> None:
    site = make(rows)
    transfers = site.when_submitted(1, lambda: None)
    places = np.random.default_rng(1).permutation(NUM_BLOCKS)
    result = site.up(places)
    assert (result.outcomes.tolist(), result.reason) == ([OK] * NUM_BLOCKS, "")
    assert len(transfers) == 3
    assert np.array_equal(site.host.read(places.astype(np.int32)), site.data)
    assert site.host.has_checksum.all()
    assert site.host.checksums[places].tolist() == site.disk.checksums.tolist()


@pytest.mark.parametrize("rows", list(LAYOUTS))
def test_bad_sector_costs_its_block_alone(
    make: Callable[..., DiskSite], monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 16 << 20)  # answers are injected by their order
    site = make(rows)
    if rows == "short rows" and site.disk.io_mode == "buffered":
        pytest.skip("each block is a call of its own, none is tried again")
    site.fail_block_0()
    result = site.up()
    assert result.outcomes.tolist() == [FAILED] + [OK] * 11
    assert result.reason == "read error"
    assert site.host.has_checksum.tolist() == [False] + [True] * 11
    assert np.array_equal(site.host.read(site.ids[1:]), site.data[1:])
    assert site.disk.holds(site.ids, site.hashes).all(), "what could not be read is not called bad"


def test_flipped_bit_on_the_medium_is_found_and_its_slot_forgotten(make: Callable[..., DiskSite]) -> None:
    site = make()
    with site.disk.path.open("r+b") as file:
        for slot in (5, 9):
            file.seek(slot * PAGE + 17)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 64]))
    result = site.up()
    assert np.flatnonzero(result.outcomes == CORRUPT).tolist() == [5, 9]
    assert np.flatnonzero(~site.host.has_checksum).tolist() == [5, 9]
    assert np.flatnonzero(~site.disk.holds(site.ids, site.hashes)).tolist() == [5, 9]
    good = np.flatnonzero(result.outcomes == OK).astype(np.int32)
    assert len(good) == 10
    assert np.array_equal(site.host.read(good), site.data[good])
    assert site.up().outcomes[[5, 9]].tolist() == [FAILED] * 2, "nothing is kept there any more"


def test_file_that_was_cut_costs_the_blocks_behind_its_end(make: Callable[..., DiskSite]) -> None:
    site = make()
    with site.disk.path.open("r+b") as file:
        file.truncate(6 * PAGE)
    result = site.up()
    assert result.outcomes.tolist() == [OK] * 6 + [FAILED] * 6
    assert result.reason == "read error"
    assert site.host.has_checksum.tolist() == [True] * 6 + [False] * 6
    assert np.array_equal(site.host.read(site.ids[:6]), site.data[:6])


@pytest.mark.parametrize("rows", list(LAYOUTS))
def test_read_that_ends_after_the_deadline_has_landed_before_the_answer(
    make: Callable[..., DiskSite], monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """Its bytes may lie there, and count for nothing; no byte moves once a new owner may write."""
    site = make(rows)
    site.queue.gate.clear()
    seen: list[list[Any]] = []

    def end_time() -> None:
        assert site.queue.has_come.wait(PATIENCE_S)
        site.now = TOO_LATE

    def open_gate() -> None:
        seen.append([*site.results, *(transfer.cancelled() for transfer in transfers)])
        site.queue.gate.set()

    transfers = site.when_submitted(2, end_time)
    when_it_waits(monkeypatch, open_gate)
    site.begin_up().join(PATIENCE_S)
    assert seen[0] == [True, True], "both were called back, and nothing was answered"
    (result,) = site.results
    assert (result.outcomes.tolist(), result.reason) == ([LATE] * NUM_BLOCKS, "its time was over")
    assert not any(transfer.is_draining for transfer in transfers)
    noise = np.random.default_rng(6).integers(0, 256, site.data.shape, dtype=np.uint8)
    site.host.buffers[0][:] = 0
    site.host.write(site.ids, noise)
    site.queue.gate.set()
    site.executor.close()
    site.disk.close()
    assert np.array_equal(site.host.read(site.ids), noise)
    assert not site.host.has_checksum.any()


def test_read_that_was_not_begun_moves_no_byte(make: Callable[..., DiskSite]) -> None:
    """The one thread is busy with the first block of a chunk, or the queue begins nothing."""
    site = make()
    if site.is_native:
        site.queue.pause()
    else:
        site.queue.gate.clear()

    def end_time() -> None:
        assert site.is_native or site.queue.has_come.wait(PATIENCE_S)
        site.now = TOO_LATE
        go_on = site.queue.resume if site.is_native else site.queue.gate.set
        transfers[-1].add_done_callback(lambda _: go_on())  # the second chunk was called back

    transfers = site.when_submitted(2, end_time)
    result = site.up(deadline=IN_TIME)
    assert result.outcomes.tolist() == [LATE] * NUM_BLOCKS
    assert np.array_equal(site.host.read(site.ids[4:]), site.others[4:])
    assert site.host.has_checksum.tolist() == [False] * 8 + [True] * 4
    site.now = 0.0
    assert site.up(deadline=IN_TIME).outcomes.tolist() == [OK] * NUM_BLOCKS
    assert np.array_equal(site.host.read(site.ids), site.data)


def test_host_that_is_closed_keeps_its_memory_until_the_disk_lets_go(make: Callable[..., DiskSite]) -> None:
    site = make()
    buffer = site.host.buffers[0]
    site.queue.gate.clear()
    thread = site.begin_up()
    assert site.queue.has_come.wait(PATIENCE_S)
    site.host.close()
    site.queue.gate.set()
    thread.join(PATIENCE_S)
    (result,) = site.results
    assert result.outcomes.tolist() == [FAILED] * NUM_BLOCKS
    assert "closed" in result.reason
    rows = buffer.reshape(NUM_BLOCKS, -1)[:4, : site.data.shape[1]]
    assert np.array_equal(rows, site.data[:4]), "the bytes went where they were meant to"


def test_disk_that_is_closed_lets_reads_under_way_end(make: Callable[..., DiskSite]) -> None:
    site = make()
    site.queue.gate.clear()
    is_closing = threading.Event()

    def close() -> None:
        is_closing.set()
        site.disk.close()

    def wait_for_all() -> None:
        assert site.queue.has_come.wait(PATIENCE_S)
        closer.start()
        assert is_closing.wait(PATIENCE_S)

    closer = threading.Thread(target=close)
    site.when_submitted(3, wait_for_all)
    thread = site.begin_up()
    assert is_closing.wait(PATIENCE_S)
    site.queue.gate.set()
    thread.join(PATIENCE_S)
    closer.join(PATIENCE_S)
    assert site.results[0].outcomes.tolist() == [OK] * NUM_BLOCKS
    assert np.array_equal(site.host.read(site.ids), site.data)
