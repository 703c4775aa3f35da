"""Layouts: formulas, overlap, refusals, serialisation (CONFORMANCE 20, 21)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.errors import LayoutError
from kvbm.layout import BlockLayout, BoundLayout
from kvbm.testing.layouts import LayoutTests

DIMS: dict[str, Any] = {
    "num_blocks": 3,
    "num_layers": 2,
    "outer_dim": 2,
    "block_size": 5,
    "inner_dim": 6,
    "dtype": "float16",
}
REGION = 5 * 6 * 2


class TestFullyContiguous(LayoutTests):
    def make_layout(self) -> BlockLayout:
        return BlockLayout.fully_contiguous(**DIMS, alignment=256)


class TestBlockFirst(LayoutTests):
    def make_layout(self) -> BlockLayout:
        return BlockLayout.layer_separate(**DIMS, block_first=True, alignment=128)


class TestOuterFirst(LayoutTests):
    def make_layout(self) -> BlockLayout:
        return BlockLayout.layer_separate(**DIMS, block_first=False)


class TestHeadMajor(LayoutTests):
    def make_layout(self) -> BlockLayout:
        strides = {"block": 400, "layer": 200, "outer": 100, "head": 20, "token": 4}
        return BlockLayout.custom(**DIMS, num_heads=3, strides=strides)


@pytest.mark.parametrize("alignment", [1, 128, 256, 4096])
def test_strides_follow_the_formulas(alignment: int) -> None:
    def up(nbytes: int) -> int:
        return -(-nbytes // alignment) * alignment

    contiguous = BlockLayout.fully_contiguous(**DIMS, alignment=alignment)
    block = up(2 * 2 * REGION)
    assert contiguous.offset(2, 1, 1) == (0, 2 * block + 2 * REGION + REGION)
    assert contiguous.buffer_nbytes == 3 * block
    block_first = BlockLayout.layer_separate(**DIMS, block_first=True, alignment=alignment)
    assert block_first.offset(2, 1, 1) == (1, 2 * up(2 * REGION) + REGION)
    assert block_first.buffer_nbytes == 3 * up(2 * REGION)
    outer_first = BlockLayout.layer_separate(**DIMS, block_first=False, alignment=alignment)
    assert outer_first.offset(2, 1, 1) == (1, 2 * up(REGION) + 3 * up(REGION))
    assert outer_first.buffer_nbytes == 2 * 3 * up(REGION)


@pytest.mark.parametrize("axis", ["num_blocks", "num_layers", "outer_dim", "block_size", "inner_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_impossible_dimensions_are_refused_by_name(axis: str, value: Any) -> None:
    with pytest.raises(LayoutError, match=axis):
        BlockLayout.fully_contiguous(**{**DIMS, axis: value})


@pytest.mark.parametrize("alignment", [0, 3, -4, 2**31])
def test_alignment_must_be_a_power_of_two(alignment: int) -> None:
    with pytest.raises(LayoutError, match=f"alignment {alignment} is no power of two"):
        BlockLayout.fully_contiguous(**DIMS, alignment=alignment)


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(LayoutError, match="dtype 'float17' is not known, use one of float16"):
        BlockLayout.fully_contiguous(**{**DIMS, "dtype": "float17"})


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ({"block": 10, "layer": 120, "outer": 60}, "they would overlap"),
        ({"block": 240, "layer": 100, "outer": 60}, "they would overlap"),
        ({"layer": 120, "outer": 60}, "strides need block and outer"),
        ({"block": 240, "layer": 120, "outer": 60, "page": 1}, "strides need block and outer"),
    ],
)
def test_custom_strides_that_cannot_be_are_refused(strides: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        BlockLayout.custom(**DIMS, strides=strides)


def test_buffer_too_small_for_the_strides_is_refused() -> None:
    with pytest.raises(LayoutError, match="buffer_nbytes 719 is less than the 720"):
        BlockLayout.custom(**DIMS, strides={"block": 240, "layer": 120, "outer": 60}, buffer_nbytes=719)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_layout_or_a_layout_error(data: bytes) -> None:
    with contextlib.suppress(LayoutError):
        BoundLayout.from_json(data)


def test_a_damaged_description_is_refused() -> None:
    good = BlockLayout.fully_contiguous(**DIMS).bind([64]).to_json()
    for old, new in ((b'"num_blocks":3', b'"num_blocks":4'), (b'"dtype"', b'"type"'), (b'"block":', b'"blocks":')):
        with pytest.raises(LayoutError):
            BoundLayout.from_json(good.replace(old, new))
