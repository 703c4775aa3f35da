"""Arrays of other packages are adopted as they lie; blocks are shown to them; nothing dies too early."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from gpu_site import KINDS, ids, layout_of, on_gpu, random_bytes

from kvbm.errors import LayoutError, StorageError
from kvbm.gpu import DeviceMemory, region_of
from kvbm.gpu.dlpack import _shown, make_dlpack, read_dlpack
from kvbm.storage import CudaStorage, CudaStorageBytes
from kvbm.testing.simulated_gpu import SimulatedGpu


class Array:
    """A CUDA array as CuPy shows one."""

    def __init__(self, address: int, shape: tuple[int, ...], **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "<f2",
            "shape": shape,
            "data": (address, False),
            **changes,
        }


class Capsules:
    """Memory behind DLPack, of either form."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0), *, is_old: bool = False) -> None:
        self._array = array
        self._device = device
        self._is_old = is_old

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        assert stream == (-1 if self._device[0] == 2 else None)
        a = self._array
        return make_dlpack(
            a.ctypes.data,
            a.shape,
            a.strides,
            a.dtype,
            device=self._device,
            owner=a,
            is_read_only=not a.flags.writeable,
            max_version=None if self._is_old else max_version,
        )


class Nameless(Capsules):
    """A torch tensor of 8-bit floats: its interface has no name for them."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise KeyError("torch.float8_e4m3fn")


class BeforeOne(Capsules):
    """A producer that does not know `max_version`."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return super().__dlpack__(stream=stream)


def test_cuda_array_interface_is_read_as_it_stands() -> None:
    dense = region_of(Array(4096, (2, 3)))
    assert (dense.address, dense.strides, dense.itemsize, dense.extent_nbytes) == (4096, (6, 2), 2, 12)
    assert (dense.kind, dense.is_read_only, dense.stream) == ("device", False, None)
    wide = region_of(Array(4096, (2, 3), strides=(512, 2), data=(4096, True), stream=7))
    assert (wide.strides, wide.extent_nbytes, wide.is_read_only, wide.stream) == ((512, 2), 518, True, 7)
    assert region_of(Array(0, (0, 3))).extent_nbytes == 0


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (Array(1, (2,), mask=object()), "with a mask cannot hold blocks"),
        (Array(1, (2,), stream=0), "names stream 0, which is ambiguous"),
        (Array(1, (2, 2), strides=(-4, 2)), "run backwards"),
        (Array(1, (2,), typestr="?!"), "is incomplete"),
        (Capsules(np.zeros(3), (7, 0)), "DLPack device type 7; known are 1"),
        (object(), "shows neither __cuda_array_interface__ nor DLPack"),
    ],
)
def test_what_cannot_hold_blocks_is_refused(array: Any, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        region_of(array)


@pytest.mark.parametrize("kind", [Capsules, BeforeOne])
@pytest.mark.parametrize(("device", "name"), [((1, 0), "host"), ((2, 3), "device"), ((3, 0), "pinned")])
def test_dlpack_of_host_cuda_and_pinned_memory_is_adopted(kind: Any, device: tuple[int, int], name: str) -> None:
    array = np.arange(24, dtype=np.uint16).reshape(4, 6)[:, :3]
    region = region_of(kind(array, device))
    assert (region.address, region.shape, region.strides) == (array.ctypes.data, (4, 3), (12, 2))
    assert (region.kind, region.itemsize, region.extent_nbytes) == (name, 2, 42)
    assert region.device_index == (3 if name == "device" else None)


def test_array_whose_interface_has_no_name_for_its_elements_is_adopted_by_dlpack() -> None:
    data = np.arange(6, dtype=np.uint8).reshape(2, 3)
    region = region_of(Nameless(data, (2, 0)))
    assert (region.address, region.shape, region.itemsize, region.kind) == (data.ctypes.data, (2, 3), 1, "device")


def test_read_only_memory_is_known_from_the_versioned_form() -> None:
    array = np.zeros(4)
    array.flags.writeable = False
    assert region_of(Capsules(array)).is_read_only
    with pytest.raises(BufferError, match=r"DLPack before 1\.0 cannot say"):
        region_of(Capsules(array, is_old=True))


@pytest.mark.parametrize("is_old", [False, True])
def test_region_keeps_the_memory_alive_and_lets_it_go(is_old: bool) -> None:
    class Owned(np.ndarray):
        pass

    array = np.zeros(64, dtype=np.uint8).view(Owned)
    is_alive = weakref.ref(array)
    before = len(_shown)
    region: Any = region_of(Capsules(array, is_old=is_old))
    del array
    gc.collect()
    assert is_alive() is not None
    assert len(_shown) == before + 1
    del region
    gc.collect()
    assert is_alive() is None
    assert len(_shown) == before


@pytest.mark.parametrize("is_old", [False, True])
def test_capsule_lives_as_long_as_its_consumer(is_old: bool) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    before = len(_shown)

    class Producer(Capsules):
        def __dlpack__(self, **kwargs: Any) -> Any:
            kwargs = {key: value for key, value in kwargs.items() if key in ("stream", "max_version")}
            return super().__dlpack__(**kwargs)

    taken = np.from_dlpack(Producer(array, is_old=is_old))
    assert (taken == array).all()
    array[1, 2] = 99
    assert taken[1, 2] == 99
    assert len(_shown) == before + 1
    part = taken[1:]
    del taken
    gc.collect()
    assert len(_shown) == before + 1
    del part
    gc.collect()
    assert len(_shown) == before


def test_capsule_that_nobody_takes_gives_its_memory_back() -> None:
    before = len(_shown)
    for max_version in (None, (1, 0)):
        array = np.zeros(3)
        capsule = make_dlpack(
            array.ctypes.data, (3,), (8,), array.dtype, device=(1, 0), owner=array, max_version=max_version
        )
        assert len(_shown) == before + 1
        del capsule
        assert len(_shown) == before


def test_torch_tensor_is_adopted_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)[:, :3]
    region = region_of(tensor)
    assert (region.address, region.shape, region.strides) == (tensor.data_ptr(), (4, 3), (12, 2))
    assert (region.kind, region.itemsize) == ("host", 2)


# -- blocks in somebody else's memory, and shown to somebody else ------------------------------------------------


def test_storage_takes_an_engines_regions_and_never_frees_them(simulated: SimulatedGpu) -> None:
    layout = layout_of("block_first")
    memories = [DeviceMemory(simulated.gpu, layout.buffer_nbytes) for _ in range(layout.num_buffers)]
    tensors = [Array(memory.address, (layout.buffer_nbytes,), typestr="|u1") for memory in memories]
    data = random_bytes(layout, 3)
    with CudaStorage(layout, gpu=simulated.gpu, buffers=tensors) as storage:
        assert storage.bound.addresses == tuple(memory.address for memory in memories)
        storage.write(ids(6, 0, 3), data)
        assert (storage.read(ids(0, 3, 6)) == data[[1, 2, 0]]).all()
    with CudaStorage(layout, gpu=simulated.gpu, buffers=tensors) as storage:
        assert (storage.read(ids(6, 0, 3)) == data).all()


def test_storage_refuses_memory_that_is_not_the_devices(simulated: SimulatedGpu) -> None:
    layout = layout_of("contiguous")
    memory = DeviceMemory(simulated.gpu, layout.buffer_nbytes)
    host = np.zeros(layout.buffer_nbytes, dtype=np.uint8)
    shape = (layout.buffer_nbytes,)
    for buffer, text in (
        (host, "buffer 0 lies in host memory"),
        (Array(host.ctypes.data, shape, typestr="|u1"), "buffer 0 lies in device memory, give one on"),
        (Array(memory.address, shape, typestr="|u1", data=(memory.address, True)), "buffer 0 is read-only"),
        (Array(memory.address, (layout.extent_nbytes - 1,), typestr="|u1"), "the layout needs"),
    ):
        with pytest.raises(LayoutError, match=text):
            CudaStorage(layout, gpu=simulated.gpu, buffers=[buffer])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_views_show_where_a_layer_lies(simulated: SimulatedGpu, kind: str) -> None:
    with on_gpu(simulated.gpu, kind) as storage:
        data = random_bytes(storage.layout, 1)
        storage.write(ids(5), data)
        view = CudaStorageBytes(storage).layer(5, 1, writable=True)
        layer_nbytes = storage.layout.outer_dim * storage.layout.region_nbytes
        assert view.shape == (2, 4, 24)
        assert view.tobytes() == data[0, layer_nbytes : 2 * layer_nbytes].tobytes()
        interface = view.__cuda_array_interface__
        assert interface["data"] == (storage.address(5, 1, 0), False)
        assert region_of(view).strides == view.strides
        tensor = read_dlpack(_OnlyDlpack(view))
        assert (tensor.address, tensor.shape, tensor.strides) == (storage.address(5, 1, 0), view.shape, view.strides)
        assert tensor.device == (2, 0)
        view.assign(bytes(layer_nbytes), dtype="uint8")
        data[0, layer_nbytes : 2 * layer_nbytes] = 0
        assert (storage.read(ids(5)) == data).all()


class _OnlyDlpack:
    def __init__(self, view: Any) -> None:
        self.__dlpack__ = view.__dlpack__
        self.__dlpack_device__ = view.__dlpack_device__


def test_view_of_gpu_memory_refuses_numpy_and_names_the_way(simulated: SimulatedGpu) -> None:
    with on_gpu(simulated.gpu) as storage:
        view = CudaStorageBytes(storage).layer(0, 0, writable=False)
        with pytest.raises(StorageError, match=r"torch\.from_dlpack"):
            view.numpy()
        with pytest.raises(BufferError, match="read-only"):
            view.__dlpack__(stream=None)
        assert view.__cuda_array_interface__["data"][1] is True
        with pytest.raises(BufferError, match="without a copy"):
            view.__dlpack__(max_version=(1, 0), copy=True)
        with pytest.raises(LayoutError, match="takes 192 bytes, got 3"):
            view.assign(b"abc", dtype="uint8")


def test_exported_memory_outlives_its_storage(simulated: SimulatedGpu) -> None:
    storage = on_gpu(simulated.gpu)
    memory = weakref.ref(storage.owners[0])
    view: Any = CudaStorageBytes(storage).layer(0, 0, writable=True)
    capsule = view.__dlpack__(max_version=(1, 0))
    storage.close()
    del view, storage
    gc.collect()
    assert memory() is not None
    del capsule
    gc.collect()
    assert memory() is None
