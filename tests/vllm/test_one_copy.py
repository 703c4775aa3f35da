"""Two ranks of the real engine with MLA: their blocks are the same bytes, so rank 0 keeps one copy for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_site import Engine, keep_the_prefix_cache, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(70 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]
TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "dtype": "bfloat16"}


def test_two_ranks_with_mla_keep_one_copy_and_write_what_a_local_hit_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request at a time: in bfloat16 the text depends on which requests share a step."""
    keep_the_prefix_cache(monkeypatch)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one NUMA node has room for two ranks only so
    engine = start("deepseek", disk=tmp_path, **TWO)
    for group in engine.half._groups:
        assert len(group.channels.channels) == 1
        assert group.planner.pools[0].total_blocks * group.block_nbytes > 0.9 * (64 << 20), "the size is not divided"
    engine.generate(PROMPTS)
    local = [engine.generate([prompt]) for prompt in PROMPTS]
    tokens = engine.half._block_tokens
    assert [num for _, (num,) in local] == [(len(prompt) - 1) // tokens * tokens for prompt in PROMPTS]
    engine.forget()
    assert [engine.generate([prompt]) for prompt in PROMPTS] == local, "from host memory"
    engine.forget()
    engine.forget_memory()
    assert [engine.generate([prompt]) for prompt in PROMPTS] == local, "from the disk"
    engine.calm()
    engine.close()
    assert sorted({file.name.partition(".")[0] for file in tmp_path.iterdir()}) == ["rank0"], "one slab"
