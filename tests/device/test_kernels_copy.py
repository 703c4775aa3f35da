"""The copy kernel against NumPy: sizes and addresses around every edge, into poisoned memory between guards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_site import GPUS, Gpu, move, open_gpu, words

SIZES = [1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 500]
SIZES += [511, 512, 513, 1023, 1024, 1025, 1536, 4095, 4096, 4097, 8191, 8192, 8193, 65535, 65536, 65537]
SHIFTS = [(0, 0), (1, 1), (8, 8), (15, 15), (0, 8), (4, 12), (2, 4), (3, 0), (0, 1), (15, 2)]


@pytest.fixture(params=GPUS, scope="module")
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


def check_copy(
    gpu: Gpu,
    piece_nbytes: int,
    num_blocks: int,
    num_pieces: int,
    *,
    shifts: tuple[int, int] = (0, 0),
    gaps: tuple[int, int] = (0, 0),
    pinned: tuple[bool, bool] = (False, False),
    order: np.random.Generator | None = None,
    num_thread_blocks: int = 2,
) -> None:
    """Copy between two ranges; gaps lie behind each piece, shifts before the first; the order of blocks is random."""
    piece_at, starts, nbytes = [], [], []
    rng = order or np.random.default_rng(piece_nbytes)
    for side in range(2):
        pitch = piece_nbytes + gaps[side]
        piece_at.append(words([shifts[side] + j * pitch for j in rng.permutation(num_pieces)]))
        starts.append(words(rng.permutation(num_blocks) * num_pieces * pitch))
        nbytes.append(num_blocks * num_pieces * pitch + shifts[side] + 1)
    sides = gpu.memory(nbytes[0], is_pinned=pinned[0]), gpu.memory(nbytes[1], is_pinned=pinned[1])
    images = sides[0].put_random(1), sides[1].image()
    blocks = starts[0] + np.uint64(sides[0].address), starts[1] + np.uint64(sides[1].address)
    pieces = piece_at[0], piece_at[1]
    gpu.copy(sides, blocks, pieces, piece_nbytes, num_thread_blocks=num_thread_blocks)
    everywhere = blocks[0][:, None] + pieces[0], blocks[1][:, None] + pieces[1]
    np.testing.assert_array_equal(sides[1].image(), move(images, sides, everywhere, piece_nbytes))
    np.testing.assert_array_equal(sides[0].image(), images[0])
    gpu.release()


@pytest.mark.parametrize("piece_nbytes", SIZES)
def test_every_byte_arrives_at_every_alignment_and_nothing_else_changes(gpu: Gpu, piece_nbytes: int) -> None:
    for shifts in SHIFTS if piece_nbytes < 60_000 else SHIFTS[::3]:
        check_copy(gpu, piece_nbytes, 2, 3, shifts=shifts, gaps=(shifts[1], 16 - shifts[0]))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1000])
@pytest.mark.parametrize("piece_nbytes", [1, 16, 64, 100, 512])
def test_counts_around_lanes_warps_and_tiles_copy_every_piece(gpu: Gpu, piece_nbytes: int, count: int) -> None:
    check_copy(gpu, piece_nbytes, count, 1, gaps=(16, 32))
    check_copy(gpu, piece_nbytes, 1, count, gaps=(16, 32))


@pytest.mark.parametrize("pinned", [(True, False), (False, True)])
def test_pinned_memory_is_read_and_written_where_it_is(gpu: Gpu, pinned: tuple[bool, bool]) -> None:
    check_copy(gpu, 4096, 5, 3, pinned=pinned)
    check_copy(gpu, 1000, 5, 3, pinned=pinned, shifts=(1, 2), gaps=(3, 5))


@pytest.mark.parametrize("num_thread_blocks", [1, 3, 1000])
def test_the_size_of_the_grid_changes_nothing(gpu: Gpu, num_thread_blocks: int) -> None:
    check_copy(gpu, 2048, 40, 3, gaps=(16, 0), num_thread_blocks=num_thread_blocks)


def test_nothing_moves_without_blocks(gpu: Gpu) -> None:
    sides = gpu.memory(64), gpu.memory(64)
    image = sides[1].image()
    piece = words([0])
    gpu.copy(sides, (words([]), words([])), (piece, piece), 64)
    np.testing.assert_array_equal(sides[1].image(), image)
    gpu.release()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_plans_copy_as_numpy_does(gpu: Gpu, data: st.DataObject) -> None:
    piece_nbytes = data.draw(st.one_of(st.integers(1, 80), st.integers(480, 544), st.integers(4090, 4200)))
    side = st.tuples(st.integers(0, 20), st.integers(0, 20))
    check_copy(
        gpu,
        piece_nbytes,
        data.draw(st.integers(1, 12)),
        data.draw(st.integers(1, 12)),
        shifts=data.draw(side),
        gaps=data.draw(side),
        order=np.random.default_rng(data.draw(st.integers(0, 2**32))),
        num_thread_blocks=data.draw(st.integers(1, 3)),
    )
