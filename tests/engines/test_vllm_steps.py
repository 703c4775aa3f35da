"""What the connector reads from vLLM's steps; without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvbm.testing.fake_engine import vllm_stand_ins


@pytest.mark.parametrize(
    ("scheduled", "drafts", "num_prompt"),
    [
        ({}, {}, 0),
        ({"a": 1, "b": 1}, {}, 0),
        ({"a": 512, "b": 1}, {}, 512),
        ({"a": 3, "b": 1, "c": 1, "d": 1}, {}, 0),  # decoding takes most of it
        ({"a": 4, "b": 4}, {"a": [1, 2, 3], "b": [1, 2, 3]}, 0),
        ({"a": 4, "b": 3}, {"a": [1, 2, 3], "b": [1]}, 0),
        ({"a": 512, "b": 4}, {"b": [1, 2, 3]}, 512),
        ({"a": 4, "b": 4}, None, 8),
    ],
    ids=["nothing", "decoding", "a prompt", "a short prompt", "drafts", "few drafts", "both", "before drafts"],
)
def test_tokens_of_prompts_are_told_from_those_of_texts(
    scheduled: dict[str, int], drafts: dict[str, list[int]] | None, num_prompt: int
) -> None:
    output = SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=drafts,
    )
    with vllm_stand_ins(forget=["kvbm.engines.vllm"]):
        from kvbm.engines.vllm.scheduler import _prompt_tokens

        assert _prompt_tokens(output) == num_prompt
