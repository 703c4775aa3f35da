"""Two ranks of the real engine, each with a slab of its own: a block is there when both have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(50 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]
WHOLE = [256, 448, 640]
TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_ranks_write_the_same_and_compute_what_one_of_them_lost(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one NUMA node has room for two ranks only so
    engine = start(disk=tmp_path, **TWO)
    cold, cached = engine.generate(PROMPTS)
    assert cached == [0, 0, 0]
    engine.forget()
    assert engine.generate(PROMPTS) == (cold, WHOLE), "from host memory"
    engine.forget()
    engine.forget_memory()
    assert engine.generate(PROMPTS) == (cold, WHOLE), "from the disk"
    engine.calm()
    engine.close()
    for file in tmp_path.glob("rank1.*"):
        file.unlink()
    engine = start(disk=tmp_path, **TWO)
    assert engine.generate(PROMPTS) == (cold, [0, 0, 0]), "one rank's slab is gone"
    engine.forget()
    engine.forget_memory()
    assert engine.generate(PROMPTS) == (cold, WHOLE), "what was computed again is on both disks again"
    engine.calm()
