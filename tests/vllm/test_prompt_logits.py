"""Where the prompt's own logits are asked for, each of its tokens is computed, whatever is cached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPT = prompt_of(95, 300)


def logits_of(engine: Engine) -> tuple[list[float], int]:
    """Give the logarithm of each token's probability, those of the prompt first, and how many were cached."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    (out,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
    tokens = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
    return [one.logprob for token in tokens for one in token.values()], out.num_cached_tokens


def test_a_prompt_whose_logits_are_asked_for_is_computed_and_its_blocks_are_kept(start: Start) -> None:
    expected, _ = logits_of(start(has_connector=False))
    engine = start()
    for _ in range(2):
        found, num_cached = logits_of(engine)
        assert found == pytest.approx(expected, abs=1e-4)
        assert num_cached == 0
        engine.forget()
    assert engine.generate([PROMPT])[1] == [256], "others load them"
    engine.calm()
