"""`import kvbm` is cheap and pulls in nothing that it can do without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "cuda", "cupy", "pycuda", "zmq", "nats", "vllm", "sglang", "obstore", "matplotlib", "pytest", "typer"}
LIMIT_S = 0.150
NUM_RUNS = 5

MODULES = "import sys, json, kvbm; print(json.dumps(sorted(sys.modules)))"
# The thread's processor time, so that neither a busy machine nor BLAS threads count; NumPy's import is included.
SECONDS = "import time; start = time.thread_time(); import kvbm; print(time.thread_time() - start)"


def run(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_import_loads_no_heavy_module(tmp_path: Path) -> None:
    loaded = {name.partition(".")[0] for name in json.loads(run(MODULES, tmp_path))}
    assert not loaded & HEAVY


def test_import_stays_under_its_limit(tmp_path: Path) -> None:
    best_s = min(float(run(SECONDS, tmp_path)) for _ in range(NUM_RUNS))
    assert best_s < LIMIT_S, f"import kvbm took {best_s * 1000:.0f} ms at best of {NUM_RUNS}"
