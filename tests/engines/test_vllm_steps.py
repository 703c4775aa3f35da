"""What the connector reads from vLLM's steps; without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from books_site import DIGESTS, NUM_TOKENS, BooksSite

from kvbm._backend import Backend
from kvbm.engines.digests import Digests
from kvbm.testing.fake_engine import vllm_stand_ins
from kvbm.types import Tier


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


def test_a_request_that_may_not_read_cached_blocks_is_given_none_and_keeps_its_variant(backend: Backend) -> None:
    host = BooksSite(backend, tier=Tier.HOST)
    with vllm_stand_ins(forget=["kvbm.engines.vllm"]):
        from kvbm.engines.vllm import scheduler

        half = scheduler.VllmScheduler.__new__(scheduler.VllmScheduler)
        half._core, half._has_no_use, half._asked = host.core, False, {}
        about = {"block_hashes": DIGESTS, "num_tokens": NUM_TOKENS, "lora_request": None}
        request = SimpleNamespace(request_id="a", skip_reading_prefix_cache=False, **about)
        assert half.matched_tokens(request, 0) == (NUM_TOKENS - 1, True)
        request = SimpleNamespace(request_id="b", skip_reading_prefix_cache=True, **about)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "variant_of", lambda adapter: 7)
            assert half.matched_tokens(request, 0) == (0, False)
    assert host.core._requests["b"].digests.extend(DIGESTS)[0].tolist() != Digests().extend(DIGESTS)[0].tolist()
