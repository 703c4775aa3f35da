"""Copy plans, executed into poisoned memory and compared with NumPy (CONFORMANCE 23, 24 by copies, 25)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm._backend import Backend
from kvbm.copyplan import plan_copy
from kvbm.errors import LayoutError
from kvbm.layout import BlockLayout, BoundLayout

POISON = 0xA5
KINDS = ("contiguous", "aligned", "block_first", "outer_first", "gaps", "head_major", "universal")


def make_layout(kind: str, num_blocks: int, dims: dict[str, Any]) -> BlockLayout:
    dims = {**dims, "num_blocks": num_blocks}
    itemsize = {"uint8": 1, "uint16": 2, "uint32": 4}[dims["dtype"]]
    token = dims["inner_dim"] * itemsize
    head, region = token // dims["num_heads"], token * dims["block_size"]
    layer = region * dims["outer_dim"]
    block = layer * dims["num_layers"]
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(**dims)
    if kind == "aligned":
        return BlockLayout.fully_contiguous(**dims, alignment=256)
    if kind in ("block_first", "outer_first"):
        return BlockLayout.layer_separate(**dims, block_first=kind == "block_first", alignment=64)
    strides = {"block": block, "layer": layer, "outer": region, "token": head, "head": head * dims["block_size"]}
    if kind == "gaps":
        step = token + 3
        strides = {"token": step, "head": head, "outer": step * dims["block_size"] + 5}
        strides["layer"] = strides["outer"] * dims["outer_dim"]
        strides["block"] = strides["layer"] * dims["num_layers"] + 7
    if kind == "universal":
        inner = {
            "token": head,
            "outer": head * dims["block_size"],
            "layer": head * dims["block_size"] * dims["outer_dim"],
        }
        strides = {**inner, "head": inner["layer"] * dims["num_layers"], "block": block}
    return BlockLayout.custom(**dims, strides=strides)


class Memory:
    """Buffers for a layout, guarded and poisoned, read and written element by element through strides."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.raw = [np.full(layout.buffer_nbytes + 128, POISON, dtype=np.uint8) for _ in range(layout.num_buffers)]
        self.bound: BoundLayout = layout.bind([raw.ctypes.data + 64 for raw in self.raw])

    def view(self, layer: int) -> npt.NDArray[np.uint8]:
        """(block, outer, token, head, byte) of one layer."""
        layout = self.layout
        strides = layout.strides
        return np.ndarray(
            (layout.num_blocks, layout.outer_dim, layout.block_size, layout.num_heads, layout.head_nbytes),
            np.uint8,
            self.raw[layer if layout.has_layer_buffers else 0].data,
            64 + (0 if layout.has_layer_buffers else layer * strides.layer),
            (strides.block, strides.outer, strides.token, strides.head, 1),
        )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 2, 3, 6, 3), (3, 1, 5, 4, 1), (1, 2, 7, 10, 2)])
@pytest.mark.parametrize(("source_kind", "destination_kind"), list(itertools.product(KINDS, KINDS)))
def test_copy_equals_numpy_and_touches_nothing_else(
    backend: Backend, source_kind: str, destination_kind: str, shape: tuple[int, ...], dtype: str
) -> None:
    dims = dict(zip(("num_layers", "outer_dim", "block_size", "inner_dim", "num_heads"), shape, strict=True))
    source = Memory(make_layout(source_kind, 5, {**dims, "dtype": dtype}))
    destination = Memory(make_layout(destination_kind, 4, {**dims, "dtype": dtype}))
    rng = np.random.default_rng(1)
    for raw in source.raw:
        raw[:] = rng.integers(0, 256, raw.shape)
    from_ids, to_ids = np.array([4, 0, 1], dtype=np.int32), np.array([2, 3, 0], dtype=np.int32)
    expected = Memory(destination.layout)
    for layer in range(dims["num_layers"]):
        expected.view(layer)[to_ids] = source.view(layer)[from_ids]
    plan = plan_copy(source.bound, destination.bound, from_ids, to_ids)
    assert plan.nbytes == 3 * source.layout.block_nbytes
    backend.copy_blocks(
        plan.source_blocks, plan.destination_blocks, plan.source_pieces, plan.destination_pieces, plan.piece_nbytes
    )
    rebased = [want[64:-64] for want in expected.raw]
    for raw, want in zip(destination.raw, rebased, strict=True):
        assert np.array_equal(raw[64:-64], want)
        assert (raw[:64] == POISON).all()
        assert (raw[-64:] == POISON).all()
    runs = plan.runs()
    assert int(runs[2].sum()) == plan.nbytes


def bound(kind: str, num_blocks: int = 6, **changes: Any) -> BoundLayout:
    dims = {"num_layers": 2, "outer_dim": 2, "block_size": 4, "inner_dim": 8, "num_heads": 2, "dtype": "uint16"}
    layout = make_layout(kind, num_blocks, {**dims, **changes})
    return layout.bind([1 << 20 << i for i in range(layout.num_buffers)])


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def test_contiguous_blocks_are_one_run_each_and_fewer_when_adjacent() -> None:
    plan = plan_copy(bound("contiguous"), bound("contiguous"), ids(0, 2, 3, 4), ids(5, 0, 1, 2))
    assert (plan.kind, plan.num_blocks, len(plan.source_pieces)) == ("runs", 4, 1)
    sources, destinations, nbytes = plan.runs()
    assert nbytes.tolist() == [256, 3 * 256]
    assert (sources - np.uint64(1 << 20)).tolist() == [0, 512]
    assert (destinations - np.uint64(1 << 20)).tolist() == [5 * 256, 0]


def test_layer_separate_is_one_run_a_layer() -> None:
    plan = plan_copy(bound("contiguous"), bound("block_first"), ids(1), ids(2))
    assert (len(plan.source_pieces), plan.piece_nbytes) == (2, 128)
    plan = plan_copy(bound("contiguous"), bound("outer_first"), ids(1), ids(2))
    assert (len(plan.source_pieces), plan.piece_nbytes) == (4, 64)


def test_kinds_tell_runs_strided_and_permute() -> None:
    assert plan_copy(bound("contiguous"), bound("aligned"), ids(0), ids(0)).kind == "runs"
    assert plan_copy(bound("gaps"), bound("gaps"), ids(0), ids(0)).kind in ("runs", "strided")
    assert plan_copy(bound("contiguous"), bound("head_major"), ids(0), ids(0)).kind == "permute"
    assert plan_copy(bound("head_major"), bound("universal"), ids(0), ids(0)).kind != "permute"


def test_no_blocks_is_an_empty_plan(backend: Backend) -> None:
    plan = plan_copy(bound("contiguous"), bound("outer_first"), ids(), ids())
    assert (plan.nbytes, [len(part) for part in plan.runs()]) == (0, [0, 0, 0])
    backend.copy_blocks(
        plan.source_blocks, plan.destination_blocks, plan.source_pieces, plan.destination_pieces, plan.piece_nbytes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "num_layers is 2 in the source and 3 in the destination"),
        ({"inner_dim": 10}, "inner_dim is 8 in the source and 10"),
        ({"dtype": "uint32"}, "itemsize is 2 in the source and 4"),
    ],
)
def test_other_blocks_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        plan_copy(bound("contiguous"), bound("contiguous", **changes), ids(0), ids(0))


def test_wrong_pairs_are_refused() -> None:
    for from_ids, to_ids, message in (
        (ids(6), ids(0), r"source block 6 is outside 0\.\.5"),
        (ids(0), ids(-1), r"destination block -1 is outside"),
        (ids(0, 1), ids(0), "2 source blocks for 1 destination blocks"),
        (ids(0, 1), ids(3, 3), "destination block 3 is given twice"),
    ):
        with pytest.raises(LayoutError, match=message):
            plan_copy(bound("contiguous"), bound("contiguous"), from_ids, to_ids)
