"""The kernels' index arithmetic, driven on the CPU over every small shape: each byte is touched exactly once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernel_site import fill_bytes

from kvbm._pure import copies

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the driver with")
    if not (ROOT / "cuda" / "index.cuh").exists():
        pytest.skip("the CUDA sources are not beside the tests")
    program = tmp_path_factory.mktemp("index") / "index_driver"
    includes = [f"-I{ROOT / 'cuda' / 'simulated'}", f"-I{ROOT / 'cuda'}"]
    source = Path(__file__).with_name("index_driver.cpp")
    built = subprocess.run(
        [COMPILER, "-std=c++17", "-O2", "-Wall", "-Wextra", *includes, str(source), "-o", str(program)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("claim", ["cuts", "rows", "huge", "joins", "tiles", "grids"])
def test_index_arithmetic_holds_for_every_small_shape(driver: Path, claim: str) -> None:
    done = subprocess.run([driver, claim], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 0


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 3])
def test_the_digest_of_a_chunk_equals_the_cpu_twin(driver: Path, seed: int) -> None:
    said = subprocess.run([driver, "digest", str(seed)], check=True, capture_output=True, text=True).stdout
    digest, term, checksum = (np.uint64(word) for word in said.split())
    expected = copies.xxh3_chunks(fill_bytes(seed, 4096).reshape(1, 4096))
    assert digest == expected[0]
    assert term == copies._avalanche(expected + np.uint64(7 * int(copies._PRIME64_1) % 2**64))[0]
    words = [np.array([(seed + i) % 2**64], dtype=np.uint64) for i in range(3)]
    name = copies._avalanche(words[1] + words[2] * copies._PRIME64_1)
    assert checksum == copies._avalanche(copies._avalanche(words[0] + np.uint64(4096)) ^ name)[0]
