"""Windows onto blocks share memory with whoever looks through them (CONFORMANCE 22)."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.config import LAYOUTS
from kvbm.errors import BlockStateError, ConfigError, LayoutError
from kvbm.manager import BlockManager

pytestmark = pytest.mark.usefixtures("cpu_device")  # views of GPU memory: tests/gpu_tier/test_arrays.py

DIMS: dict[str, Any] = {"num_layers": 3, "page_size": 4, "inner_dim": 6, "dtype": "float32", "device_blocks": 4}


@pytest.fixture(params=LAYOUTS)
def manager(request: pytest.FixtureRequest, backend: Backend) -> Any:
    with BlockManager(**DIMS, layout=request.param, backend=backend) as manager:
        yield manager


def test_views_have_the_promised_shapes_and_share_memory(manager: BlockManager) -> None:
    fresh = manager.allocate_blocks(2)
    layer = fresh[1].layer(2)
    assert layer.shape == (2, 4, 6)
    assert layer.dtype == np.float32
    layer.numpy()[...] = np.arange(48).reshape(2, 4, 6)
    assert fresh[1].layer_view(2, 1).shape == (4, 6)
    assert np.array_equal(fresh[1].layer_view(2, 1).numpy(), np.arange(24, 48).reshape(4, 6))
    assert not fresh[0].layer(2).numpy().any()
    assert np.array_equal(np.from_dlpack(fresh[1].layer(2)), layer.numpy())
    np.asarray(fresh[1].layer(2))[0, 0, 0] = 77
    assert layer.numpy()[0, 0, 0] == 77
    stored = manager.storage("device").read(fresh.block_ids[1:]).view(np.float32).reshape(3, 2, 4, 6)
    assert np.array_equal(stored[2], layer.numpy())


def test_whole_blocks_are_shown_where_they_are_in_one_piece(manager: BlockManager) -> None:
    fresh = manager.allocate_blocks(1)
    if manager.layout.has_layer_buffers:
        with pytest.raises(LayoutError, match=r"not in one piece: use \.layer\(i\)"):
            fresh[0].numpy()
        return
    assert fresh[0].numpy().shape == (3, 2, 4, 6)
    np.from_dlpack(fresh[0])[1, 1, 2, 3] = 5
    assert fresh[0].layer_view(1, 1).numpy()[2, 3] == 5
    assert fresh[0].__dlpack_device__() == (1, 0)


def test_registered_blocks_are_read_only_and_released_ones_unreachable(manager: BlockManager) -> None:
    sequence = manager.sequence(range(4))
    fresh = manager.allocate_blocks(1)
    manager.store_kv(fresh[0], 0, np.ones((2, 4, 6), dtype=np.float32))
    blocks = manager.register_blocks(fresh.complete(sequence.hashes))
    block = blocks[0]
    array = block.layer(0).numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0, 0] = 3
    with pytest.raises(BlockStateError, match="must be mutable or complete to store into it"):
        manager.store_kv(block, 0, b"")
    assert manager.load_kv(block, 0) == np.ones(48, dtype=np.float32).tobytes()
    blocks.release()
    with pytest.raises(BlockStateError, match="these blocks are released, must be active"):
        block.layer(0)


def test_exports_keep_the_memory_alive(backend: Backend) -> None:
    manager = BlockManager(**DIMS, backend=backend)
    fresh = manager.allocate_blocks(1)
    array = fresh[0].layer(1).numpy()
    imported = np.from_dlpack(fresh[0].layer(1))
    array[...] = 9
    fresh.release()
    manager.close()
    del manager, fresh
    gc.collect()
    assert (array == 9).all()
    assert (imported == 9).all()


@pytest.mark.parametrize(("dtype", "shown"), [("bfloat16", "uint16"), ("float8_e4m3", "uint8"), ("int32", "int32")])
def test_types_that_numpy_lacks_are_shown_as_unsigned(backend: Backend, dtype: str, shown: str) -> None:
    with BlockManager(**{**DIMS, "dtype": dtype}, backend=backend) as manager:
        assert manager.allocate_blocks(1)[0].layer(0).dtype == np.dtype(shown)


def test_wrong_layers_sizes_and_types_are_refused_by_name(manager: BlockManager) -> None:
    block = manager.allocate_blocks(1)[0]
    with pytest.raises(LayoutError, match=r"layer 3 is outside 0\.\.2"):
        block.layer(3)
    with pytest.raises(LayoutError, match=r"outer 2 is outside 0\.\.1"):
        block.layer_view(0, 2)
    with pytest.raises(LayoutError, match="takes 192 bytes, got 3"):
        manager.store_kv(block, 0, b"abc")


def test_buffers_of_blocks_and_layers_share_memory(backend: Backend) -> None:
    with BlockManager(**DIMS, backend=backend) as manager:
        fresh = manager.allocate_blocks(1)
        for view in (fresh[0].view(), fresh[0].layer(1), fresh[0].layer_view(1, 0)):
            buffer = memoryview(view) if sys.version_info >= (3, 12) else memoryview(view.numpy())  # type: ignore[arg-type]
            assert (buffer.shape, buffer.nbytes) == (view.shape, view.numpy().nbytes)
            view.numpy()[...] = 0
            buffer[(0,) * buffer.ndim] = 7.0
            assert view.numpy().flat[0] == 7.0
        layer = manager.register_blocks(fresh.complete(np.ones((1, 2), dtype=np.uint64)))[0].layer(0)
        assert memoryview(layer.numpy()).readonly


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_blocks": 0}, "at least one tier, got none: give device_blocks"),
        ({"disk_blocks": 4}, "disk.path is not given"),
        ({"layout": "spiral"}, "device.layout is 'spiral', give one of fully_contiguous"),
        ({"dtype": "float17"}, "model.dtype is 'float17'"),
        ({"inner_dim": 0}, "model.inner_dim is 0, give 1 or more"),
    ],
)
def test_impossible_managers_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, LayoutError), match=message):
        BlockManager(**{**DIMS, **changes})
