"""The index of a slab against a plain dict, with a kill at any step."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from slab_site import HEADER, IndexFile, checksums_of, found, ids, names

PAGE_SLOTS = 64  # what is written together


@dataclass(frozen=True)
class Entry:
    number: int
    priority: int
    stamp: int


SLOTS = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 130, 199]), min_size=1, max_size=6, unique=True)
NUMBERS = st.lists(st.integers(0, 30), min_size=6, max_size=6)
PRIORITIES = st.lists(st.integers(0, 100), min_size=6, max_size=6)


class IndexAgainstDict(RuleBasedStateMachine):
    """What a live index says, and what one finds that opens the file after a kill."""

    @initialize(num_slots=st.integers(1, 200))
    def begin(self, num_slots: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.file = IndexFile(Path(self.folder.name) / "rank0.index")
        self.header = replace(HEADER, num_slots=num_slots)
        self.index = self.file.open(self.header)
        self.memory: dict[int, Entry] = {}
        self.written: dict[int, Entry] = {}  # what the file says
        self.touched: set[int] = set()  # pages
        self.num_stamps = 0

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
            self.folder.cleanup()

    @rule(slots=SLOTS, numbers=NUMBERS, priorities=PRIORITIES)
    def put(self, slots: list[int], numbers: list[int], priorities: list[int]) -> None:
        slots = [slot for slot in slots if slot < self.header.num_slots]
        numbers, priorities = numbers[: len(slots)], priorities[: len(slots)]
        hashes = names(*numbers)
        levels = np.array(priorities, dtype=np.uint8)
        self.index.put(ids(*slots), hashes, hashes + np.uint64(1000), checksums_of(numbers), levels)
        for slot, number, priority in reversed(list(zip(slots, numbers, priorities, strict=True))):
            self.memory[slot] = self._entry(number, priority)  # a tail is older than its head
        self._write(slots)

    @rule(slots=SLOTS)
    def void(self, slots: list[int]) -> None:
        slots = [slot for slot in slots if slot < self.header.num_slots]
        self.index.void(ids(*slots))
        self._write([slot for slot in slots if self.memory.pop(slot, None) is not None])

    @rule(numbers=st.lists(st.integers(0, 30), max_size=4))
    def forget(self, numbers: list[int]) -> None:
        self.index.forget(names(*numbers))
        gone = [slot for slot, entry in self.memory.items() if entry.number in numbers]
        for slot in gone:
            del self.memory[slot]
        self._write(gone)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.memory, self.written, self.touched = {}, {}, set()

    @rule(slots=SLOTS, numbers=NUMBERS, priorities=PRIORITIES, is_right=st.booleans())
    def touch(self, slots: list[int], numbers: list[int], priorities: list[int], is_right: bool) -> None:
        slots = [slot for slot in slots if slot < self.header.num_slots]
        if is_right:
            slots = [slot for slot in slots if slot in self.memory]
            numbers = [self.memory[slot].number for slot in slots]
        numbers, priorities = numbers[: len(slots)], priorities[: len(slots)]
        self.index.touch(ids(*slots), names(*numbers), np.array(priorities, dtype=np.uint8))
        for slot, number, priority in zip(slots, numbers, priorities, strict=True):
            if slot in self.memory and self.memory[slot].number == number:
                self.memory[slot] = self._entry(number, priority)
                self.touched.add(slot // PAGE_SLOTS)

    @rule()
    def sync(self) -> None:
        self.index.sync()
        assert not self.index.needs_sync
        self._write([page * PAGE_SLOTS for page in self.touched])

    @rule(seconds=st.sampled_from([-100.0, 0.5, 1.0, 1000.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.file.clock.now += seconds

    @rule(num_slots=st.none() | st.integers(1, 200), is_synced=st.booleans())
    def kill_and_open(self, num_slots: int | None, is_synced: bool) -> None:
        if is_synced:
            self.sync()
        self.header = replace(self.header, num_slots=num_slots or self.header.num_slots)
        self.index = self.file.open(self.header)
        assert self.index.num_damaged == 0
        self.written = {slot: entry for slot, entry in self.written.items() if slot < self.header.num_slots}
        self.memory, self.touched = dict(self.written), set()

    @invariant()
    def says_what_the_dict_says(self) -> None:
        if not hasattr(self, "index"):
            return
        youngest = {entry.number: slot for slot, entry in sorted(self.memory.items(), key=lambda item: item[1].stamp)}
        kept = sorted(youngest.values(), key=lambda slot: self.memory[slot].stamp)
        assert found(self.index) == [(slot, self.memory[slot].number) for slot in kept]
        _, records = self.index.live()
        assert records["priority"].tolist() == [self.memory[slot].priority for slot in kept]

    def _entry(self, number: int, priority: int) -> Entry:
        self.num_stamps += 1
        return Entry(number, priority, self.num_stamps)

    def _write(self, slots: Sequence[int]) -> None:
        """Note that the pages of these slots went to the file as they are."""
        for page in {slot // PAGE_SLOTS for slot in slots}:
            self.touched.discard(page)
            for slot in range(page * PAGE_SLOTS, (page + 1) * PAGE_SLOTS):
                if slot in self.memory:
                    self.written[slot] = self.memory[slot]
                else:
                    self.written.pop(slot, None)


IndexAgainstDict.TestCase.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_an_index_says_what_a_dict_says_whenever_it_is_killed = IndexAgainstDict.TestCase
