"""The real engine writes the same text cold, from its own cache, from our tiers, and after a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_site import Engine, Texts, keep_the_prefix_cache, need_model, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]


def alone(engine: Engine) -> list[tuple[Texts, list[int]]]:
    return [engine.generate([prompt]) for prompt in PROMPTS]


def whole_blocks(block_size: int) -> list[int]:
    return [(len(prompt) - 1) // block_size * block_size for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [
        ("llama", 32),
        pytest.param("llama", 64, marks=pytest.mark.vllm_smoke),
        ("llama", 128),
        ("llama", 256),
        ("mha", 64),
    ],
)
def test_llama_writes_the_same_from_every_tier_and_after_a_restart(
    start: Start, tmp_path: Path, kind: str, block_size: int
) -> None:
    engine = start(kind, disk=tmp_path, block_size=block_size)
    cold, cached = engine.generate(PROMPTS)
    assert cached == [0, 0, 0]
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "from the engine's own cache"
    engine.forget()
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "from host memory"
    engine.forget()
    engine.forget_memory()
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "from the disk"
    engine.calm()
    engine = start(kind, disk=tmp_path, block_size=block_size)
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "in a fresh engine"
    engine.calm()


@pytest.mark.parametrize(
    ("kind", "num_blocks", "num_tokens"),
    [pytest.param("llama", 45, 120, marks=pytest.mark.vllm_smoke), ("gemma3", 50, 200)],
)
def test_requests_that_are_preempted_write_the_same(
    start: Start, tmp_path: Path, kind: str, num_blocks: int, num_tokens: int
) -> None:
    prompts = [prompt_of(10 + seed, 500) for seed in range(6)]
    expected, _ = start(kind, has_connector=False).generate(prompts, num_tokens)
    engine = start(kind, disk=tmp_path, num_gpu_blocks_override=num_blocks, max_model_len=1024)
    preempted = []
    core = engine.half._core
    engine.half._core.preempted = lambda request_id: (
        preempted.append(request_id) or type(core).preempted(core, request_id)
    )
    assert engine.generate(prompts, num_tokens)[0] == expected
    assert preempted, "the engine's memory was large enough"
    engine.forget()
    assert engine.generate(prompts, num_tokens)[0] == expected
    engine.calm()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prompt_in_chunks_writes_the_same(start: Start, kind: str) -> None:
    expected, _ = start(kind, has_connector=False).generate(PROMPTS)
    engine = start(kind, max_num_batched_tokens=128, enable_chunked_prefill=True)
    assert engine.generate(PROMPTS)[0] == expected
    engine.forget()
    assert engine.generate(PROMPTS) == (expected, whole_blocks(64))
    engine.calm()


def test_an_engine_that_sleeps_amid_requests_goes_on_with_the_same_text(start: Start) -> None:
    """As far as it can on a CPU: requests stop and go on, at level 1 without their blocks; no memory goes away."""
    from vllm import SamplingParams

    engine = start()
    expected, _ = engine.generate(PROMPTS, 40)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    core = engine.llm.llm_engine
    for level in (0, 1):
        engine.forget()
        for index, prompt in enumerate(PROMPTS):
            core.add_request(f"{level}-{index}", {"prompt_token_ids": prompt}, greedy)
        written: dict[str, tuple[int, ...]] = {}
        while len(written) < len(PROMPTS):  # vLLM does not sleep at level 1 while requests wait for loads
            written |= {out.request_id: tuple(out.outputs[0].token_ids) for out in core.step()}
        assert max(map(len, written.values())) < 40
        engine.llm.sleep(level=level, mode="keep")
        assert core.is_sleeping()
        engine.llm.wake_up(["scheduling"] if level == 0 else None)
        assert not core.is_sleeping()
        while core.has_unfinished_requests():
            written |= {out.request_id: tuple(out.outputs[0].token_ids) for out in core.step()}
        assert [written[f"{level}-{index}"] for index in range(len(PROMPTS))] == expected
    engine.forget()
    assert engine.generate(PROMPTS, 40)[0] == expected
    engine.calm()


def test_the_last_request_reaches_the_disk_although_no_other_follows(start: Start, tmp_path: Path) -> None:
    engine = start(disk=tmp_path)
    engine.generate(PROMPTS[2:], 1)  # its blocks reach memory when the engine has nothing more to compute
    engine.settle()
    _, disk = engine.pools
    assert disk.status().inactive == len(PROMPTS[2]) // 64


def test_prompts_of_whole_blocks_leave_a_token_to_compute(start: Start) -> None:
    prompts = [prompt_of(20, 256), prompt_of(21, 64)]
    engine = start()
    cold, _ = engine.generate(prompts)
    engine.forget()
    assert engine.generate(prompts) == (cold, [192, 0])
    engine.calm()


def test_another_salt_finds_nothing(start: Start) -> None:
    engine = start()
    cold, _ = engine.generate(PROMPTS, cache_salt="one")
    engine.forget()
    assert engine.generate(PROMPTS, cache_salt="two") == (cold, [0, 0, 0])
    engine.forget()
    assert engine.generate(PROMPTS, cache_salt="one") == (cold, whole_blocks(64))
    engine.calm()


@pytest.mark.parametrize("block_size", [32, pytest.param(64, marks=pytest.mark.vllm_smoke), 128])
def test_gemma3_with_two_groups_of_layers_writes_the_same(start: Start, tmp_path: Path, block_size: int) -> None:
    engine = start("gemma3", disk=tmp_path, block_size=block_size)
    assert len(engine.half._groups) == 2
    assert engine.half._block_tokens == block_size
    cold, _ = engine.generate(PROMPTS)
    assert engine.generate(PROMPTS)[0] == cold
    engine.forget()
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size))
    engine.forget()
    engine.forget_memory()
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "from the disk"
    engine.calm()
    engine = start("gemma3", disk=tmp_path, block_size=block_size)
    assert engine.generate(PROMPTS) == (cold, whole_blocks(block_size)), "in a fresh engine"
    engine.calm()


@pytest.mark.parametrize("budget", [2048, 128], ids=["whole", "in chunks"])
def test_deepseek_writes_what_a_hit_in_the_engines_own_cache_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """One request at a time: in bfloat16 the text depends on which requests share a step."""
    need_model("deepseek")
    keep_the_prefix_cache(monkeypatch)
    more = {"dtype": "bfloat16", "max_num_batched_tokens": budget, "enable_chunked_prefill": True}
    engine = start("deepseek", has_connector=False, **more)
    alone(engine)
    local = alone(engine)
    engine = start("deepseek", disk=tmp_path, **more)
    assert [cached for _, (cached,) in local] == whole_blocks(engine.half._block_tokens), "the kernel chooses the size"
    assert [cached for _, (cached,) in alone(engine)] == [0, 0, 0]
    engine.forget()
    assert alone(engine) == local, "from host memory"
    engine.forget()
    engine.forget_memory()
    assert alone(engine) == local, "from the disk"
    engine.calm()
    engine = start("deepseek", disk=tmp_path, **more)
    assert alone(engine) == local, "in a fresh engine"
    engine.calm()


def test_nothing_is_loaded_where_a_hit_would_change_the_text(start: Start, tmp_path: Path) -> None:
    """MLA on a CPU without AMX: vLLM turns its own prefix cache off there."""
    prompts = [prompt_of(60, 300), prompt_of(61, 500)]
    cold = [start("deepseek", has_connector=False).generate([prompt]) for prompt in prompts]
    engine = start("deepseek", disk=tmp_path)
    if engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        pytest.skip("this CPU has AMX: a hit changes no text here")
    for _ in range(2):
        assert [engine.generate([prompt]) for prompt in prompts] == cold
    assert all(pool.status().inactive == 0 for pool in engine.pools)
    engine.calm()
