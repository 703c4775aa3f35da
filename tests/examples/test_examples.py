"""Every example runs on both twins, prints something, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbm._backend import Backend

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("vllm"))  # those: tests/vllm


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, backend: Backend, tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        env={**os.environ, "KVBM_BACKEND": backend.name},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout
    assert not list(tmp_path.iterdir())


def test_there_are_examples() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {"quickstart", "custom_eviction_policy", "tiny_transformer"} <= names
    assert {"three_tiers", "two_managers", "asyncio_requests", "custom_storage"} <= names
