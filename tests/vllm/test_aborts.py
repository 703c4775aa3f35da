"""Requests of all kinds, aborted at any moment, leave nothing behind in the real engine or in us."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
MAX_STEPS = 100_000


@pytest.mark.parametrize(("kind", "num_requests"), [("llama", 500), ("gemma3", 200)])
def test_requests_that_are_aborted_at_random_leave_nothing_behind(
    start: Start, tmp_path: Path, kind: str, num_requests: int
) -> None:
    from vllm import SamplingParams

    rng = random.Random(7)
    stems = [prompt_of(40 + seed, 640) for seed in range(4)]
    expected: dict[tuple[int, ...], tuple[int, ...]] = {}
    tiers = {"host": "2MiB", "disk": {"path": str(tmp_path), "size": "8MiB"}}
    engine = start(kind, extra=tiers, num_gpu_blocks_override=45, max_num_batched_tokens=512)
    llm_engine = engine.llm.llm_engine
    prompts = {
        f"r{number}": [*rng.choice(stems)[: rng.randrange(1, 641)], *prompt_of(number % 3, rng.randrange(1, 40))]
        for number in range(num_requests)
    }
    steps_to_abort = {name: rng.randrange(16) for name in prompts if rng.random() < 0.4}  # a text takes 16 or more
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    waiting, running = list(prompts), set[str]()
    num_ended = 0
    for _ in range(MAX_STEPS):
        if not waiting and not running:
            break
        if waiting and len(running) < 10 and rng.random() < 0.3:
            name = waiting.pop()
            llm_engine.add_request(name, {"prompt_token_ids": prompts[name]}, greedy)
            running.add(name)
        for name in sorted(running & steps_to_abort.keys()):
            steps_to_abort[name] -= 1
            if steps_to_abort[name] < 0:
                llm_engine.abort_request([name])
                running.discard(name)
        if rng.random() < 0.02:
            engine.llm.reset_prefix_cache()
        for out in llm_engine.step():
            if out.finished and out.request_id in running:
                running.discard(out.request_id)
                num_ended += 1
                text = tuple(out.outputs[0].token_ids)
                assert len(text) == 16, out.outputs[0].finish_reason
                expected[tuple(prompts[out.request_id])] = text
    assert num_ended == num_requests - len(steps_to_abort)
    assert max(steps_to_abort.values()) < 0
    engine.forget()
    assert engine.count("hits") > 0
    engine.calm()
    texts, _ = engine.generate([list(prompt) for prompt in expected])
    assert texts == list(expected.values())
    engine.calm()
    engine.close()
    assert not engine.own_threads()
    cold, _ = start(kind, has_connector=False).generate([list(prompt) for prompt in expected])
    assert cold == list(expected.values())
