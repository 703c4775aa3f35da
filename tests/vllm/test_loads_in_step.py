"""Loads that a step's own pass reads, in the real engine: the same text, whatever happens to the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

from kvbm.types import Tier

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(60 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]
SYNC: dict[str, Any] = {"host": "64MiB", "loads": "sync"}
_EXPONENT = 103  # of a float32 in a block: with this bit the other way the number is another one by 2**128


def spoil(engine: Engine) -> None:
    for shard in engine.worker._shards:
        memory: Any = shard.storages[Tier.HOST]
        rows = memory.buffers[0].reshape(memory.num_blocks, -1)
        (used,) = rows.any(axis=1).nonzero()
        rows[used, _EXPONENT] ^= 0x40


def test_loads_in_the_step_write_the_same_text(start: Start) -> None:
    engine = start(extra=SYNC)
    orders = []
    core = engine.worker._core
    begin = core.begin_sync_loads
    core.begin_sync_loads = lambda *a, **k: (orders.extend(core._step_loads._orders), begin(*a, **k))[1]
    cold, _ = engine.generate(PROMPTS)
    engine.forget()
    assert not orders
    assert engine.generate(PROMPTS) == (cold, [256, 448, 640])
    assert orders, "the loads were not the step's own"
    engine.calm()


@pytest.mark.parametrize("budget", [2048, 128])
def test_bad_bytes_of_a_step_spoil_no_text_and_are_saved_by_nobody(start: Start, budget: int) -> None:
    long = [prompt + prompt_of(90 + i, 400) for i, prompt in enumerate(PROMPTS)]
    expected, _ = start(has_connector=False).generate(long)
    engine = start(extra=SYNC, max_num_batched_tokens=budget, enable_chunked_prefill=True)
    engine.generate(PROMPTS)
    engine.forget()
    spoil(engine)
    assert engine.generate(long)[0] == expected
    assert engine.count("mismatches") > 0
    engine.forget()
    assert engine.generate(long)[0] == expected
    engine.calm()
