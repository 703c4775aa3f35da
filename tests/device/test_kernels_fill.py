"""Fill gives splitmix64's bytes at any address and length, and touches nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from kernel_site import GPUS, Gpu, fill_bytes, open_gpu


@pytest.fixture(params=GPUS, scope="module")
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from open_gpu(request.param)


@pytest.mark.parametrize("shift", [0, 1, 4, 8, 15])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 2047, 2048, 2049, 100_000])
def test_fill_writes_the_seeds_bytes_and_no_others(gpu: Gpu, nbytes: int, shift: int) -> None:
    memory = gpu.memory(nbytes + 16)
    expected = memory.image()
    at = memory.index(memory.address) + shift
    expected[at : at + nbytes] = fill_bytes(2**63 + 5, nbytes)
    gpu.device.fill(gpu.stream, memory.address + shift, nbytes, 2**63 + 5)
    gpu.stream.synchronize()
    np.testing.assert_array_equal(memory.image(), expected)
    gpu.release()


def test_bytes_of_another_seed_differ() -> None:
    assert (fill_bytes(1, 4096) != fill_bytes(2, 4096)).mean() > 0.9
    # The first output of splitmix64 for the seed 1234567, as its author's C program prints it.
    assert int(fill_bytes(1234567, 8).view(np.uint64)[0]) == 6457827717110365317
