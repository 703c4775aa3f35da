"""Permutes on the device against NumPy: NHD, HND and universal, and head ranges for another tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_site import GPUS, Bytes, Gpu, open_gpu, words

UNITS = [1, 2, 4, 8, 16, 100, 256]
# Axes of a block in memory, outermost first: layer, outer (K and V), token, head; the bytes of a head are innermost.
ORDERS = {"NHD": "lonh", "HND": "lohn", "universal": "hlon"}
LAYERS, OUTER = 2, 2

Strides = dict[str, int]


@pytest.fixture(params=GPUS, scope="module")
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


def strides_of(order: str, sizes: dict[str, int], unit: int, pad: int, gap: int) -> tuple[Strides, int]:
    """Strides of each axis and of a block, bytes; `gap` stands behind each unit, `pad` behind a row of such."""
    strides, nbytes = {}, unit + gap
    for i, axis in enumerate(reversed(order)):
        strides[axis] = nbytes
        nbytes = nbytes * sizes[axis] + (pad if i == 0 else 0)
    return strides, nbytes


def view(image: Bytes, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.lib.stride_tricks.as_strided(image[start:], shape=shape, strides=strides)


def check_permute(
    gpu: Gpu,
    orders: tuple[str, str],
    num_tokens: int,
    heads: tuple[int, int],
    unit: int,
    *,
    first_heads: tuple[int, int] = (0, 0),
    num_heads: int | None = None,
    shifts: tuple[int, int] = (0, 0),
    pads: tuple[int, int] = (0, 0),
    gaps: tuple[int, int] = (0, 0),
    pinned: tuple[bool, bool] = (False, False),
    num_blocks: int = 2,
    num_thread_blocks: int = 2,
) -> None:
    """Permute `num_heads` heads from one side's `first_heads` on, of all layers and of K and V, and compare."""
    num_heads = heads[0] if num_heads is None else num_heads
    memories, strides, blocks, regions, starts = [], [], [], [], []
    rng = np.random.default_rng(unit)
    for side in range(2):
        sizes = {"l": LAYERS, "o": OUTER, "n": num_tokens, "h": heads[side]}
        of_axis, block_nbytes = strides_of(orders[side], sizes, unit, pads[side], gaps[side])
        memory = gpu.memory(shifts[side] + num_blocks * block_nbytes, is_pinned=pinned[side])
        start = shifts[side] + first_heads[side] * of_axis["h"] + rng.permutation(num_blocks) * block_nbytes
        memories.append(memory)
        strides.append(of_axis)
        starts.append([int(at) + memory.index(memory.address) for at in start])
        blocks.append(words(memory.address + start))
        regions.append(
            words([layer * of_axis["l"] + o * of_axis["o"] for layer in range(LAYERS) for o in range(OUTER)])
        )
    images = memories[0].put_random(unit), memories[1].image()
    gpu.permute(
        (blocks[0], blocks[1]),
        (regions[0], regions[1]),
        num_tokens=num_tokens,
        num_heads=num_heads,
        head_nbytes=unit,
        source_strides=(strides[0]["n"], strides[0]["h"]),
        destination_strides=(strides[1]["n"], strides[1]["h"]),
        num_thread_blocks=num_thread_blocks,
    )
    expected = images[1].copy()
    shape = LAYERS, OUTER, num_tokens, num_heads, unit
    for here, there in zip(*starts, strict=True):
        from_strides, to_strides = ((*(one[axis] for axis in "lonh"), 1) for one in strides)
        view(expected, there, shape, to_strides)[:] = view(images[0], here, shape, from_strides)
    np.testing.assert_array_equal(memories[1].image(), expected)
    np.testing.assert_array_equal(memories[0].image(), images[0])
    gpu.release()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("orders", [(a, b) for a in ORDERS for b in ORDERS], ids="-".join)
def test_permutes_between_all_orders_equal_numpy(gpu: Gpu, orders: tuple[str, str], unit: int) -> None:
    from_order, to_order = (ORDERS[order] for order in orders)
    for num_tokens, num_heads in [(1, 1), (16, 8), (16, 1), (1, 5), (33, 3), (5, 40)]:
        check_permute(gpu, (from_order, to_order), num_tokens, (num_heads, num_heads), unit)


@pytest.mark.parametrize("unit", [*UNITS, 3, 12, 31, 48, 63, 64, 65])
def test_permutes_are_right_at_odd_addresses_and_pitches(gpu: Gpu, unit: int) -> None:
    for orders in [("lonh", "lohn"), ("lohn", "lonh"), ("hlon", "lonh")]:
        for shifts, pads in [((1, 0), (0, 1)), ((8, 4), (4, 8)), ((0, 15), (16, 0))]:
            check_permute(gpu, orders, 17, (9, 9), unit, shifts=shifts, pads=pads)
            check_permute(gpu, orders, 17, (9, 9), unit, shifts=shifts, gaps=pads)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "orders", [("hlon", "lonh"), ("lonh", "hlon"), ("lohn", "lohn"), ("lonh", "lonh")], ids="-".join
)
def test_head_ranges_move_between_tensor_parallel_sizes(gpu: Gpu, orders: tuple[str, str], unit: int) -> None:
    """Eight heads written by two ranks of four are read by four ranks of two, and the other way."""
    for rank in range(4):
        check_permute(gpu, orders, 16, (8, 2), unit, first_heads=(2 * rank, 0), num_heads=2)
        check_permute(gpu, orders, 16, (2, 8), unit, first_heads=(0, 2 * rank), num_heads=2)


@pytest.mark.parametrize("unit", [1, 2, 16, 63])
def test_large_tiles_and_their_edges_are_whole(gpu: Gpu, unit: int) -> None:
    for num_tokens, num_heads in [(64, 64), (65, 63), (130, 7), (7, 130), (2, 300), (300, 2)]:
        check_permute(gpu, ("lonh", "lohn"), num_tokens, (num_heads, num_heads), unit, num_blocks=1)


@pytest.mark.parametrize("unit", [2, 128])
@pytest.mark.parametrize("num_blocks", [0, 1, 5, 33])
def test_any_number_of_blocks_is_permuted(gpu: Gpu, num_blocks: int, unit: int) -> None:
    check_permute(gpu, ("lonh", "lohn"), 4, (3, 3), unit, num_blocks=num_blocks, num_thread_blocks=3)


@pytest.mark.parametrize("unit", [2, 128])
@pytest.mark.parametrize("pinned", [(True, False), (False, True)])
def test_a_permute_reads_and_writes_pinned_memory_where_it_is(gpu: Gpu, pinned: tuple[bool, bool], unit: int) -> None:
    check_permute(gpu, ("lonh", "lohn"), 16, (8, 8), unit, pinned=pinned)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_permutes_equal_numpy(gpu: Gpu, data: st.DataObject) -> None:
    draw = data.draw
    orders = draw(st.sampled_from(sorted(ORDERS.values()))), draw(st.sampled_from(sorted(ORDERS.values())))
    heads = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    num_heads = draw(st.integers(1, min(heads)))
    small = st.tuples(st.integers(0, 17), st.integers(0, 17))
    check_permute(
        gpu,
        orders,
        draw(st.integers(1, 40)),
        heads,
        draw(st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 160, 256, 512]))),
        first_heads=(draw(st.integers(0, heads[0] - num_heads)), draw(st.integers(0, heads[1] - num_heads))),
        num_heads=num_heads,
        shifts=draw(small),
        pads=draw(small),
        gaps=draw(st.sampled_from([(0, 0), (0, 3), (16, 0), (4, 4)])),
        num_blocks=draw(st.integers(1, 3)),
    )


def test_a_tile_is_not_written_before_it_is_read_whatever_thread_is_first(gpu: Gpu) -> None:
    if not gpu.is_simulated:
        pytest.skip("the order of threads is chosen in the simulation alone")
    simulation = gpu.module.simulation
    try:
        for is_reversed in [False, True]:
            simulation.is_reversed = is_reversed
            check_permute(gpu, ("lonh", "lohn"), 64, (64, 64), 2, num_blocks=2, num_thread_blocks=1)
    finally:
        simulation.is_reversed = False
