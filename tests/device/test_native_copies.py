"""Copies of the native module: every path moves the same bytes, in as few calls as the plan allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_site import GPUS, GUARD_NBYTES, Gpu, Memory, Words, open_gpu, words

from kvbm._pure import copies
from kvbm.errors import ConfigError, DeviceError, HashFormatError, LayoutError

PATHS = ["memcpy", "batch", "kernel", "staged"]
SIDES = [(False, True), (True, False), (False, False)]  # is pinned: source, destination


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


@pytest.fixture
def simulated() -> Iterator[Gpu]:
    yield from open_gpu("simulated")


class Plan:
    """A copy of blocks between two memories, with all that it needs."""

    def __init__(
        self, gpu: Gpu, pinned: tuple[bool, bool], blocks: Sequence[Any], pieces: Sequence[Any], piece_nbytes: int
    ) -> None:
        self.gpu, self.pinned, self.piece_nbytes = gpu, pinned, piece_nbytes
        spans = [max([*map(int, b), 0]) + max(map(int, p)) + piece_nbytes for b, p in zip(blocks, pieces, strict=True)]
        self.sides = [gpu.memory(span, is_pinned=is_pinned) for span, is_pinned in zip(spans, pinned, strict=True)]
        self.blocks = [words(b) + np.uint64(side.address) for b, side in zip(blocks, self.sides, strict=True)]
        self.pieces = [words(p) for p in pieces]
        self.num_blocks, self.num_pieces = len(blocks[0]), len(pieces[0])
        self.before = self.sides[0].put_random(7)
        self.hashes = np.arange(2 * self.num_blocks, dtype=np.uint64).reshape(self.num_blocks, 2)

    def submit(self, path: str, *, hashes: Words | None = None, **overrides: Any) -> Memory:
        gpu = self.gpu
        nbytes = gpu.device.scratch_nbytes(self.num_blocks, self.num_pieces, with_checksums=hashes is not None)
        staging_nbytes = max(self.num_blocks * self.num_pieces * self.piece_nbytes, 1)
        scratch, pinned = gpu.memory(nbytes), gpu.memory(nbytes, is_pinned=True)
        staging = gpu.memory(staging_nbytes)
        checksums = gpu.memory(8 * max(self.num_blocks, 1), is_pinned=True)
        settings: dict[str, Any] = {
            "source_on_device": not self.pinned[0],
            "destination_on_device": not self.pinned[1],
            "scratch": (scratch.address, nbytes),
            "pinned": pinned.address,
            "staging": (staging.address, staging_nbytes),
            "hashes": hashes,
            "checksums": checksums.address,
        }
        gpu.device.copy(gpu.stream, *self.blocks, *self.pieces, self.piece_nbytes, path=path, **settings | overrides)
        return checksums

    def expected(self) -> Any:
        image = np.full(len(self.sides[1].image()), 0xA5, dtype=np.uint8)
        for source, target in zip(*self.blocks, strict=True):
            for start, end in zip(*self.pieces, strict=True):
                at, to = int(self.sides[0].index(int(source + start))), int(self.sides[1].index(int(target + end)))
                image[to : to + self.piece_nbytes] = self.before[at : at + self.piece_nbytes]
        return image

    def check(self) -> None:
        np.testing.assert_array_equal(self.sides[1].image(), self.expected())

    def expected_checksums(self) -> Any:
        base = self.before.ctypes.data + self.blocks[0] - np.uint64(self.sides[0]._base)
        return copies.checksum_blocks(base, self.pieces[0], self.piece_nbytes, self.hashes)


def ran(gpu: Gpu) -> list[tuple[str, int]]:
    """What ran on the stream: kind and bytes."""
    log = gpu.module.simulation.operations()
    return [(kind, nbytes) for kind, stream, nbytes, *_ in log if stream == gpu.stream.handle]


@pytest.mark.parametrize("pinned", SIDES, ids=["down", "up", "inside"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_checksums", [False, True])
def test_every_path_moves_the_same_bytes(gpu: Gpu, path: str, pinned: tuple[bool, bool], with_checksums: bool) -> None:
    if path == "staged" and pinned == (False, False):
        pytest.skip("staging stands between the device and the host")
    if path == "batch" and not gpu.device.has_batch_copy:
        pytest.skip("this driver has no batched copy")
    rng = np.random.default_rng(3)
    for piece_nbytes, num_pieces, num_blocks in itertools.product([1, 64, 100, 4097], [1, 5], [1, 3]):
        step = 2 * piece_nbytes
        starts = rng.permutation(num_pieces) * step
        blocks = [rng.permutation(num_blocks) * num_pieces * step + offset for offset in (0, 3)]
        plan = Plan(gpu, pinned, blocks, [starts, np.arange(num_pieces) * step], piece_nbytes)
        checksums = plan.submit(path, hashes=plan.hashes if with_checksums else None)
        gpu.stream.synchronize()
        plan.check()
        if with_checksums:
            image = checksums.image()[GUARD_NBYTES : GUARD_NBYTES + 8 * num_blocks].view(np.uint64)
            np.testing.assert_array_equal(image, plan.expected_checksums())
        gpu.release()


@pytest.mark.parametrize("path", PATHS)
def test_copy_of_no_blocks_queues_nothing(simulated: Gpu, path: str) -> None:
    plan = Plan(simulated, (False, True), [[], []], [[0], [0]], 8)
    plan.submit(path, hashes=plan.hashes)
    assert ran(simulated) == []


def test_blocks_that_follow_each_other_are_one_copy(simulated: Gpu) -> None:
    plan = Plan(simulated, (True, False), [np.arange(8) * 512] * 2, [np.arange(4) * 128] * 2, 128)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy", 4096)]
    plan.check()


def test_pieces_at_a_pitch_are_one_2d_copy_a_block(simulated: Gpu) -> None:
    plan = Plan(simulated, (True, False), [[0, 5000], [9000, 0]], [np.arange(4) * 128, np.arange(4) * 300], 100)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy2d", 400)] * 2
    plan.check()


def test_blocks_at_a_pitch_are_one_2d_copy(simulated: Gpu) -> None:
    plan = Plan(simulated, (False, True), [np.arange(8) * 4096, np.arange(8) * 512], [[0], [0]], 512)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy2d", 4096)]
    plan.check()


def test_blocks_and_pieces_at_pitches_are_one_3d_copy(simulated: Gpu) -> None:
    plan = Plan(
        simulated,
        (True, False),
        [np.arange(6) * 1024, np.arange(6) * 1500],
        [np.arange(4) * 128, np.arange(4) * 300],
        100,
    )
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy3d", 2400)]
    plan.check()


def test_blocks_that_are_no_whole_rows_apart_stay_apart(simulated: Gpu) -> None:
    plan = Plan(
        simulated,
        (True, False),
        [np.arange(6) * 1000, np.arange(6) * 1500],
        [np.arange(4) * 128, np.arange(4) * 300],
        100,
    )
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy2d", 400)] * 6
    plan.check()


@pytest.mark.parametrize("num_rows", [2, 3])
def test_few_rows_are_no_pattern(simulated: Gpu, num_rows: int) -> None:
    plan = Plan(simulated, (True, False), [np.arange(num_rows) * 512, np.arange(num_rows) * 600], [[0], [0]], 100)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy", 100)] * num_rows
    plan.check()


def test_backward_blocks_are_copied_one_by_one(simulated: Gpu) -> None:
    plan = Plan(simulated, (True, False), [np.arange(8)[::-1] * 512, np.arange(8) * 512], [[0], [0]], 512)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy", 512)] * 8
    plan.check()


@pytest.mark.parametrize("starts", [[0] * 6, np.arange(6) * 99], ids=["the same", "overlapping"])
def test_sources_that_overlap_are_copied_one_by_one(simulated: Gpu, starts: Any) -> None:
    plan = Plan(simulated, (True, False), [starts, np.arange(6) * 512], [[0], [0]], 100)
    plan.submit("memcpy")
    simulated.stream.synchronize()
    assert ran(simulated) == [("memcpy", 100)] * 6
    plan.check()


def test_batch_is_one_call_of_joined_runs(simulated: Gpu) -> None:
    plan = Plan(simulated, (True, False), [[0, 512, 2048], [0, 512, 4096]], [np.arange(4) * 128] * 2, 128)
    plan.submit("batch")
    simulated.stream.synchronize()
    assert ran(simulated) == [("batch", 1536)]
    plan.check()


def test_staging_is_copied_in_as_few_calls_as_the_host_allows(simulated: Gpu) -> None:
    starts = [np.array([7, 0, 5, 2]) * 256, np.arange(4) * 100]
    plan = Plan(simulated, (False, True), [np.arange(3) * 4096, np.arange(3) * 400], starts, 100)
    plan.submit("staged")
    simulated.stream.synchronize()
    kinds = ran(simulated)
    assert [kind.partition(":")[0] for kind, _ in kinds] == ["memcpy", "kernel", "memcpy"]
    assert kinds[-1] == ("memcpy", 1200)
    plan.check()


@pytest.mark.parametrize("path", ["memcpy", "batch", "staged"])
@pytest.mark.parametrize("num_pieces", [1, 5])
def test_no_copy_crosses_from_one_registration_into_the_next(simulated: Gpu, path: str, num_pieces: int) -> None:
    """CUDA takes a copy's host side by its first byte's registration and refuses what reaches beyond."""
    blocks = [np.arange(8) * 10_000] * 2
    plan = Plan(simulated, (False, True), blocks, [np.arange(num_pieces) * 2000] * 2, 10_000 // 5)
    host = plan.sides[1]
    device, base, nbytes = simulated.device, host._base, host._nbytes
    device.unregister_host(base)
    cuts = [0, 8192, 36_864, 40_960, nbytes]
    for start, end in itertools.pairwise(cuts):
        device.register_host(base + start, end - start)
    plan.submit(path)
    simulated.stream.synchronize()
    plan.check()
    for start in cuts[:-1]:
        device.unregister_host(base + start)
    device.register_host(base, nbytes)


def test_batched_copy_of_an_older_driver_is_found_by_its_name(simulated: Gpu) -> None:
    simulated.module.simulation.set_driver(12)
    assert simulated.module.Device(0).has_batch_copy
    plan = Plan(simulated, (True, False), [[0, 900], [512, 0]], [[0], [0]], 128)
    plan.submit("batch")
    simulated.stream.synchronize()
    assert ran(simulated) == [("batch", 256)]
    plan.check()
    with pytest.raises(ConfigError, match="drivers of CUDA 11, 12 and 13, got 10"):
        simulated.module.simulation.set_driver(10)


def test_absent_batched_copy_is_refused_by_name(simulated: Gpu) -> None:
    simulated.module.simulation.has_batch_copy = False
    assert not simulated.module.Device(0).has_batch_copy
    plan = Plan(simulated, (True, False), [[0], [0]], [[0], [0]], 128)
    with pytest.raises(DeviceError, match=r"^cuMemcpyBatchAsync on device 0 failed: cudaErrorNotSupported \(801\)"):
        plan.submit("batch")
    assert ran(simulated) == []


def test_batched_copy_needs_a_stream_of_its_own(simulated: Gpu) -> None:
    plan = Plan(simulated, (True, False), [[0], [0]], [[0], [0]], 128)
    own, simulated.stream = simulated.stream, simulated.device.adopt_stream(0)
    with pytest.raises(DeviceError, match="the batched copy needs a stream of its own"):
        plan.submit("batch")
    simulated.stream = own


@pytest.mark.parametrize(
    ("path", "overrides", "complaint"),
    [
        ("kernel", {"scratch": (0, 0)}, "this path needs scratch and pinned memory"),
        ("kernel", {"pinned": 0}, "this path needs scratch and pinned memory"),
        ("kernel", {"scratch": (8, 31)}, "scratch is smaller than scratch_nbytes says"),
        ("kernel", {"scratch": (12, 4096)}, "aligned to 8 bytes"),
        ("staged", {"staging": (0, 4096)}, "staging must be device memory aligned to 256 bytes"),
        ("staged", {"staging": (256, 127)}, "staging is smaller than the blocks"),
        ("staged", {"destination_on_device": True, "source_on_device": True}, "one side on the device"),
        ("memcpy", {"hashes": np.zeros((1, 2), np.uint64), "checksums": 0}, "no place for checksums"),
        (
            "memcpy",
            {"source_on_device": True},
            r"cudaMemcpyAsync of 128 bytes on device 0 failed: cudaErrorInvalidValue",
        ),
    ],
)
def test_impossible_copies_are_refused_and_queue_nothing(
    simulated: Gpu, path: str, overrides: dict[str, Any], complaint: str
) -> None:
    plan = Plan(simulated, (True, False), [[0], [0]], [[0], [0]], 128)
    with pytest.raises(DeviceError, match=complaint):
        plan.submit(path, **overrides)
    assert ran(simulated) == []


def test_arrays_that_do_not_fit_are_refused(simulated: Gpu) -> None:
    copy, stream = simulated.device.copy, simulated.stream
    how: dict[str, Any] = {"path": "memcpy", "source_on_device": True, "destination_on_device": True}
    one, two = words([0]), words([0, 0])
    with pytest.raises(LayoutError, match=r"destination_blocks must be .* got 2 entries for 1 source_blocks"):
        copy(stream, one, two, one, one, 8, **how)
    with pytest.raises(LayoutError, match=r"destination_pieces must be .* got 1 entries for 2 source_pieces"):
        copy(stream, one, one, two, one, 8, **how)
    with pytest.raises(LayoutError, match=r"source_blocks must be .* dtype int64"):
        copy(stream, np.zeros(1, dtype=np.int64), one, one, one, 8, **how)
    with pytest.raises(LayoutError, match=r"source_blocks must be .* got list"):
        copy(stream, [0], one, one, one, 8, **how)
    with pytest.raises(LayoutError, match="piece_nbytes is 0, give 1 or more bytes"):
        copy(stream, one, one, one, one, 0, **how)
    with pytest.raises(HashFormatError, match="hashes has 2 entries, need 1"):
        copy(stream, one, one, one, one, 8, hashes=np.zeros((2, 2), np.uint64), **how)
    with pytest.raises(ConfigError, match="path 'dma' is not known, use one of memcpy, batch, kernel, staged"):
        copy(stream, one, one, one, one, 8, **how | {"path": "dma"})
    with pytest.raises(DeviceError, match="a block needs 1 or more pieces"):
        copy(stream, one, one, words([]), words([]), 8, **how)
    with pytest.raises(DeviceError, match="a block has more bytes than 2"):
        copy(stream, one, one, two, two, 2**62, **how)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_plans_move_the_same_bytes_on_every_path(data: st.DataObject) -> None:
    gpu = next(open_gpu("simulated"))
    gpu.module.simulation.is_reversed = data.draw(st.booleans())
    pinned = data.draw(st.sampled_from(SIDES[:2]))
    piece_nbytes = data.draw(st.sampled_from([1, 7, 16, 48, 100]))
    num_blocks, num_pieces = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))

    def starts(count: int, least: int) -> list[int]:
        slots = data.draw(st.permutations(range(count)) | st.just(range(count)))
        pitch = data.draw(st.sampled_from([least, least + 1, 2 * least, 2 * least + 16]))
        return [slot * pitch for slot in slots]

    pieces = [starts(num_pieces, piece_nbytes) for _ in range(2)]
    blocks = [starts(num_blocks, max(piece) + piece_nbytes) for piece in pieces]
    for path in PATHS:
        plan = Plan(gpu, pinned, blocks, pieces, piece_nbytes)
        hashes = plan.hashes if data.draw(st.booleans()) else None
        checksums = plan.submit(path, hashes=hashes)
        gpu.stream.synchronize()
        plan.check()
        if hashes is not None:
            image = checksums.image()[GUARD_NBYTES : GUARD_NBYTES + 8 * num_blocks].view(np.uint64)
            np.testing.assert_array_equal(image, plan.expected_checksums())
        gpu.release()
    gpu.stream.close()
    gpu.module.simulation.reset()
