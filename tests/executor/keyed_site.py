"""What the tests of keyed storages under an executor share: memory over a store whose transfers end when told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toy_store import ToyStore

from kvbm._backend import Backend
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, JobResult, Transfer
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage, Storage
from kvbm.storage.device import DeviceStorage
from kvbm.types import HashArray, IdArray, Tier

PATIENCE_S = 60.0


def when_it_waits(monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Look at the moment when the executor asks to be told of a landing."""
    ask = Transfer.add_landed_callback

    def look_first(transfer: Transfer[Any], callback: Callable[[Transfer[Any]], None]) -> None:
        ask(transfer, callback)
        look()

    monkeypatch.setattr(Transfer, "add_landed_callback", look_first)


class Call:
    """A read or write that the store was asked for."""

    def __init__(self, kind: str, ids: IdArray, memory: Any, rows: IdArray, names: dict[str, Any]) -> None:
        self.kind = kind
        self.ids = np.array(ids)
        self.memory = memory
        self.rows = np.array(rows)
        self.hashes, self.checksums = names.get("hashes"), names.get("checksums")
        self.transfer: Transfer[Any] = Transfer()


class HeldStore(ToyStore):
    """Notes its calls; those made while `is_held` end when told."""

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__(layout, {})
        self.is_held = False
        self.calls: list[Call] = []
        self.disowned: list[tuple[list[int], list[list[int]]]] = []
        self.records: list[list[int]] = []
        self._changed = threading.Condition()

    def submit_read(self, block_ids: Any, memory: Any, rows: Any, **names: Any) -> Any:
        return self._take(Call("read", block_ids, memory, rows, names))

    def submit_write(self, block_ids: Any, memory: Any, rows: Any, **names: Any) -> Any:
        return self._take(Call("write", block_ids, memory, rows, names))

    def _take(self, call: Call) -> Transfer[Any]:
        if not self.is_held:
            self.end(call)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        return call.transfer

    def wait_for(self, num_calls: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= num_calls, PATIENCE_S)

    def end(self, call: Call, *, has_landed: bool = True) -> None:
        """Move the bytes of a call and end it."""
        submit = super().submit_read if call.kind == "read" else super().submit_write
        names = {"hashes": call.hashes}
        if call.kind == "write":
            names["checksums"] = np.zeros(len(call.ids), dtype=np.uint64) if call.checksums is None else call.checksums
        good = submit(call.ids, call.memory, call.rows, **names).result()
        call.transfer.set_result(good, has_landed=has_landed)

    def record(self, block_ids: IdArray, **fields: Any) -> None:
        super().record(block_ids, **fields)
        self.records.append(block_ids.tolist())

    def disown(self, block_ids: IdArray, hashes: HashArray) -> None:
        self.disowned.append((block_ids.tolist(), hashes.tolist()))
        super().disown(block_ids, hashes)

    def of_kind(self, kind: str) -> list[Call]:
        return [call for call in self.calls if call.kind == kind]


class KeyedSite:
    """An executor over memory and a store, every block of the host filled and named.

    Blocks of the store come to the host straight, to the device through the ring.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        num_blocks: int = 40,
        nbytes: int = 1 << 16,
        kind: str = "contiguous",
        **settings: Any,
    ) -> None:
        dimensions: dict[str, Any] = {
            "num_layers": 2, "outer_dim": 1, "block_size": 16, "inner_dim": nbytes // 32, "dtype": "uint8"
        }  # fmt: skip
        layout = BlockLayout.fully_contiguous(num_blocks=num_blocks, **dimensions)
        is_whole = kind == "contiguous"
        host = layout if is_whole else BlockLayout.layer_separate(num_blocks=num_blocks, block_first=True, **dimensions)
        self.ids = np.arange(num_blocks, dtype=np.int32)
        rng = np.random.default_rng(3)
        self.hashes = rng.integers(0, 2**63, (num_blocks, 2), dtype=np.uint64)
        self.data = rng.integers(0, 256, (num_blocks, nbytes), dtype=np.uint8)
        self.host = HostStorage(host, backend=backend)
        self.host.write(self.ids, self.data)
        self.device = DeviceStorage(host, backend=backend)
        self.store = HeldStore(layout)
        self.storages: dict[Tier, Storage] = {
            Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.REMOTE: self.store
        }  # fmt: skip
        self.executor = Executor(self.storages, backend=backend, copy_threads=1, **settings)
        self.results: list[JobResult] = []
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    @property
    def ring(self) -> Any:
        return self.executor._means.staging

    def job(self, source: Tier, destination: Tier, num_blocks: int, **fields: Any) -> CopyJob:
        fields.setdefault("is_urgent", source is Tier.REMOTE)
        ids = fields.pop("destination_ids", self.ids[:num_blocks])
        return CopyJob(
            job_id=1,
            source=source,
            destination=destination,
            source_ids=self.ids[:num_blocks],
            destination_ids=ids,
            hashes=self.hashes[:num_blocks],
            **fields,
        )

    def down(self, num_blocks: int) -> JobResult:
        return self.executor.execute(self.job(Tier.HOST, Tier.REMOTE, num_blocks))

    def up(self, num_blocks: int, to: Tier = Tier.HOST, deadline: float | None = None, **fields: Any) -> JobResult:
        return self.executor.execute(self.job(Tier.REMOTE, to, num_blocks, **fields), deadline)

    def fill_store(self, num_blocks: int) -> None:
        """Store blocks, and wipe the host."""
        result = self.down(num_blocks)
        assert not result.outcomes.any(), result.reason
        self.host.write(self.ids, np.zeros_like(self.data))
        self.store.calls.clear()

    def spoil(self, *places: int) -> None:
        """Turn one bit of stored blocks."""
        for place in places:
            data, checksum = self.store.objects[self.hashes[place].tobytes()]
            self.store.objects[self.hashes[place].tobytes()] = bytes([data[0] ^ 1]) + data[1:], checksum

    def begin(self, job: CopyJob, deadline: float | None = None) -> threading.Thread:
        """Execute a job in a thread of its own; what comes of it goes to `results` or `errors`."""

        def execute() -> None:
            try:
                self.results.append(self.executor.execute(job, deadline))
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=execute)
        thread.start()
        self._threads.append(thread)
        return thread

    def close(self) -> None:
        self.store.is_held = False
        for call in self.store.calls:
            call.transfer.set_result(np.zeros(len(call.ids), dtype=np.bool_))
            call.transfer.set_landed()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self.executor.close()
        for storage in self.storages.values():
            storage.close()
