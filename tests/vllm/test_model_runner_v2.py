"""vLLM's second model runner hands a connector more than the first one does, in an order of its own.

It does not run on a CPU. So its own class stands between the CPU's runner and our connector here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(120 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500, 701))]
ALL = {"scheduler_output", "request_state_indices", "request_ids", "num_tokens", "attn_metadata"}


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Lead every step through Model Runner V2's class; gives the names of what it hands to `start_load_kv` besides."""
    second = pytest.importorskip("vllm.v1.worker.gpu.kv_connector")
    if "input_batch" not in inspect.signature(second.ActiveKVConnector.pre_forward).parameters:
        pytest.skip("this vLLM's second model runner hands over no more than the first")
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.forward_context import get_forward_context, is_forward_context_available
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    seen: list[set[str]] = []
    made: list[Any] = []

    def make(connector: Any) -> Any:
        start_loads = connector.start_load_kv

        def note(forward_context: Any, **more: Any) -> None:
            seen.append(set(more))
            start_loads(forward_context, **more)

        connector.start_load_kv = note
        with monkeypatch.context() as patch:
            patch.setattr(connector, "register_kv_caches", lambda caches: None)  # the first runner has done so
            one = second.ActiveKVConnector(connector._vllm_config, {})
        one.set_disabled(True)  # while it warms up
        one.reset_capture_state()
        one.set_disabled(False)
        return one

    @contextmanager
    def step(scheduler_output: Any, defer_finalize: bool = False) -> Iterator[Any]:
        assert not defer_finalize
        connector = get_kv_transfer_group()
        if not made or made[-1].kv_connector is not connector:
            made.append(make(connector))
        one, output, batch, attention = made[-1], KVConnectorOutput(), None, None
        numbers = scheduler_output.num_scheduled_tokens
        if numbers:
            places = torch.arange(len(numbers), dtype=torch.int32)
            batch = SimpleNamespace(idx_mapping=places, req_ids=list(numbers), num_tokens=sum(numbers.values()))
            attention = get_forward_context().attn_metadata if is_forward_context_available() else None
        one.pre_forward(scheduler_output, batch, attention)
        yield output
        one.finish_forward()
        told = one.post_forward(scheduler_output.finished_req_ids)
        for field in fields(told):
            setattr(output, field.name, getattr(told, field.name))

    monkeypatch.setattr(KVConnectorModelRunnerMixin, "_get_kv_connector_output", staticmethod(step))
    return seen


@pytest.mark.parametrize("loads", ["async", "sync"])
def test_what_model_runner_v2_hands_over_is_taken_and_changes_no_text(
    start: Start, handed: list[set[str]], loads: str
) -> None:
    expected, _ = start(has_connector=False).generate(PROMPTS)
    engine = start(extra={"host": "64MiB", "loads": loads})
    assert engine.generate(PROMPTS) == (expected, [0, 0, 0])
    engine.forget()
    assert engine.generate(PROMPTS) == (expected, [256, 448, 640])
    engine.calm()
    assert ALL in handed, "else this proves nothing"
    assert set() in handed, "and steps in which nothing is computed"
