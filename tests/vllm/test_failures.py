"""The real engine writes the right text whatever happens to the bytes below it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm_site import Engine, Texts, keep_the_prefix_cache, need_model, needs_vllm, prompt_of

from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Job, JobResult, Outcome
from kvbm.types import Tier

pytestmark = needs_vllm
Start = Callable[..., Engine]
_EXPONENT = 103  # of a float32 or bfloat16 in a block: with this bit the other way the number is another one by 2**128
PROMPTS = [prompt_of(30 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]


def flip_bits_on_disk(folder: Path) -> None:
    """Flip a bit in every 64 KiB of the slab."""
    (slab,) = folder.glob("*.blocks")
    with slab.open("r+b") as file:
        for place in range(_EXPONENT, slab.stat().st_size, 64 << 10):
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 0x40]))


def flip_bits_in_memory(engine: Engine, places: slice = slice(None)) -> None:
    """Flip a bit in blocks of the host tier, of those that hold something."""
    for shard in engine.worker._shards:
        memory: Any = shard.storages[Tier.HOST]
        rows = memory.buffers[0].reshape(memory.num_blocks, -1)
        (used,) = rows.any(axis=1).nonzero()
        rows[used[places], _EXPONENT] ^= 0x40


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("places", [slice(None), slice(3, 4)], ids=["every block", "one block"])
def test_flipped_bits_in_host_memory_change_no_text(start: Start, kind: str, places: slice) -> None:
    engine = start(kind)
    cold, _ = engine.generate(PROMPTS)
    engine.forget()
    flip_bits_in_memory(engine, places)
    assert engine.generate(PROMPTS)[0] == cold
    assert engine.count("mismatches") > 0
    engine.forget()
    assert engine.generate(PROMPTS) == (cold, [256, 448, 640]), "what was computed again is kept again"
    engine.calm()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_flipped_bits_on_the_disk_change_no_text(start: Start, tmp_path: Path, kind: str) -> None:
    engine = start(kind, disk=tmp_path)
    cold, _ = engine.generate(PROMPTS)
    engine.calm()
    engine = start(kind, disk=tmp_path)
    for folder in (tmp_path, *tmp_path.glob("group*")):
        flip_bits_on_disk(folder)
    assert engine.generate(PROMPTS)[0] == cold
    assert engine.count("mismatches") > 0
    engine.forget()
    assert engine.generate(PROMPTS) == (cold, [256, 448, 640])
    engine.calm()


@pytest.mark.vllm_smoke
def test_a_block_that_memory_lost_is_computed_although_the_disk_has_it(start: Start, tmp_path: Path) -> None:
    engine = start(disk=tmp_path)
    cold, _ = engine.generate(PROMPTS)
    engine.forget()
    flip_bits_in_memory(engine)
    assert engine.generate(PROMPTS)[0] == cold
    assert engine.count("mismatches") > 0
    engine.calm()


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every block of a copy fail with a probability of 10 %; gives the numbers of jobs that were hit."""
    rng, hit = random.Random(5), []
    execute = Executor.execute

    def lose(self: Executor, job: Job, deadline: float | None = None) -> JobResult:
        result = execute(self, job, deadline)
        if not isinstance(job, CopyJob):
            return result
        is_lost = [rng.random() < 0.1 for _ in job.hashes]
        if any(is_lost):
            hit.append(job.job_id)
            outcomes = result.outcomes.copy()
            outcomes[is_lost] = Outcome.FAILED
            result = msgspec.structs.replace(result, outcomes=outcomes, reason="lost on purpose")
        return result

    monkeypatch.setattr(Executor, "execute", lose)
    return hit


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_copies_that_fail_at_random_change_no_text(start: Start, tmp_path: Path, lossy: list[int], kind: str) -> None:
    expected, _ = start(kind, has_connector=False).generate(PROMPTS)
    engine = start(kind, disk=tmp_path)
    for round_number in range(6):
        assert engine.generate(PROMPTS)[0] == expected
        engine.forget()
        if round_number % 2:
            engine.forget_memory()
    assert lossy
    engine.calm()
    engine = start(kind, disk=tmp_path)
    assert engine.generate(PROMPTS)[0] == expected
    engine.calm()


# -- MLA: the text depends on how much of the prompt is cached, and in bfloat16 on which requests share a step ---------


@pytest.fixture
def start_latent(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start engines whose hits are loaded although vLLM's texts behind hits are not the cold ones."""
    need_model("deepseek")
    keep_the_prefix_cache(monkeypatch)
    return lambda **arguments: start("deepseek", dtype="bfloat16", **arguments)


def alone(engine: Engine) -> list[tuple[Texts, int]]:
    """Give each prompt's text, and how many of its tokens were there when it began to be computed.

    vLLM tells how many were promised.
    """
    began: list[int] = []
    half = engine.half
    half.orders = lambda output: (
        began.extend(new.num_computed_tokens for new in output.scheduled_new_reqs) or type(half).orders(half, output)
    )
    texts = [engine.generate([prompt])[0] for prompt in PROMPTS]
    del half.orders
    return list(zip(texts, began, strict=True))


def see_texts_of_own_hits(start_latent: Start, told: list[tuple[Texts, int]]) -> None:
    """See that each text is what an engine writes behind a hit of that length in its own cache."""
    engine = start_latent(has_connector=False)
    manager = engine.vllm_scheduler.kv_cache_manager.coordinator
    find = manager.find_longest_cache_hit
    expected: dict[tuple[int, int], Texts] = {}
    for index, (text, num_cached) in enumerate(told):
        index %= len(PROMPTS)
        if (index, num_cached) not in expected:
            assert engine.llm.reset_prefix_cache()
            engine.generate([PROMPTS[index]])
            manager.find_longest_cache_hit = lambda names, most, n=num_cached: find(names, min(most, n))
            hit = engine.generate([PROMPTS[index]])
            assert hit[1] == [num_cached]
            expected[index, num_cached] = hit[0]
            manager.find_longest_cache_hit = find
        assert text == expected[index, num_cached], f"prompt {index} behind {num_cached} cached tokens"


@pytest.mark.parametrize("places", [slice(None), slice(3, 4)], ids=["every block", "one block"])
def test_flipped_bits_in_host_memory_change_no_text_of_mla(start_latent: Start, places: slice) -> None:
    engine = start_latent()
    whole = [(len(prompt) - 1) // engine.half._block_tokens * engine.half._block_tokens for prompt in PROMPTS]
    alone(engine)
    engine.forget()
    flip_bits_in_memory(engine, places)
    told = alone(engine)
    assert engine.count("mismatches") > 0
    num_short = sum(num_there < most for (_, num_there), most in zip(told, whole, strict=True))
    assert num_short == (1 if places.stop else len(PROMPTS))
    engine.calm()
    see_texts_of_own_hits(start_latent, told)


def test_flipped_bits_on_the_disk_change_no_text_of_mla(start_latent: Start, tmp_path: Path) -> None:
    engine = start_latent(disk=tmp_path)
    alone(engine)
    engine.calm()
    engine = start_latent(disk=tmp_path)
    flip_bits_on_disk(tmp_path)
    told = alone(engine)
    assert engine.count("mismatches") > 0
    engine.calm()
    see_texts_of_own_hits(start_latent, told)


def test_copies_that_fail_at_random_change_no_text_of_mla(
    start_latent: Start, tmp_path: Path, lossy: list[int]
) -> None:
    engine = start_latent(disk=tmp_path)
    told = []
    for round_number in range(4):
        told += alone(engine)
        engine.forget()
        if round_number % 2:
            engine.forget_memory()
        told += alone(engine)
        engine.settle()
        assert engine.llm.reset_prefix_cache(reset_connector=True), "else blocks that were computed behind hits stay"
    assert lossy
    assert len({num_there for _, num_there in told}) > 2, "else this proves little"
    engine.calm()
    see_texts_of_own_hits(start_latent, told)
