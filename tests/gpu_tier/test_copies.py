"""Blocks arrive as they were, whatever the layouts, the direction and the path; checksums are compared and kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from gpu_site import KINDS, NUM_BLOCKS, PATIENCE_S, as_layout, ids, layout_of, names, on_gpu, on_host, random_bytes
from hypothesis import given
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.errors import ConfigError, HashFormatError, LayoutError, PoolClosed
from kvbm.gpu import DeviceMemory, PinnedMemory, find_gpu
from kvbm.gpu.runtime import forget_gpus
from kvbm.gpu.segments import lies_in_one, parts_in_one
from kvbm.storage import CudaStorage, DeviceStorage, HostStorage
from kvbm.testing.simulated_gpu import SimulatedGpu
from kvbm.transfer import GpuTransferEngine, PathTable, TransferEngine, submit_layers
from kvbm.transfer.choose import DIRECTIONS, PATHS, Cell, Shape, choose_path
from kvbm.transfer.routes import Route

FROM, TO = ids(6, 1, 2, 5), ids(0, 7, 3, 4)


def table(path: str) -> PathTable:
    """Give a table that knows one path."""
    return PathTable(tuple(Cell(direction, 0, 1, (path,)) for direction in DIRECTIONS))


def make(simulated: SimulatedGpu, where: str, kind: str, backend: Backend | None = None) -> Any:
    if where == "gpu":
        return on_gpu(simulated.gpu, kind)
    return HostStorage(layout_of(kind), gpu=simulated.gpu if where == "pinned" else None, backend=backend)


@pytest.mark.parametrize("ends", ["gpu-pinned", "pinned-gpu", "gpu-gpu", "gpu-plain", "plain-gpu", "pinned-plain"])
@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("destination_kind", KINDS)
def test_blocks_arrive_as_they_were(
    simulated: SimulatedGpu, backend: Backend, ends: str, source_kind: str, destination_kind: str
) -> None:
    here, there = ends.split("-")
    source = make(simulated, here, source_kind, backend)
    destination = make(simulated, there, destination_kind, backend)
    data, before = random_bytes(source.layout, 4), random_bytes(destination.layout, NUM_BLOCKS, 2)
    source.write(FROM, data)
    destination.write(np.arange(NUM_BLOCKS, dtype=np.int32), before)
    with GpuTransferEngine(simulated.gpu) as engine:
        result = engine.copy(source, destination, FROM, TO, hashes=names(4)).result(PATIENCE_S)
        assert result.good.all()
        assert result.nbytes == 4 * source.layout.block_nbytes
        arrived = as_layout(data, source.layout, destination.layout)
        assert (destination.read(TO) == arrived).all()
        others = ids(1, 2, 5, 6)
        assert (destination.read(others) == before[others]).all()
        if destination.keeps_checksums:
            with HostStorage(destination.layout, backend=backend) as twin, TransferEngine(backend=backend) as plain:
                twin.write(TO, arrived)
                expected = plain.compute_checksums(twin, TO, names(4))
            assert destination.has_checksum[TO].all()
            assert (destination.checksums[TO] == expected).all()
    source.close()
    destination.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ends", ["gpu-pinned", "pinned-gpu", "gpu-gpu"])
@pytest.mark.parametrize("kinds", [("contiguous", "outer_first"), ("outer_first", "contiguous"), ("block_first",) * 2])
def test_every_path_moves_the_same_bytes(simulated: SimulatedGpu, path: str, ends: str, kinds: tuple[str, str]) -> None:
    here, there = ends.split("-")
    source, destination = make(simulated, here, kinds[0]), make(simulated, there, kinds[1])
    data = random_bytes(source.layout, 4)
    source.write(FROM, data)
    # A staging of little more than a block: the submission is cut, and its parts follow each other through it.
    with GpuTransferEngine(simulated.gpu, table=table(path), staging_nbytes=source.layout.block_nbytes + 1) as engine:
        assert engine.copy(source, destination, FROM, TO, hashes=names(4)).result(PATIENCE_S).good.all()
        assert (destination.read(TO) == data).all()
    source.close()
    destination.close()


def test_expected_path_is_taken(simulated: SimulatedGpu) -> None:
    source, destination = on_gpu(simulated.gpu, "outer_first"), on_host(simulated.gpu)
    source.write(FROM, random_bytes(source.layout, 4))
    for path, kinds in (("kernel", {"kernel"}), ("memcpy", {"memcpy", "memcpy2d", "memcpy3d"}), ("batch", {"batch"})):
        before = len(simulated.operations())
        with GpuTransferEngine(simulated.gpu, table=table(path)) as engine:
            engine.copy(source, destination, FROM, TO).result(PATIENCE_S)
        ran = {operation[0].partition(":")[0] for operation in simulated.operations()[before:]}
        assert ran & {"kernel", "memcpy2d", "memcpy3d", "batch"} & kinds or path == "memcpy", (path, ran)
        assert not (path == "memcpy" and ran & {"kernel", "batch"})
    source.close()
    destination.close()


@pytest.mark.parametrize("kind", ["contiguous", "head_major"])
def test_block_that_does_not_match_its_checksum_is_found(simulated: SimulatedGpu, kind: str) -> None:
    host, gpu = on_host(simulated.gpu), on_gpu(simulated.gpu, kind)
    data = random_bytes(gpu.layout, 4)
    gpu.write(FROM, data)
    with GpuTransferEngine(simulated.gpu) as engine:
        assert engine.copy(gpu, host, FROM, TO, hashes=names(4)).result(PATIENCE_S).good.all()
        host.buffers[0][TO[2] * host.layout.strides.block + 40] ^= 1
        good = engine.copy(host, gpu, TO, FROM, hashes=names(4)).result(PATIENCE_S).good
        assert good.tolist() == [True, True, False, True]
        wrong_names = engine.copy(host, gpu, TO, FROM, hashes=names(4, 50)).result(PATIENCE_S).good
        assert not wrong_names.any()
    host.close()
    gpu.close()


def test_checksums_on_the_device_are_the_cpus(simulated: SimulatedGpu, backend: Backend) -> None:
    for kind in KINDS:
        layout = layout_of(kind, inner_dim=24 * 31, block_size=5)  # a block of many chunks, the last one ragged
        data = random_bytes(layout, 4)
        with HostStorage(layout, backend=backend) as twin, TransferEngine(backend=backend) as plain:
            twin.write(FROM, data)
            expected = plain.compute_checksums(twin, FROM, names(4))
        with CudaStorage(layout, gpu=simulated.gpu) as storage, GpuTransferEngine(simulated.gpu) as engine:
            storage.write(FROM, data)
            assert (engine.compute_checksums(storage, FROM, names(4)) == expected).all()


def test_nothing_is_no_work(simulated: SimulatedGpu) -> None:
    with on_gpu(simulated.gpu) as source, on_host(simulated.gpu) as destination:
        with GpuTransferEngine(simulated.gpu) as engine:
            assert engine.copy(source, destination, ids(), ids(), hashes=names(0)).result(0).num_blocks == 0
            assert len(engine.compute_checksums(source, ids(), names(0))) == 0


def test_wrong_arguments_are_refused_before_a_byte_moves(simulated: SimulatedGpu) -> None:
    with on_gpu(simulated.gpu) as gpu, on_host(simulated.gpu) as host, on_host(None) as other:
        engine = GpuTransferEngine(simulated.gpu)
        with pytest.raises(LayoutError, match="is outside 0"):
            engine.copy(gpu, host, ids(8), ids(0))
        with pytest.raises(LayoutError, match="is given twice"):
            engine.copy(gpu, host, ids(1, 2), ids(0, 0))
        with pytest.raises(HashFormatError, match="hashes has 1 entries, need 2"):
            engine.copy(gpu, host, ids(1, 2), ids(0, 1), hashes=names(1))
        with pytest.raises(ConfigError, match="is no stream"):
            engine.copy(gpu, host, ids(1), ids(0), then=["x"])
        with pytest.raises(ConfigError, match="neither storage is on one"):
            engine.copy(host, other, ids(1), ids(0), wait_for=[None])
        engine.close()
        engine.close()
        with pytest.raises(PoolClosed):
            engine.copy(gpu, host, ids(1), ids(0))


@pytest.mark.parametrize("is_by_layers", [False, True])
def test_storages_that_are_closed_while_a_copy_is_planned_keep_their_memory(
    stepped: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, is_by_layers: bool
) -> None:
    source: Any = on_gpu(stepped.gpu, streams=())
    destination: Any = on_host(stepped.gpu)
    memory = weakref.ref(source.owners[0]), weakref.ref(destination.pinned._owner)

    def plan(*arguments: Any) -> Any:
        planned = plan_route(*arguments)
        source.close()
        destination.close()
        gc.collect()
        return planned

    plan_route = Route.plan
    monkeypatch.setattr(Route, "plan", plan)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    if is_by_layers:
        layers = submit_layers(engine, source, destination, ids(3), ids(2), when_written=True)
        for layer in range(3):
            layers.layer_written(layer)
            stepped.run()
            engine.settle()
            gc.collect()
            assert [owner() is None for owner in memory] == [False, False]
        transfer, layers = layers.transfer, None
    else:
        transfer = engine.copy(source, destination, ids(3), ids(2))
        assert [owner() is None for owner in memory] == [False, False]
        stepped.run()
        engine.settle()
    assert transfer.result(0).num_blocks == 1
    gc.collect()
    assert [owner() is None for owner in memory] == [True, True]
    engine.close()


def test_storage_on_another_gpu_is_refused(simulated: SimulatedGpu) -> None:
    simulated.gpu.module.simulation.set_num_devices(2)
    forget_gpus()
    other = find_gpu("simulated", index=1)
    assert other is not None
    with on_gpu(other) as source, on_host(simulated.gpu) as destination, GpuTransferEngine(simulated.gpu) as engine:
        with pytest.raises(LayoutError, match="lies on another GPU than this engine moves for"):
            engine.copy(source, destination, ids(0), ids(0))
    with on_gpu(other) as source, on_host(other) as destination, GpuTransferEngine(other) as engine:
        data = random_bytes(source.layout, 4)
        source.write(FROM, data)
        assert engine.copy(source, destination, FROM, TO, hashes=names(4)).result(PATIENCE_S).good.all()
        assert (destination.read(TO) == data).all()


def test_storages_may_be_closed_while_their_blocks_move(stepped: SimulatedGpu) -> None:
    source: Any = on_gpu(stepped.gpu)
    destination: Any = on_host(stepped.gpu)
    memory = weakref.ref(source.owners[0]), weakref.ref(destination.pinned._owner)
    engine = GpuTransferEngine(stepped.gpu, has_threads=False)
    stepped.gpu.device.write(source.address(3, 0, 0), np.full(source.layout.block_nbytes, 9, np.uint8))
    transfer = engine.copy(source, destination, ids(3), ids(2))
    destination.close()
    source.close()
    del source, destination
    gc.collect()
    assert [owner() is None for owner in memory] == [False, False]
    stepped.run()
    assert engine.settle() == 1
    assert transfer.result(0).num_blocks == 1
    gc.collect()
    assert [owner() is None for owner in memory] == [True, True]
    engine.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["contiguous", "block_first", "outer_first"])
@pytest.mark.parametrize("is_down", [False, True])
def test_copies_stay_within_what_was_pinned_at_once(
    simulated: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, is_down: bool
) -> None:
    """Blocks that lie side by side, on either side of the border between two slices."""
    defaults = PinnedMemory.__init__.__kwdefaults__
    monkeypatch.setattr(PinnedMemory.__init__, "__kwdefaults__", {**defaults, "slice_nbytes": 4096 * 7})
    layout = layout_of(kind, block_size=64, inner_dim=192)
    host, gpu = HostStorage(layout, gpu=simulated.gpu), CudaStorage(layout, gpu=simulated.gpu)
    source, destination = (gpu, host) if is_down else (host, gpu)
    data = random_bytes(layout, NUM_BLOCKS)
    blocks = np.arange(NUM_BLOCKS, dtype=np.int32)
    source.write(blocks, data)
    with GpuTransferEngine(simulated.gpu, table=table(path)) as engine:
        assert engine.copy(source, destination, blocks, blocks, hashes=names(NUM_BLOCKS)).result(PATIENCE_S).good.all()
        assert (destination.read(blocks) == data).all()
        twin = HostStorage(layout)
        twin.write(blocks, data)
        if is_down:
            with TransferEngine() as plain:
                expected = plain.compute_checksums(twin, blocks, names(NUM_BLOCKS))
            assert (host.checksums == expected).all()
    for storage in (host, gpu, twin):
        storage.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["block_first", "outer_first"])
@pytest.mark.parametrize("is_down", [False, True])
def test_no_plain_copy_crosses_from_one_tensor_to_the_next(
    simulated: SimulatedGpu, path: str, kind: str, is_down: bool
) -> None:
    """Layers of an engine at one pitch, side by side, as if each were an allocation of its own."""
    layout = layout_of(kind, 2)
    memory = DeviceMemory(simulated.gpu, layout.num_buffers * layout.buffer_nbytes)
    starts = [memory.address + i * layout.buffer_nbytes for i in range(layout.num_buffers)]
    tensors = [Bytes(start, layout.buffer_nbytes) for start in starts]
    gpu, host = CudaStorage(layout, gpu=simulated.gpu, buffers=tensors), on_host(simulated.gpu, "contiguous", 2)
    source, destination = (gpu, host) if is_down else (host, gpu)
    data, blocks = random_bytes(layout, 2), ids(0, 1)
    source.write(blocks, data)
    before = len(simulated.operations())
    with GpuTransferEngine(simulated.gpu, table=table(path)) as engine:
        assert engine.copy(source, destination, blocks, blocks, hashes=names(2)).result(PATIENCE_S).good.all()
    for name, _, nbytes, *addresses in simulated.operations()[before:]:
        if name.startswith("memcpy") and path == "memcpy" and memory.address <= addresses[not is_down]:
            assert nbytes <= layout.buffer_nbytes, "a copy spans tensors"
    if path == "batch":
        assert sum(name == "batch" for name, *_ in simulated.operations()[before:]) == layout.num_buffers
    assert (destination.read(blocks) == data).all()
    gpu.close()
    host.close()


class Bytes:
    """A tensor of bytes."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}


@given(
    blocks=st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True),
    pieces=st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True),
    starts=st.tuples(*[st.lists(st.integers(0, 130), max_size=5, unique=True).map(sorted)] * 2),
)
def test_parts_cover_every_piece_once_and_cross_no_border(
    blocks: list[int], pieces: list[int], starts: tuple[list[int], list[int]]
) -> None:
    here, there = (np.array(side, dtype=np.uint64) for side in starts)
    own = np.array(blocks, dtype=np.uint64), np.array(pieces, dtype=np.uint64)
    seen = []
    for rows, columns in parts_in_one((*own, here), (*own, there)):
        for borders in (here, there):
            places = [blocks[row] + pieces[column] for row in rows.tolist() for column in columns.tolist()]
            assert len({sum(start <= place for start in borders.tolist()) for place in places}) == 1
            assert lies_in_one(own[0][rows], own[1][columns], borders)
        seen += [(row, column) for row in rows.tolist() for column in columns.tolist()]
    assert sorted(seen) == [(row, column) for row in range(len(blocks)) for column in range(len(pieces))]


def test_one_allocation_is_one_part() -> None:
    blocks, pieces = np.arange(3, dtype=np.uint64), np.arange(4, dtype=np.uint64)
    nowhere = np.empty(0, dtype=np.uint64)
    ((rows, columns),) = parts_in_one((blocks, pieces, nowhere), (blocks, pieces, nowhere))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2], [0, 1, 2, 3])


def test_plain_memory_where_pinning_failed_still_works(simulated: SimulatedGpu) -> None:
    simulated.fail_call("cudaHostRegister", 2)
    with on_gpu(simulated.gpu) as gpu, on_host(simulated.gpu) as host, GpuTransferEngine(simulated.gpu) as engine:
        assert not host.wait_pinned(ids(0))
        data = random_bytes(gpu.layout, 4)
        gpu.write(FROM, data)
        assert engine.copy(gpu, host, FROM, TO, hashes=names(4)).result(PATIENCE_S).good.all()
        assert (host.read(TO) == data).all()


def test_stand_in_for_the_gpu_is_copied_by_the_host(simulated: SimulatedGpu) -> None:
    with DeviceStorage(layout_of("contiguous")) as stand_in, on_host(simulated.gpu) as host:
        with GpuTransferEngine(simulated.gpu) as engine:
            data = random_bytes(stand_in.layout, 4)
            stand_in.write(FROM, data)
            engine.copy(stand_in, host, FROM, TO).result(PATIENCE_S)
            assert (host.read(TO) == data).all()


# -- the choice ------------------------------------------------------------------------------------------------


class Able:
    has_batch_copy = True
    can_map_host = True


class Old(Able):
    has_batch_copy = False


class Unmapped(Old):
    can_map_host = False


KIB = 1 << 10


@pytest.mark.parametrize(
    ("shape", "device", "is_pinned", "path"),
    [
        (Shape("up", 64 << 20, 1, 64 << 20), Able, True, "memcpy"),
        (Shape("up", KIB << 10, 64, KIB << 10), Able, True, "batch"),
        (Shape("up", KIB << 10, 64, KIB << 10), Old, True, "memcpy"),
        (Shape("up", 16 * KIB, 4096, 1 << 20), Able, True, "staged"),
        (Shape("up", 16 * KIB, 4096, 16 * KIB), Able, True, "kernel"),
        (Shape("up", 16 * KIB, 4096, 16 * KIB), Unmapped, True, "memcpy"),
        (Shape("down", 16 * KIB, 4096, 1 << 20), Able, True, "kernel"),
        (Shape("down", 16 * KIB, 4096, 1 << 20), Able, False, "memcpy"),
        (Shape("across", 4 * KIB, 4096, 4 * KIB), Unmapped, True, "kernel"),
    ],
)
def test_built_in_table_chooses(shape: Shape, device: Any, is_pinned: bool, path: str) -> None:
    assert choose_path(PathTable.built_in(), shape, device=device, is_pinned=is_pinned) == path


def test_nearest_cell_below_decides() -> None:
    cells = (Cell("up", 0, 1, ("memcpy",)), Cell("up", 100, 1, ("batch",)), Cell("up", 100, 10, ("kernel",)))
    ranking = PathTable(cells).ranking
    assert [ranking(Shape("up", n, m, n))[0] for n, m in ((99, 99), (100, 9), (100, 10), (5000, 1))] == [
        "memcpy",
        "batch",
        "kernel",
        "batch",
    ]
    assert set(ranking(Shape("down", 1, 1, 1))) == set(PATHS)


def test_cell_of_an_unknown_path_is_refused() -> None:
    for cell in (Cell("up", 0, 1, ("teleport",)), Cell("sideways", 0, 1, ("memcpy",)), Cell("up", 0, 1, ())):
        with pytest.raises(ConfigError, match="is no cell"):
            PathTable((cell,))
