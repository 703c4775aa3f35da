"""Storages and transfers between them, on both twins."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.errors import LayoutError, PoolClosed, TransferError
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.storage import DeviceStorage, HostStorage, Storage
from kvbm.testing.storages import StorageTests
from kvbm.transfer import TransferEngine

DIMS: dict[str, Any] = {
    "num_blocks": 6,
    "num_layers": 2,
    "outer_dim": 2,
    "block_size": 4,
    "inner_dim": 6,
    "dtype": "uint16",
    "num_heads": 3,
}
LAYOUTS = {
    "contiguous": BlockLayout.fully_contiguous(**DIMS, alignment=64),
    "block_first": BlockLayout.layer_separate(**DIMS, block_first=True),
    "outer_first": BlockLayout.layer_separate(**DIMS, block_first=False, alignment=64),
    "head_major": BlockLayout.custom(**DIMS, strides={"block": 200, "layer": 96, "outer": 48, "head": 16, "token": 4}),
}


class TestHostStorage(StorageTests):
    @pytest.fixture(autouse=True, params=list(LAYOUTS))
    def _use(self, request: pytest.FixtureRequest, backend: Backend) -> None:
        self.layout, self.backend = LAYOUTS[request.param], backend

    def make_storage(self) -> Storage:
        return HostStorage(self.layout, backend=self.backend)


class TestDeviceStorage(TestHostStorage):
    def make_storage(self) -> Storage:
        return DeviceStorage(self.layout, backend=self.backend)


def test_buffers_of_somebody_else_are_shared(backend: Backend) -> None:
    layout = LAYOUTS["block_first"]
    buffers = [bytearray(layout.buffer_nbytes) for _ in range(2)]
    with HostStorage(layout, buffers=buffers, backend=backend) as storage:
        storage.write(np.array([5], dtype=np.int32), np.full((1, layout.block_nbytes), 7, dtype=np.uint8))
    assert [buffer.count(7) for buffer in buffers] == [96, 96]
    with pytest.raises(LayoutError, match="buffer 0 must be writable"):
        HostStorage(layout, buffers=[bytes(layout.buffer_nbytes)] * 2, backend=backend)
    with pytest.raises(LayoutError, match="the layout needs"):
        HostStorage(layout, buffers=[bytearray(3)] * 2, backend=backend)


@pytest.mark.parametrize("source", ["contiguous", "block_first", "outer_first"])
@pytest.mark.parametrize("destination", ["contiguous", "block_first", "outer_first"])
@pytest.mark.parametrize("small_nbytes", [0, 1 << 20])
def test_transfers_copy_and_verify(backend: Backend, source: str, destination: str, small_nbytes: int) -> None:
    hashes = np.arange(6, dtype=np.uint64).reshape(3, 2)
    here, there = (HostStorage(LAYOUTS[kind], backend=backend) for kind in (source, destination))
    back = HostStorage(LAYOUTS["contiguous"], backend=backend)
    from_ids, to_ids = np.array([5, 0, 2], dtype=np.int32), np.array([1, 2, 4], dtype=np.int32)
    data = np.random.default_rng(0).integers(0, 256, (3, 192), dtype=np.uint8)
    here.write(from_ids, data)
    with TransferEngine(small_nbytes=small_nbytes, backend=backend) as engine:
        down = engine.copy(here, there, from_ids, to_ids, hashes=hashes).result(60)
        assert (down.num_blocks, down.nbytes, down.good.all()) == (3, 3 * 192, True)
        assert np.array_equal(there.read(to_ids), data)
        assert there.has_checksum[to_ids].all()
        there.open_buffer(0)[there.bound.layout.offset(2, 0, 0)[1]] ^= 1  # one bit of block 2
        up = engine.copy(there, back, to_ids, from_ids, hashes=hashes).result(60)
        assert up.good.tolist() == [True, False, True]
        assert back.has_checksum[from_ids].tolist() == [True, False, True]
        wrong_name = engine.copy(there, back, to_ids, from_ids, hashes=hashes[::-1].copy()).result(60)
        assert wrong_name.good.tolist() == [False, False, False]


def test_failed_transfer_is_kept_and_the_engine_goes_on(backend: Backend) -> None:
    here, there = (HostStorage(LAYOUTS["contiguous"], backend=backend) for _ in range(2))
    engine = TransferEngine(small_nbytes=0, backend=backend)
    zero = np.array([0], dtype=np.int32)
    there.has_checksum = None  # type: ignore[assignment]  # a fault inside the worker
    failed = engine.copy(here, there, zero, zero)
    with pytest.raises(TransferError, match="the copy of 1 blocks failed"):
        failed.result(60)
    there.has_checksum = np.zeros(6, dtype=np.bool_)
    assert engine.copy(here, there, zero, zero).result(60).num_blocks == 1
    engine.close()
    engine.close()
    with pytest.raises(PoolClosed):
        engine.copy(here, there, zero, zero)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-transfer"]


def test_permuting_copy_verifies_the_source_and_computes_the_target_anew(backend: Backend) -> None:
    hashes = np.array([[3, 4]], dtype=np.uint64)
    here, there, back = (
        HostStorage(LAYOUTS[kind], backend=backend) for kind in ("contiguous", "head_major", "contiguous")
    )
    zero = np.array([0], dtype=np.int32)
    data = np.random.default_rng(2).integers(0, 256, (1, 192), dtype=np.uint8)
    here.write(zero, data)
    with TransferEngine(backend=backend) as engine:
        for source, destination in ((here, there), (there, back)):
            assert engine.copy(source, destination, zero, zero, hashes=hashes).result(60).good.all()
        assert there.checksums[0] != back.checksums[0], "each order of tokens and heads has its own"
        assert np.array_equal(back.read(zero), data)
        there.open_buffer(0)[5] ^= 1
        assert not engine.copy(there, back, zero, zero, hashes=hashes).result(60).good.any()


def test_closing_finishes_what_was_submitted(backend: Backend) -> None:
    here, there = (HostStorage(LAYOUTS["contiguous"], backend=backend) for _ in range(2))
    engine = TransferEngine(small_nbytes=0, backend=backend)
    transfers: list[Transfer[Any]] = [
        engine.copy(here, there, np.array([i], dtype=np.int32), np.array([i], dtype=np.int32)) for i in range(6)
    ]
    engine.close()
    assert all(transfer.done() for transfer in transfers)
