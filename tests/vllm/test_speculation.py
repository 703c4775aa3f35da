"""The real engine guesses tokens ahead and drops those that were wrong: what it saves is never a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_site import HAS_VLLM, Engine, Texts, Tokens, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
PROMPTS = [prompt_of(200 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]
CACHED = [256, 448, 640]
NUM_WRITTEN = 80  # more than a block
FEW = list(range(100, 103))  # that may be written: the text repeats itself, and guesses are right now and then


@pytest.fixture(autouse=True, scope="module")
def engines_start_behind_a_guessing_one() -> None:
    """Let vLLM look through llvmlite, which guessing loads, when this process starts another engine; it stays so.

    vLLM asks whatever modules hold for its ``__dict__``, and llvmlite's library gives a function for any name.
    """
    if HAS_VLLM:
        from llvmlite.binding import ffi

        ffi.lib._fntab.setdefault("__dict__", {})


def write(engine: Engine, prompts: list[Tokens], num_tokens: int = NUM_WRITTEN) -> tuple[Texts, list[int]]:
    """Give the tokens of each prompt's text, and how many of its own each found cached."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, allowed_token_ids=FEW)
    try:
        outs = engine.llm.generate([{"prompt_token_ids": one} for one in prompts], greedy, use_tqdm=False)
    except TypeError as error:  # in vLLM 0.30, with the first guess, wherever Triton is not
        if "Cannot inspect kernel parameters" not in str(error):
            raise
        pytest.skip(f"this vLLM does not drop wrong guesses on a CPU: {error}")
    return [tuple(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens for out in outs]


def guesses(engine: Engine) -> tuple[int, int]:
    """Count the tokens that were guessed, and those that were right."""
    counted: dict[str, Any] = {metric.name: metric for metric in engine.llm.get_metrics()}
    guessed, right = (counted[f"vllm:spec_decode_num_{what}_tokens"].value for what in ("draft", "accepted"))
    return int(guessed), int(right)


def test_an_engine_that_guesses_writes_the_same_from_every_tier_and_after_a_restart(
    start: Start, tmp_path: Path
) -> None:
    expected, _ = write(start(has_connector=False), PROMPTS)
    engine = start(disk=tmp_path, speculative_config=NGRAM)
    before = guesses(engine)
    assert write(engine, PROMPTS) == (expected, [0, 0, 0])
    guessed, right = (now - then for now, then in zip(guesses(engine), before, strict=True))
    assert 0 < right < guessed, "guesses are neither dropped nor kept"
    engine.forget()
    assert write(engine, PROMPTS) == (expected, CACHED), "from host memory"
    engine.calm()
    engine = start(disk=tmp_path, speculative_config=NGRAM)
    assert write(engine, PROMPTS) == (expected, CACHED), "in a fresh engine"
    engine.calm()


def test_blocks_that_were_written_while_guessing_hold_the_text_itself(start: Start) -> None:
    engine = start(speculative_config=NGRAM)
    texts, _ = write(engine, PROMPTS)
    engine.forget()
    half = NUM_WRITTEN - 8
    more = [prompt + list(text[:half]) for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert write(engine, more, 8) == ([text[half:] for text in texts], [320, 512, 768])
    engine.calm()
