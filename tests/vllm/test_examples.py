"""The offline example, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_site import ENVIRONMENT, needs_vllm

pytestmark = needs_vllm
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "vllm_offline.py"


def test_the_second_life_of_the_example_is_warm(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, str(EXAMPLE), str(model_of("llama")), "--disk", str(tmp_path), "--tokens", "2000", "--eager"],
        env={**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    cached = [int(number) for number in re.findall(r"(\d+) of 2000 tokens cached", answer.stdout)]
    assert len(cached) == 2
    assert cached[0] == 0
    assert "the text is the same" in answer.stdout
