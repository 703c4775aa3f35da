"""``benchmarks/gpu.sh``: every step is told of, and one that fails fails the whole."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
STEPS = ("build", "info", "tests", "tune", "bench", "memcheck", "racecheck")
# In the place of the interpreter: fails for one step, and says what it was asked for.
INTERPRETER = """#!/bin/sh
echo "$@"
case "$*" in *"{word}"*) exit {code} ;; esac
"""

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and timeout"
)


def run_script(folder: Path, *arguments: str, word: str = "nothing of it", code: int = 0) -> tuple[int, dict[str, str]]:
    """Run it; give its status and the result of each step."""
    interpreter = folder / "interpreter"
    interpreter.write_text(INTERPRETER.format(word=word, code=code))
    interpreter.chmod(0o755)
    answer = subprocess.run(
        ["bash", str(SCRIPT), *arguments, str(folder / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": str(interpreter)},
    )
    table = answer.stdout.partition("\nstep ")[2].splitlines()[1:]
    results = {line.split()[0]: line[11:21].strip() for line in table if line.split()[0] in STEPS}
    return answer.returncode, results


def test_all_steps_but_the_sanitizer_run_without_a_gpu(tmp_path: Path) -> None:
    status, results = run_script(tmp_path, "--simulated")
    assert status == 0
    assert tuple(results) == STEPS
    assert results == dict.fromkeys(STEPS, "passed") | {"memcheck": "not run", "racecheck": "not run"}
    assert "--no-build-isolation --no-deps" in (tmp_path / "out" / "build.log").read_text()
    assert "-m not gpu" in (tmp_path / "out" / "tests.log").read_text()


@pytest.mark.parametrize(("step", "word"), [("tests", "-m pytest"), ("tune", " tune "), ("bench", "bench gpu")])
def test_step_that_fails_fails_the_whole_and_the_others_run(tmp_path: Path, step: str, word: str) -> None:
    status, results = run_script(tmp_path, "--simulated", word=word, code=3)
    assert status == 1
    assert [name for name, result in results.items() if result == "FAILED"] == [step]
    assert len(results) == len(STEPS)


def test_nothing_runs_on_what_could_not_be_built(tmp_path: Path) -> None:
    status, results = run_script(tmp_path, word="-m pip", code=1)
    assert (status, results) == (1, {"build": "FAILED"})


def test_step_that_ends_at_its_limit_is_told_apart(tmp_path: Path) -> None:
    status, results = run_script(tmp_path, "--simulated", word="bench gpu", code=124)
    assert (status, results["bench"]) == (1, "TIMED OUT")


def test_sanitizer_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    if shutil.which("compute-sanitizer", path="/usr/local/bin:/usr/bin:/bin"):
        pytest.skip("compute-sanitizer is installed")
    status, results = run_script(tmp_path)
    assert status == 1
    assert (results["memcheck"], results["racecheck"]) == ("FAILED", "FAILED")
    assert "-m gpu" in (tmp_path / "out" / "tests.log").read_text()


def test_steps_that_are_not_named_are_left_out(tmp_path: Path) -> None:
    status, results = run_script(tmp_path, "--simulated", "--steps", "tune,bench", word="-m pytest", code=3)
    assert status == 0
    assert [name for name, result in results.items() if result == "passed"] == ["tune", "bench"]
    assert {result for name, result in results.items() if name in ("build", "info", "tests")} == {"left out"}
    assert not (tmp_path / "out" / "build.log").exists()


def test_budget_that_is_over_is_a_failure(tmp_path: Path) -> None:
    status, results = run_script(tmp_path, "--simulated", "--budget", "4")
    assert (status, results) == (1, {"build": "NO TIME"})


def test_bench_fails_where_a_bar_is_missed(tmp_path: Path) -> None:
    run_script(tmp_path, "--simulated", "--steps", "bench")
    assert "bench gpu --bars --json" in (tmp_path / "out" / "bench.log").read_text()


@pytest.mark.parametrize(
    "arguments", [["--all"], ["--steps", "build,burn"], ["--steps", ","], ["--budget", "0"], ["--budget", "long"]]
)
def test_what_is_not_known_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    status, results = run_script(tmp_path, *arguments)
    assert (status, results) == (2, {})
