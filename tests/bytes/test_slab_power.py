"""The power goes: whatever un-synced pages are lost or torn, no wrong byte is believed, what was synced is there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage
from kvbm.testing.power_cut import PowerCutOs
from kvbm.types import HashArray, IdArray

NUM_SLOTS = 8
LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=NUM_SLOTS, num_layers=2, outer_dim=2, block_size=4, inner_dim=300, dtype="uint8"
)  # 4800 bytes in a slot of two pages, so that half of a block can be another's
SLOTS = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=3, unique=True)
NAMES = st.integers(0, 5)
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), SLOTS, NAMES),
        st.tuples(st.just("put"), SLOTS, NAMES),
        st.tuples(st.just("write only"), SLOTS, NAMES),
        st.tuples(st.just("sync"), st.none(), st.none()),
        st.tuples(st.just("forget"), st.none(), NAMES),
        st.tuples(st.just("clear"), st.none(), st.none()),
        st.tuples(st.just("touch"), SLOTS, st.none()),
        st.tuples(st.just("cut"), st.none(), st.none()),
    ),
    min_size=1,
    max_size=12,
)


def content_of(name: int) -> Any:
    return np.frombuffer(hashlib.shake_128(b"%d" % name).digest(LAYOUT.block_nbytes), dtype=np.uint8)


def checksum_of(data: Any) -> int:
    """Of the bytes alone: a record that has the checksum of another name's block would be believed."""
    return int.from_bytes(hashlib.blake2b(data.tobytes(), digest_size=8).digest(), "little")


def hashes_of(*names: int) -> HashArray:
    return np.array([[name, 7] for name in names], dtype=np.uint64).reshape(-1, 2)


def ids(*slots: int) -> IdArray:
    return np.array(slots, dtype=np.int32)


def open_slab(directory: Path, calls: PowerCutOs, *, use_direct_io: bool, fingerprint: str = "a model") -> DiskStorage:
    return DiskStorage(
        LAYOUT,
        directory,
        fingerprint=fingerprint,
        on_mismatch="replace",
        num_threads=1,
        use_direct_io=use_direct_io,
        sync_interval_s=3600,  # only when told
        os_calls=calls,
    )


def believed(storage: DiskStorage) -> dict[int, int]:
    """Give the name in each slot that a restart would serve; its bytes are right."""
    slots, hashes, _, _ = storage.inventory()
    found = {}
    for slot, name in zip(slots.tolist(), hashes[:, 0].tolist(), strict=True):
        data = storage.read(ids(slot))[0]
        if storage.has_checksum[slot] and int(storage.checksums[slot]) == checksum_of(data):
            assert np.array_equal(data, content_of(name)), f"slot {slot} serves another's bytes as block {name}"
            found[slot] = name
    return found


class Life:
    """A slab that is written, and what a power cut may do to it."""

    def __init__(self, folder: Path, use_direct_io: bool, choose: Callable[[int], int]) -> None:
        self.folder, self.use_direct_io, self.choose = folder, use_direct_io, choose
        self.num_cuts = 0
        self.calls = PowerCutOs()
        self.storage = open_slab(folder / "0", self.calls, use_direct_io=use_direct_io)
        self.slots: dict[int, int] = {}  # what each holds
        self.synced: dict[int, int] = {}  # and what a cut must leave
        self.forgotten: set[int] = set()  # names

    def put(self, slots: list[int], name: int, *, is_recorded: bool = True) -> None:
        """Write a block into some slots; the rest of a batch has names of its own."""
        names = [name + 10 * i for i in range(len(slots))]
        for slot in slots:
            self.slots.pop(slot, None)
            self.synced.pop(slot, None)
        # Of a name in two slots a restart takes the younger, which is not on the medium yet.
        self.synced = {slot: kept for slot, kept in self.synced.items() if kept not in names}
        data = np.stack([content_of(one) for one in names])
        rows = np.arange(len(slots), dtype=np.int32)
        assert self.storage.submit_write(ids(*slots), data, rows).result(60).all()
        if is_recorded:
            checksums = np.array([checksum_of(row) for row in data], dtype=np.uint64)
            self.storage.record(ids(*slots), hashes=hashes_of(*names), checksums=checksums)
            self.slots.update(zip(slots, names, strict=True))
            self.forgotten.difference_update(names)

    def sync(self) -> None:
        self.storage.sync()
        self.synced = dict(self.slots)

    def forget(self, name: int | None) -> None:
        """Forget a name, or all."""
        gone = set(self.slots.values()) | set(range(60)) if name is None else {name}
        self.storage.clear() if name is None else self.storage.forget(hashes_of(name))
        self.forgotten |= gone
        self.slots = {slot: kept for slot, kept in self.slots.items() if kept not in gone}
        self.synced = {slot: kept for slot, kept in self.synced.items() if kept not in gone}

    def touch(self, slots: list[int]) -> None:
        held = [slot for slot in slots if slot in self.slots]
        hashes = hashes_of(*(self.slots[slot] for slot in held))
        self.storage.touch(ids(*held), hashes, np.full(len(held), 60, dtype=np.uint8))

    def cut(self) -> None:
        """Cut the power, look at what is left, and go on before it."""
        self.num_cuts += 1
        left = self.folder / str(self.num_cuts)
        self.calls.cut(self.folder / "0", left, self.choose)
        with open_slab(left, PowerCutOs(), use_direct_io=self.use_direct_io) as storage:
            found = believed(storage)
        names = set(found.values())
        assert not names & self.forgotten, "what was forgotten is found"
        lost = set(self.synced.values()) - names
        assert not lost, f"blocks {sorted(lost)} were synced and are lost"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ops=OPS, use_direct_io=st.booleans(), data=st.data())
def test_a_power_cut_costs_what_was_not_synced_and_nothing_else(
    ops: list[tuple[str, Any, Any]], use_direct_io: bool, data: st.DataObject
) -> None:
    def choose(num_choices: int) -> int:
        return data.draw(st.integers(0, num_choices - 1))

    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder), use_direct_io, choose)
        try:
            for verb, slots, name in ops:
                if verb in ("put", "write only"):
                    life.put(slots, name, is_recorded=verb == "put")
                elif verb == "forget":
                    life.forget(name)
                elif verb == "clear":
                    life.forget(None)
                elif verb == "touch":
                    life.touch(slots)
                elif verb == "sync":
                    life.sync()
                else:
                    life.cut()
            life.cut()
        finally:
            life.storage.close()


@pytest.mark.parametrize("use_direct_io", [True, False])
def test_a_power_cut_while_a_slab_is_replaced_serves_nothing_of_the_old(tmp_path: Path, use_direct_io: bool) -> None:
    """At every call of the opening, and for many choices of what is lost."""
    rng = np.random.default_rng(1)
    calls = PowerCutOs()
    with open_slab(tmp_path / "old", calls, use_direct_io=use_direct_io) as storage:
        data = np.stack([content_of(i) for i in range(NUM_SLOTS)])
        storage.write(np.arange(NUM_SLOTS, dtype=np.int32), data)
        checksums = np.array([checksum_of(row) for row in data], dtype=np.uint64)
        storage.record(np.arange(NUM_SLOTS, dtype=np.int32), hashes=hashes_of(*range(NUM_SLOTS)), checksums=checksums)
        storage.sync()
    num_cuts = 0

    class CutsAtEachCall(PowerCutOs):
        def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
            num_written = super().pwritev(fd, buffers, offset)
            if offset or memoryview(buffers[0]).nbytes >= 4096:  # the lock file's is written with a lock held
                self._cut_some()
            return num_written

        def fdatasync(self, fd: int) -> None:
            self._cut_some()
            super().fdatasync(fd)
            self._cut_some()

        def _cut_some(self) -> None:
            nonlocal num_cuts
            for _ in range(3):
                num_cuts += 1
                left = tmp_path / f"cut{num_cuts}"
                self.cut(tmp_path / "old", left, lambda n: int(rng.integers(n)))
                with open_slab(left, PowerCutOs(), use_direct_io=use_direct_io, fingerprint="new") as storage:
                    assert believed(storage) == {}

    with open_slab(tmp_path / "old", CutsAtEachCall(), use_direct_io=use_direct_io, fingerprint="new") as storage:
        assert believed(storage) == {}
    assert num_cuts >= 20


def test_a_cut_loses_a_page_tears_it_or_leaves_it(tmp_path: Path) -> None:
    """The wrapper itself: a test that could not lose anything would prove nothing."""
    calls = PowerCutOs()
    (tmp_path / "0").mkdir()
    fd = calls.open(tmp_path / "0" / "file", 0o102)  # read, write, create
    calls.pwritev(fd, [b"a" * 8192], 0)
    calls.fdatasync(fd)
    calls.pwritev(fd, [b"b" * 8192], 0)
    calls.pwritev(fd, [b"c" * 100], 4000)
    assert calls.num_unsynced == 2
    seen = set()
    rng = np.random.default_rng(1)
    for n in range(1, 60):
        calls.cut(tmp_path / "0", tmp_path / str(n), lambda num: int(rng.integers(num)))
        data = (tmp_path / str(n) / "file").read_bytes()
        assert len(data) == 8192
        seen.add((data[:4000:500], data[4100:8192:500]))
        assert set(data[4096:4100]) <= set(b"abc")
    calls.close(fd)
    assert (b"a" * 8, b"a" * 9) in seen
    assert any(set(first) == {ord("a"), ord("b")} for first, _ in seen), "torn within a page"
    assert any((first[0], second[-1]) == (ord("a"), ord("b")) for first, second in seen), "one page and not the other"
