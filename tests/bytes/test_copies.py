"""Copies of block batches in both twins: every alignment and piece size, guard bytes, threads, forks, kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.bench import copy
from kvbm.errors import ConfigError, HashFormatError, LayoutError

POISON = 0xAB
PIECES = [1, 3, 63, 64, 65, 4095, 4096, 4097, 6144, 8192, 12345, 65536, 70001]


def words(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


class Blocks:
    """Blocks of pieces in one poisoned or filled buffer, laid out with gaps, at a chosen offset from alignment."""

    def __init__(
        self, num_blocks: int, num_pieces: int, piece_nbytes: int, *, offset: int, gap: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        pitch = piece_nbytes + gap
        self.piece_nbytes = piece_nbytes
        self.buffer = np.full(num_blocks * num_pieces * pitch + offset + 256, POISON, dtype=np.uint8)
        base = -self.buffer.ctypes.data % 64 + offset
        self.block_starts = base + rng.permutation(num_blocks) * (num_pieces * pitch)
        self.piece_starts = rng.permutation(num_pieces) * pitch
        self.blocks = (self.buffer.ctypes.data + self.block_starts).astype(np.uint64)
        self.pieces = self.piece_starts.astype(np.uint64)

    def buffer_with(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Give a copy of the buffer in which the blocks hold `data`."""
        buffer: npt.NDArray[np.uint8] = self.buffer.copy()
        for start, block in zip(self.block_starts, data, strict=True):
            for piece, content in zip(self.piece_starts, block, strict=True):
                buffer[start + piece : start + piece + self.piece_nbytes] = content
        return buffer


def assert_copies(
    backend: Backend,
    *,
    num_blocks: int,
    num_pieces: int,
    piece_nbytes: int,
    offsets: tuple[int, int] = (0, 0),
    gap: int = 0,
    num_threads: int = 1,
) -> None:
    """Copy with and without checksums and compare every byte of the destination's buffer, gaps included."""
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (num_blocks, num_pieces, piece_nbytes), dtype=np.uint8)
    source = Blocks(num_blocks, num_pieces, piece_nbytes, offset=offsets[0], gap=gap, seed=1)
    source.buffer[:] = source.buffer_with(data)
    hashes = rng.integers(0, 1 << 63, (num_blocks, 2), dtype=np.uint64)
    for names in (None, hashes):
        destination = Blocks(num_blocks, num_pieces, piece_nbytes, offset=offsets[1], gap=2 * gap, seed=2)
        expected = destination.buffer_with(data)
        sums = backend.copy_blocks(
            source.blocks,
            destination.blocks,
            source.pieces,
            destination.pieces,
            piece_nbytes,
            hashes=names,
            num_threads=num_threads,
        )
        np.testing.assert_array_equal(destination.buffer, expected)
        if names is None:
            assert sums is None
        else:
            again = backend.checksum_blocks(destination.blocks, destination.pieces, piece_nbytes, names)
            np.testing.assert_array_equal(sums, again)


@pytest.mark.parametrize("piece_nbytes", PIECES)
@pytest.mark.parametrize("num_pieces", [1, 3, 8])
def test_copy_moves_every_piece_and_nothing_else(backend: Backend, num_pieces: int, piece_nbytes: int) -> None:
    assert_copies(backend, num_blocks=5, num_pieces=num_pieces, piece_nbytes=piece_nbytes, gap=64)


@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (63, 17), (32, 32), (8, 64)])
@pytest.mark.parametrize("piece_nbytes", [4096, 4160, 65536 + 33])
def test_copy_takes_any_alignment(backend: Backend, offsets: tuple[int, int], piece_nbytes: int) -> None:
    assert_copies(backend, num_blocks=9, num_pieces=2, piece_nbytes=piece_nbytes, offsets=offsets)
    assert_copies(backend, num_blocks=40, num_pieces=2, piece_nbytes=piece_nbytes, offsets=offsets, gap=11)


@pytest.mark.parametrize("num_threads", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("num_blocks", "num_pieces", "piece_nbytes"), [(1, 1, 5 << 20), (3, 700, 4096), (50, 2, 50_001)]
)
def test_copy_is_the_same_with_threads(
    backend: Backend, num_threads: int, num_blocks: int, num_pieces: int, piece_nbytes: int
) -> None:
    assert_copies(
        backend, num_blocks=num_blocks, num_pieces=num_pieces, piece_nbytes=piece_nbytes, num_threads=num_threads
    )


@settings(max_examples=40, deadline=None)
@given(
    num_blocks=st.integers(0, 6),
    num_pieces=st.integers(0, 20),
    piece_nbytes=st.integers(1, 20_000),
    offsets=st.tuples(st.integers(0, 64), st.integers(0, 64)),
    gap=st.integers(0, 100),
)
def test_copy_of_any_shape(
    backend: Backend, num_blocks: int, num_pieces: int, piece_nbytes: int, offsets: tuple[int, int], gap: int
) -> None:
    assert_copies(
        backend, num_blocks=num_blocks, num_pieces=num_pieces, piece_nbytes=piece_nbytes, offsets=offsets, gap=gap
    )


def test_copy_accepts_strided_argument_arrays(backend: Backend) -> None:
    source, destination = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    pieces = np.arange(16, dtype=np.uint64)[::4]
    backend.copy_blocks(words(source.ctypes.data), words(destination.ctypes.data), pieces, pieces, 2)
    assert destination[:14].tolist() == [0, 1, 0, 0, 4, 5, 0, 0, 8, 9, 0, 0, 12, 13]


def copy_at_once(call: Callable[[], None], num_callers: int) -> None:
    """Make a call from several threads, begun together."""
    barrier = threading.Barrier(num_callers)
    failures: list[BaseException] = []

    def caller() -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller) for _ in range(num_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_from_several_threads_do_not_mix(backend: Backend) -> None:
    def copy_some() -> None:
        for _ in range(3):
            assert_copies(backend, num_blocks=4, num_pieces=3, piece_nbytes=40_000, num_threads=2)

    copy_at_once(copy_some, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_copies_with_threads_work_in_a_forked_child(backend: Backend, tmp_path: Path) -> None:
    script = (
        "import os, sys, numpy as np\n"
        "from kvbm._backend import load_backend\n"
        "backend = load_backend(sys.argv[1])\n"
        "source, zero = np.arange(1 << 20, dtype=np.uint64), np.zeros(1, np.uint64)\n"
        "def copy():\n"
        "    target = np.zeros_like(source)\n"
        "    ends = [np.array([a.ctypes.data], np.uint64) for a in (source, target)]\n"
        "    backend.copy_blocks(*ends, zero, zero, source.nbytes, num_threads=3)\n"
        "    return 0 if (source == target).all() else 1\n"
        "first = copy()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(copy())\n"
        "status = os.waitpid(child, 0)[1]\n"
        "sys.exit(first or copy() or status)\n"
    )
    subprocess.run([sys.executable, "-c", script, backend.name], check=True, timeout=60, cwd=tmp_path)


def test_every_kernel_gives_the_same_bytes_and_checksums(backend: Backend, tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np\n"
        "from kvbm._backend import load_backend\n"
        "backend = load_backend(sys.argv[1])\n"
        "source = np.random.default_rng(5).integers(0, 256, 900_000, dtype=np.uint8)\n"
        "target = np.zeros(len(source) + 128, np.uint8)\n"
        "start = target.ctypes.data + -target.ctypes.data % 64\n"
        "ends = [np.array([at], np.uint64) for at in (source.ctypes.data, start)]\n"
        "zero = np.zeros(1, np.uint64)\n"
        "sums = backend.copy_blocks(*ends, zero, zero, len(source), hashes=np.array([[3, 4]], np.uint64))\n"
        "offset = start - target.ctypes.data\n"
        "assert (target[offset:offset + len(source)] == source).all()\n"
        "print(sums[0], backend.cpu_features[-1])\n"
    )
    lines = []
    for cpu in ("baseline", "avx2", "avx512"):
        command = [sys.executable, "-c", script, backend.name]
        lines.append(
            subprocess.run(
                command,
                check=True,
                timeout=60,
                capture_output=True,
                text=True,
                env={**os.environ, "KVBM_CPU": cpu},
                cwd=tmp_path,
            ).stdout.split()
        )
    assert len({checksum for checksum, _ in lines}) == 1
    if backend.name == "native":
        assert lines[0][1] in ("sse2", "neon", "plain")


def test_copy_refuses_wrong_arguments(backend: Backend) -> None:
    one, two = words(0), words(0, 0)
    none = words()
    with pytest.raises(LayoutError, match="source_blocks must be a one-dimensional uint64 array"):
        backend.copy_blocks([0], one, one, one, 8)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"destination_pieces must be .* shape \(1, 1\) and dtype uint64"):
        backend.copy_blocks(one, one, one, one.reshape(1, 1), 8)
    with pytest.raises(LayoutError, match="got 2 entries for 1 source_blocks"):
        backend.copy_blocks(one, two, none, none, 8)
    with pytest.raises(LayoutError, match="got 1 entries for 2 source_pieces"):
        backend.copy_blocks(none, none, two, one, 8)
    with pytest.raises(LayoutError, match="piece_nbytes is -1, give 1 or more bytes"):
        backend.copy_blocks(none, none, one, one, -1)
    with pytest.raises(ConfigError, match="num_threads is 0, give 1 or more"):
        backend.copy_blocks(none, none, one, one, 8, num_threads=0)
    with pytest.raises(HashFormatError, match="hashes has 0 entries, need 1"):
        backend.copy_blocks(one, one, none, none, 8, hashes=np.empty((0, 2), np.uint64))
    with pytest.raises(TypeError):
        backend.copy_blocks(none, none, one, one, 8.0)  # type: ignore[arg-type]


def test_copy_bench_gives_a_row_a_case(backend: Backend) -> None:
    rows = copy.run(nbytes=1 << 20, rounds=1, backend=backend)
    assert [row["name"] for row in rows] == ["copy_1m", "copy_64k", "copy_1m_checksum", "copy_64k_checksum"]
    assert all(row["ratio"] == pytest.approx(row["median"] / row["reference"]) for row in rows)
