"""The simulation keeps CUDA's rules: kernels that break them fail as they would on a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = ROOT / "cuda" / "simulated"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the driver with")
    if not SIMULATED.is_dir():
        pytest.skip("the CUDA sources are not beside the tests")
    program = tmp_path_factory.mktemp("simulation") / "simulation_driver"
    sources = [Path(__file__).with_name("simulation_driver.cpp"), *sorted(SIMULATED.glob("*.cpp"))]
    flags = ["-std=c++17", "-O0", "-fno-strict-aliasing", "-pthread", "-Wall", "-Wextra"]
    flags += os.environ.get("KVBM_DRIVER_FLAGS", "").split()
    includes = [f"-I{SIMULATED}", f"-I{ROOT / 'cuda'}"]
    built = subprocess.run(
        [COMPILER, *flags, *includes, *map(str, sources), "-o", str(program)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert not built.stderr, built.stderr
    return program


def run(driver: Path, claim: str) -> list[str]:
    done = subprocess.run([driver, claim], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("claim", "answer"),
    [
        ("misaligned", "cudaErrorMisalignedAddress"),
        ("in_range", "cudaSuccess"),
        ("too_far", "cudaErrorIllegalAddress"),
        ("over_the_end", "cudaErrorIllegalAddress"),
        ("before", "cudaErrorIllegalAddress"),
        ("pageable", "cudaErrorIllegalAddress"),
        ("diverge_block", "cudaErrorLaunchFailure"),
        ("diverge_warp", "cudaErrorLaunchFailure"),
        ("foreign_lane", "cudaErrorLaunchFailure"),
        ("too_many_threads", "cudaErrorInvalidConfiguration"),
        ("no_blocks", "cudaErrorInvalidConfiguration"),
        ("too_much_shared", "cudaErrorInvalidConfiguration"),
        ("much_shared", "cudaSuccess"),
    ],
)
def test_kernel_ends_as_it_would_on_a_device(driver: Path, claim: str, answer: str) -> None:
    assert run(driver, claim)[0] == answer


def test_barriers_and_shuffles_add_up_a_block(driver: Path) -> None:
    answer, low, high, *_ = run(driver, "sum")
    assert answer == "cudaSuccess"
    assert int(low) + (int(high) << 32) == sum(range(5 * 256))


def test_lanes_exchange_as_the_manual_says(driver: Path) -> None:
    answer, *lanes = run(driver, "lanes")
    assert answer == "cudaSuccess"
    for lane, text in enumerate(lanes):
        down = lane + 3 if lane + 3 < 32 else lane
        assert int(text) == down | (lane ^ 5) << 8 | 1 << 16


def test_groups_of_a_warp_meet_by_themselves(driver: Path) -> None:
    answer, *lanes = run(driver, "groups")
    assert answer == "cudaSuccess"
    assert [int(text) for text in lanes] == [8] * 16 + [1] * 8 + [8] * 8


def test_reversed_threads_show_what_a_missing_barrier_hides(driver: Path) -> None:
    assert run(driver, "race")[1] == "7"
    assert run(driver, "race_reversed")[1] == str(0xA5A5A5A5)
