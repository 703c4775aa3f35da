"""The checksum kernels give what the CPU twins give, alone and while they copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_site import GPUS, Bytes, Gpu, Memory, Words, move, open_gpu, words

from kvbm._backend import Backend
from kvbm._pure import copies

# (piece_nbytes, num_pieces): seams inside chunks and vectors, short last chunks, pieces of many chunks.
SHAPES = [
    (1, 1), (1, 40), (15, 3), (16, 1), (16, 300), (17, 300), (100, 41), (512, 8), (512, 9), (520, 9), (1000, 9),
    (2048, 2), (2064, 3), (4080, 2), (4095, 1), (4095, 5), (4096, 1), (4096, 3), (4097, 1), (4097, 4), (4112, 4),
    (8192, 2), (12304, 1), (65536, 2), (65537, 1),
]  # fmt: skip


@pytest.fixture(params=GPUS, scope="module")
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


def hashes_of(num_blocks: int) -> Words:
    return np.random.default_rng(num_blocks).integers(0, 2**64, (num_blocks, 2), dtype=np.uint64)


def expected_checksums(image: Bytes, memory: Memory, starts: Words, piece_nbytes: int, hashes: Words) -> Words:
    """What the pure twin says of the bytes at `starts`, (num_blocks, num_pieces), in this image."""
    at = memory.index(starts.reshape(-1)).astype(np.int64)
    data = np.ascontiguousarray(
        image[at[:, None] + np.arange(piece_nbytes)].reshape(len(starts), starts.shape[1] * piece_nbytes)
    )
    blocks = words(data.ctypes.data + np.arange(len(data)) * data.shape[1])
    return copies.checksum_blocks(blocks, words([0]), data.shape[1], hashes)


def place(
    memory: Memory, num_blocks: int, num_pieces: int, piece_nbytes: int, shift: int, gap: int
) -> tuple[Words, Words]:
    pitch = piece_nbytes + gap
    pieces = words([shift + j * pitch for j in reversed(range(num_pieces))])
    blocks = words([memory.address + i * num_pieces * pitch for i in reversed(range(num_blocks))])
    return blocks, pieces


def check_checksums(
    gpu: Gpu,
    piece_nbytes: int,
    num_pieces: int,
    num_blocks: int,
    *,
    shifts: tuple[int, int] = (0, 0),
    gaps: tuple[int, int] = (0, 0),
    pinned: tuple[bool, bool] = (False, False),
) -> None:
    """Checksum the source where it is, then copy it with its checksum; compare values and bytes."""
    room = [num_blocks * num_pieces * (piece_nbytes + gap) + shift for shift, gap in zip(shifts, gaps, strict=True)]
    sides = gpu.memory(room[0], is_pinned=pinned[0]), gpu.memory(room[1], is_pinned=pinned[1])
    images = sides[0].put_random(piece_nbytes), sides[1].image()
    here, there = (
        place(sides[side], num_blocks, num_pieces, piece_nbytes, shifts[side], gaps[side]) for side in range(2)
    )
    hashes = hashes_of(num_blocks)
    starts = here[0][:, None] + here[1], there[0][:, None] + there[1]
    expected = expected_checksums(images[0], sides[0], starts[0], piece_nbytes, hashes)
    np.testing.assert_array_equal(gpu.checksum(*here, piece_nbytes, hashes), expected)
    copied = gpu.copy(sides, (here[0], there[0]), (here[1], there[1]), piece_nbytes, hashes=hashes)
    assert copied is not None
    np.testing.assert_array_equal(copied, expected)
    np.testing.assert_array_equal(sides[1].image(), move(images, sides, starts, piece_nbytes))
    np.testing.assert_array_equal(sides[0].image(), images[0])
    gpu.release()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_checksums_equal_the_cpu_twins(gpu: Gpu, shape: tuple[int, int]) -> None:
    check_checksums(gpu, *shape, 2)
    check_checksums(gpu, *shape, 1, gaps=(16, 48))


@pytest.mark.parametrize("shifts", [(1, 1), (8, 0), (0, 4), (2, 7), (15, 15)])
@pytest.mark.parametrize("shape", [(100, 41), (1000, 9), (4096, 2), (4097, 2)], ids=str)
def test_checksums_are_right_at_every_alignment(gpu: Gpu, shape: tuple[int, int], shifts: tuple[int, int]) -> None:
    check_checksums(gpu, *shape, 2, shifts=shifts, gaps=(shifts[1], shifts[0]))


@pytest.mark.parametrize("pinned", [(True, False), (False, True)])
def test_checksums_of_pinned_memory_are_right(gpu: Gpu, pinned: tuple[bool, bool]) -> None:
    check_checksums(gpu, 4096, 2, 3, pinned=pinned)


@pytest.mark.parametrize("num_blocks", [0, 1, 31, 127, 128, 129, 300])
def test_every_block_of_a_batch_has_its_checksum(gpu: Gpu, num_blocks: int) -> None:
    check_checksums(gpu, 48, 2, num_blocks, gaps=(16, 0))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_blocks_have_the_cpu_twins_checksums(gpu: Gpu, data: st.DataObject) -> None:
    side = st.tuples(st.integers(0, 20), st.integers(0, 20))
    piece_nbytes = data.draw(
        st.one_of(st.integers(1, 80), st.integers(1, 80).map(lambda n: 16 * n), st.integers(1, 5000))
    )
    check_checksums(
        gpu,
        piece_nbytes,
        data.draw(st.integers(1, 10)),
        data.draw(st.integers(1, 3)),
        shifts=data.draw(side),
        gaps=data.draw(side),
    )


def test_the_device_and_both_twins_agree(gpu: Gpu, backend: Backend) -> None:
    memory = gpu.memory(3 * 6000)
    image = memory.put_random(5)
    blocks, pieces = place(memory, 3, 2, 3000, 0, 0)
    hashes = hashes_of(3)
    data = np.ascontiguousarray(image)
    on_host = blocks - np.uint64(memory.address) + np.uint64(data.ctypes.data + memory.index(memory.address))
    expected = backend.checksum_blocks(on_host, pieces, 3000, hashes)
    np.testing.assert_array_equal(gpu.checksum(blocks, pieces, 3000, hashes), expected)
    gpu.release()


@pytest.mark.parametrize("nbytes", [4096, 6000])
def test_one_flipped_bit_anywhere_changes_the_checksum(gpu: Gpu, nbytes: int) -> None:
    memory = gpu.memory(nbytes)
    image = memory.put_random(6)
    blocks, pieces = place(memory, 1, 1, nbytes, 0, 0)
    hashes = hashes_of(1)
    sound = gpu.checksum(blocks, pieces, nbytes, hashes)[0]
    for at in [0, 1, 511, 512, 1023, 1024, 4032, 4095, nbytes - 1]:
        flipped = image.copy()
        flipped[memory.index(memory.address) + at] ^= 1 << at % 8
        memory.put_image(flipped)
        assert gpu.checksum(blocks, pieces, nbytes, hashes)[0] != sound, at
    gpu.release()
