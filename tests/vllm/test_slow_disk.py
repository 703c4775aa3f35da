"""A disk that is slower than computing is left alone once that is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from throttle import Throttle
from vllm_site import Engine, Tokens, needs_vllm, prompt_of

from kvbm.types import Tier

pytestmark = needs_vllm
Start = Callable[..., Engine]
NUM_TOKENS = 1024
NUM_LEARNING, NUM_PAIRS = 20, 7


def test_a_throttled_disk_delays_no_first_token_once_that_is_known(start: Start, tmp_path: Path) -> None:
    extra = {"host": "128MiB", "disk": {"path": str(tmp_path), "size": "256MiB"}}
    sizes = {"block_size": 128, "max_model_len": NUM_TOKENS + 128}
    engine = start("llama26m", extra=extra, learns_speed=True, dtype="bfloat16", **sizes)
    prompts = [prompt_of(100 + number, NUM_TOKENS) for number in range(3 + NUM_PAIRS)]

    def first_token(prompt: Tokens) -> tuple[float, int]:
        began = time.perf_counter()
        _, (num_cached,) = engine.generate([prompt], 1)
        return time.perf_counter() - began, num_cached

    def from_disk(prompt: Tokens) -> tuple[float, int]:
        engine.forget()
        engine.forget_memory()
        return first_token(prompt)

    kept = prompts[0]
    computing_s = sorted(first_token(prompt)[0] for prompt in prompts[:3])
    engine.settle()
    disk = engine.worker._shards[0].storages[Tier.DISK]
    nbytes = NUM_TOKENS // sizes["block_size"] * disk.layout.block_nbytes
    Throttle(nbytes / (3 * computing_s[1])).put_on(disk)
    for _ in range(NUM_LEARNING):
        from_disk(kept)
    pairs = [(first_token(unseen)[0], *from_disk(kept)) for unseen in prompts[3:]]
    late = [pair for pair in pairs if pair[2] and pair[1] > 1.1 * pair[0]]  # where nothing is loaded, nothing waits
    assert len(late) <= 1, pairs
    engine.calm()
