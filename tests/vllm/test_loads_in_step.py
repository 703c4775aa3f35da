"""Loads that a step's own pass reads, in the real engine: the same text, whatever happens to the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm_site import Engine, keep_the_prefix_cache, need_model, needs_vllm, prompt_of

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


def orders_of(engine: Engine) -> list[Any]:
    """Give the list that the loads are added to which steps have of their own."""
    orders: list[Any] = []
    core = engine.worker._core
    begin = core.begin_sync_loads
    core.begin_sync_loads = lambda *a, **k: (orders.extend(core._step_loads._orders), begin(*a, **k))[1]
    return orders


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_loads_in_the_step_write_the_same_text(start: Start, kind: str) -> None:
    engine = start(kind, extra=SYNC)
    orders = orders_of(engine)
    cold, _ = engine.generate(PROMPTS)
    engine.forget()
    assert not orders
    assert engine.generate(PROMPTS) == (cold, [256, 448, 640])
    is_one_group = kind == "llama"
    assert bool(orders) == is_one_group, "the loads of one group are the step's own, those of more are not"
    engine.calm()


def test_loads_in_the_step_write_what_a_hit_in_the_engines_own_cache_does(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLA, and one request at a time: in bfloat16 the text depends on which requests share a step."""
    need_model("deepseek")
    keep_the_prefix_cache(monkeypatch)
    engine = start("deepseek", extra=SYNC, dtype="bfloat16")
    orders = orders_of(engine)
    for prompt in PROMPTS:
        engine.generate([prompt])
    local = [engine.generate([prompt]) for prompt in PROMPTS]
    assert not orders, "the engine's own cache had it all"
    engine.forget()
    assert [engine.generate([prompt]) for prompt in PROMPTS] == local
    assert len(orders) == len(PROMPTS)
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
