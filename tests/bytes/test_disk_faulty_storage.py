"""The wrapper that makes a storage misbehave, around host memory and around a disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.errors import ConfigError, PoolClosed, StorageError
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage, Storage
from kvbm.storage.disk import DiskStorage
from kvbm.testing.faults import FaultMode, FaultPlan, FaultyStorage
from kvbm.testing.storages import StorageTests

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=8, num_layers=2, outer_dim=2, block_size=4, inner_dim=12, dtype="uint8"
)
NBYTES = LAYOUT.block_nbytes
PATIENCE_S = 60
ALL = np.arange(8, dtype=np.int32)


def make_inner(kind: str, directory: Path) -> Storage:
    return HostStorage(LAYOUT) if kind == "host" else DiskStorage(LAYOUT, directory)


class TestFaultyStorageWithoutFaults(StorageTests):
    @pytest.fixture(autouse=True, params=["host", "disk"])
    def _use(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind, self.directory = request.param, tmp_path / "disk"

    def make_storage(self) -> Storage:
        return FaultyStorage(make_inner(self.kind, self.directory), FaultPlan())


@pytest.fixture(params=["host", "disk"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    with make_inner(request.param, tmp_path / "disk") as storage:
        storage.write(ALL, content(0))
        yield storage


def content(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (8, NBYTES), dtype=np.uint8)


def num_bits(a: Any, b: Any) -> int:
    return int(np.unpackbits(np.bitwise_xor(a, b)).sum())


def test_failed_write_says_which_and_spoils_only_those(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.FAIL], affects="some", seed=3))
    good = storage.submit_write(ALL, content(1), ALL).result(PATIENCE_S)
    assert 0 < good.sum() < 8
    assert np.array_equal(inner.read(ALL[good]), content(1)[good])
    assert (inner.read(ALL[~good]) == 0xEE).all(), "poison, as a real failure may leave anything"
    assert storage.faults.num_blocks_injected[FaultMode.FAIL] == 8 - good.sum()


def test_failed_read_says_which_and_leaves_poison(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.FAIL], affects="one"))
    memory = np.zeros((8, NBYTES + 3), dtype=np.uint8)
    good = storage.submit_read(ALL, memory, ALL[::-1].copy()).result(PATIENCE_S)
    assert good.sum() == 7
    assert np.array_equal(memory[::-1, :NBYTES][good], content(0)[good])
    assert (memory[::-1, :NBYTES][~good] == 0xEE).all()


def test_torn_write_claims_success_and_keeps_old_tails(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.TEAR], affects="all", on="write"))
    assert storage.submit_write(ALL, content(1), ALL).result(PATIENCE_S).all()
    now, old, fresh = inner.read(ALL), content(0), content(1)
    for i in range(8):
        cut = next(cut for cut in range(NBYTES) if np.array_equal(now[i, cut:], old[i, cut:]))
        assert np.array_equal(now[i, :cut], fresh[i, :cut])


def test_torn_read_claims_success_and_keeps_old_tails(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([None, FaultMode.TEAR], affects="one", on="read"))
    memory = content(2)
    assert storage.submit_read(ALL, memory, ALL).result(PATIENCE_S).all()
    assert np.array_equal(memory, content(0))
    memory = content(2)
    assert storage.submit_read(ALL, memory, ALL).result(PATIENCE_S).all()
    wrong = (memory != content(0)).any(axis=1)
    assert wrong.sum() == 1
    assert memory[wrong][0, -1] == content(2)[wrong][0, -1]


@pytest.mark.parametrize("verb", ["read", "write"])
def test_flip_turns_one_bit_and_claims_success(inner: Storage, verb: str) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.FLIP], on=verb))
    memory = content(1)
    if verb == "write":
        assert storage.submit_write(ALL, memory, ALL).result(PATIENCE_S).all()
        assert np.array_equal(memory, content(1)), "the caller's memory is not touched"
        assert num_bits(inner.read(ALL), memory) == 1
    else:
        assert storage.submit_read(ALL, memory, ALL).result(PATIENCE_S).all()
        assert num_bits(memory, content(0)) == 1
        assert np.array_equal(inner.read(ALL), content(0))


def test_delayed_bytes_move_only_when_they_are_released(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.DELAY, FaultMode.DELAY]))
    memory, back = content(1), np.zeros((8, NBYTES), dtype=np.uint8)
    written, read = storage.submit_write(ALL, memory, ALL), storage.submit_read(ALL, back, ALL)
    assert (storage.num_held, written.done(), read.done()) == (2, False, False)
    assert np.array_equal(inner.read(ALL), content(0))
    assert not back.any()
    assert written.cancel()
    assert written.is_draining, "it ended for its waiter; its bytes are still to come"
    storage.faults.is_on = False
    assert storage.release() == 2
    assert read.result(PATIENCE_S).all()
    inner.close()
    assert not written.is_draining
    assert storage.num_held == 0


def test_plain_read_waits_at_the_gate_too(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.DELAY]))
    answers: list[Any] = []
    reader = threading.Thread(target=lambda: answers.append(storage.read(ALL)))
    reader.start()
    assert storage.wait_until_held(1, PATIENCE_S)
    assert not answers
    assert storage.release() == 1
    reader.join(PATIENCE_S)
    assert np.array_equal(answers[0], content(0))
    assert not storage.wait_until_held(1, 0)


def test_unanswered_call_moves_nothing_and_fails_when_abandoned(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.NEVER]))
    written = storage.submit_write(ALL, content(1), ALL)
    assert storage.release() == 0
    assert (storage.num_unanswered, written.done()) == (1, False)
    assert storage.abandon() == 1
    assert not written.result(0).any()
    assert not written.is_draining
    assert np.array_equal(inner.read(ALL), content(0))


def test_close_ends_everything(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.DELAY, FaultMode.NEVER]))
    delayed, unanswered = storage.submit_write(ALL, content(1), ALL), storage.submit_write(ALL, content(1), ALL)
    storage.close()
    assert delayed.result(PATIENCE_S).all()
    assert not unanswered.result(0).any()
    with pytest.raises(PoolClosed):
        storage.submit_read(ALL, content(1), ALL)
    with pytest.raises(PoolClosed):
        inner.read(ALL)


def test_call_that_is_released_after_the_inner_storage_closed_ends_with_the_error(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.DELAY]))
    delayed = storage.submit_write(ALL, content(1), ALL)
    inner.close()
    storage.release()
    with pytest.raises(PoolClosed):
        delayed.result(PATIENCE_S)


def test_read_and_write_raise_where_the_plan_fails(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan([FaultMode.FAIL, FaultMode.FAIL]))
    with pytest.raises(StorageError, match="could not read blocks"):
        storage.read(ALL)
    with pytest.raises(StorageError, match="could not write blocks"):
        storage.write(ALL, content(1))
    storage.write(ALL, content(1))
    assert np.array_equal(storage.read(ALL), content(1))


def test_checksums_are_those_of_the_wrapped_storage_and_addresses_are_hidden(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan())
    storage.checksums[3], storage.has_checksum[3] = 7, True
    assert (inner.checksums[3], inner.has_checksum[3]) == (7, True)
    assert not storage.capabilities.is_addressable
    with pytest.raises(StorageError, match="no addresses"):
        _ = storage.bound


def test_books_are_kept_by_the_wrapped_storage(inner: Storage) -> None:
    storage = FaultyStorage(inner, FaultPlan(rates={FaultMode.FAIL: 1.0}))
    hashes = np.arange(4, dtype=np.uint64).reshape(2, 2)
    storage.record(ALL[:2], hashes=hashes, checksums=np.array([4, 5], dtype=np.uint64))
    assert inner.checksums[:2].tolist() == [4, 5]
    assert storage.holds(ALL[:2], hashes).tolist() == inner.holds(ALL[:2], hashes).tolist()
    storage.touch(ALL[:2], hashes, np.zeros(2, dtype=np.uint8))
    storage.forget(hashes)
    storage.clear()
    assert [len(part) for part in storage.inventory()] == [0, 0, 0, 0]


def test_plan_follows_its_list_then_its_seed() -> None:
    def modes(plan: FaultPlan) -> list[str]:
        injections = [plan.choose(4, is_read=bool(i % 2)) for i in range(300)]
        return ["" if injection is None else injection.mode.value for injection in injections]

    rates = {FaultMode.FAIL: 0.2, FaultMode.FLIP: 0.3}
    plan = FaultPlan([FaultMode.NEVER, None, FaultMode.TEAR], rates=rates, seed=5)
    chosen = modes(plan)
    assert chosen[:3] == ["never", "", "tear"]
    assert chosen == modes(FaultPlan([FaultMode.NEVER, None, FaultMode.TEAR], rates=rates, seed=5))
    assert chosen != modes(FaultPlan([FaultMode.NEVER, None, FaultMode.TEAR], rates=rates, seed=6))
    assert 30 < chosen.count("fail") == plan.num_injected[FaultMode.FAIL] < 90
    assert 60 < chosen.count("flip") == plan.num_injected[FaultMode.FLIP] < 120
    assert plan.num_calls == 300


def test_plan_counts_only_the_calls_it_is_for() -> None:
    plan = FaultPlan([FaultMode.FAIL], on="write")
    assert plan.choose(4, is_read=True) is None
    assert plan.choose(0, is_read=False) is None
    plan.is_on = False
    assert plan.choose(4, is_read=False) is None
    plan.is_on = True
    assert plan.num_calls == 0
    assert plan.choose(4, is_read=False) is not None


@pytest.mark.parametrize(
    "wrong", [{"affects": "none"}, {"on": "never"}, {"rates": {"fail": -1}}, {"rates": {"fail": 0.7, "tear": 0.7}}]
)
def test_impossible_plans_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FaultPlan(**wrong)
