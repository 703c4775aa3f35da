"""The fake engine itself: a right connector passes every schedule, each of many wrong ones is caught."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from toy_connector import FAULTS, SYNC_FAULTS, ToySchedules

from kvbm.testing.fake_engine import (
    OPERATIONS,
    ConnectorSchedules,
    EngineShape,
    FakeEngine,
    Status,
    prompt_of,
    random_schedule,
    vllm_stand_ins,
)

CROWDED = EngineShape(num_blocks=8, num_ranks=2, has_prefix_cache=False)
SHAPES = (
    EngineShape(num_blocks=12, num_asks=3),
    EngineShape(num_blocks=10, num_ranks=2, has_prefix_cache=False, budget_tokens=6),
    EngineShape(num_blocks=24, budget_tokens=32, padding_words=0, num_layers=1),
    EngineShape(num_blocks=12, policy="fail", max_running=2, num_ranks=2),
)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_right_connector_passes_every_schedule(is_async: bool) -> None:
    num_loaded = 0
    for seed in range(32):
        schedules = ToySchedules(SHAPES[seed % len(SHAPES)], is_async=is_async)
        schedules.run(random_schedule(seed))
        num_loaded += schedules.engine.num_loaded
    assert num_loaded > 500, "it loads something"


@pytest.mark.parametrize(
    ("fault", "is_async"), [(fault, True) for fault in FAULTS] + [(fault, False) for fault in SYNC_FAULTS]
)
def test_a_wrong_connector_is_caught(fault: str, is_async: bool) -> None:
    for seed in range(100):
        try:
            ToySchedules(CROWDED, fault=fault, is_async=is_async).run(random_schedule(seed))
        except (AssertionError, KeyError):
            return
    pytest.fail(f"nobody has noticed that it {fault}")


def test_a_schedule_that_fails_fails_again_with_the_same_words() -> None:
    words = []
    for _ in range(2):
        with pytest.raises(AssertionError) as caught:
            ToySchedules(CROWDED, fault="loads a wrong block").run(random_schedule(1))
        words.append(str(caught.value))
    assert words[0] == words[1]


# -- what the engine does around a connector --------------------------------------------------------------------------


class Calls(ToySchedules):
    """The right toy, with the calls that its halves get."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*arguments, **more)

    def make_connector(self, vllm_config: Any, role: str, kv_cache_config: Any) -> Any:
        half = super().make_connector(vllm_config, role, kv_cache_config)
        for name in [name for name in dir(half) if not name.startswith("_") and callable(getattr(half, name))]:
            setattr(half, name, self._noted(name, getattr(half, name)))
        return half

    def _noted(self, name: str, method: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            self.calls.append(name)
            return method(*arguments, **more)

        return call


PASS = ["wait_for_layer_load", "save_kv_layer"]
REPORT = ["get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta", "clear_connector_metadata"]


def calls_of_a_step(schedules: Calls) -> list[str]:
    """Make a step and give the calls, those within others and those that ask left out."""
    schedules.calls.clear()
    schedules.engine.step()
    public = {*PASS, *REPORT, "handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_save"}
    public |= {"get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"}
    public |= {"update_connector_output", "request_finished"}
    return [name for name in schedules.calls if name in public]


def test_calls_come_in_the_order_of_vllm() -> None:
    shape = EngineShape(num_layers=1, num_asks=1)
    schedules = Calls(shape)
    schedules.engine.add("a", [1, 2, 3, 4, 5])
    asked = ["get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"]
    begun = ["handle_preemptions", "bind_connector_metadata"]
    first = [*asked, *begun, *PASS, "start_load_kv", "wait_for_save", *REPORT]
    assert calls_of_a_step(schedules) == [*first, "request_finished", "update_connector_output"]
    schedules.run_on()
    schedules.engine.forget_prefixes()
    schedules.engine.add("b", [1, 2, 3, 4, 5])
    rest = ["start_load_kv", "wait_for_save", *REPORT, "update_connector_output"]
    assert calls_of_a_step(schedules) == [*asked, *begun, *rest], "an asynchronous load begins in a step without a pass"
    schedules.let_all_end()
    assert calls_of_a_step(schedules) == ["build_connector_meta", *begun, *rest]
    told = ["update_state_after_alloc", "build_connector_meta"]
    assert calls_of_a_step(schedules)[:4] == [*told, *begun], "it is told again, and not asked"
    schedules.run_on()


def test_a_synchronous_load_begins_before_the_pass_that_reads_it() -> None:
    schedules = Calls(EngineShape(num_layers=1, num_asks=1), is_async=False)
    for request_id in "ab":
        schedules.engine.add(request_id, [1, 2, 3, 4, 5])
        calls = calls_of_a_step(schedules)
        schedules.run_on()
        schedules.engine.forget_prefixes()
    assert calls.index("start_load_kv") < calls.index("wait_for_layer_load")
    assert schedules.engine.num_loaded == 4


def test_chunks_preemptions_and_prefixes_of_its_own_happen() -> None:
    schedules = ToySchedules(EngineShape(num_blocks=7, budget_tokens=6, max_running=3))
    engine = schedules.engine
    for request_id in "abc":
        engine.add(request_id, prompt_of(24, 4)[:13], max_tokens=6)
    steps = []
    while (step := engine.step()) is not None:
        steps.append(step)
    outputs = [step.output for step in steps]
    assert any(output.preempted_req_ids for output in outputs), "the memory is too small for three"
    assert any(output.scheduled_cached_reqs.resumed_req_ids for output in outputs)
    assert sum("a" in output.num_scheduled_tokens for output in outputs[:3]) == 3, "a prompt of 13 comes in three steps"
    assert any(new.num_computed_tokens for output in outputs for new in output.scheduled_new_reqs), "b shares with a"
    engine.check_idle()


def test_a_request_out_of_its_window_holds_no_block_there() -> None:
    engine = FakeEngine(Silent, EngineShape(num_blocks=16, windows=(0, 5)))
    request = engine.add("a", list(range(16)), max_tokens=4)
    engine.step()
    engine.step()
    full, window = request.tables
    assert 0 not in full
    assert window[:3] == [0, 0, 0]
    assert window[3] > 0
    engine.run()
    engine.check_idle()


class Silent:
    """A connector that does nothing."""

    def __init__(self, vllm_config: Any, role: str, kv_cache_config: Any) -> None:
        self.role = role

    def __getattr__(self, name: str) -> Any:
        if name in ("get_transfer_results", "request_finished_all_groups"):
            raise AttributeError(name)
        answers: dict[str, Any] = {
            "get_num_new_matched_tokens": (0, False),
            "request_finished": (False, None),
            "get_finished": (None, None),
            "has_connector_metadata": True,
        }
        return lambda *arguments: answers.get(name)


def test_other_weights_give_other_bytes() -> None:
    schedules = ToySchedules(EngineShape(num_layers=1))
    engine = schedules.engine
    engine.add("a", [1, 2, 3, 4, 5])
    schedules.run_on()
    before = engine.workers.memories[0].tensors()["model.layers.0.self_attn.attn"].numpy()[1].copy()
    assert engine.reset()
    engine.add("b", [1, 2, 3, 4, 5])
    schedules.run_on()
    assert engine.num_loaded == 0
    blocks = engine.workers.memories[0].tensors()["model.layers.0.self_attn.attn"].numpy()
    assert not any(np.array_equal(block, before) for block in blocks[2:])


def test_a_request_that_cannot_be_is_refused() -> None:
    engine = FakeEngine(Silent, EngineShape(num_blocks=3))
    engine.add("a", [1])
    for request_id, prompt in (("a", [1]), ("b", []), ("c", [1] * 8)):
        with pytest.raises(ValueError, match=r"take 1 to 8 and a name that is not in use"):
            engine.add(request_id, prompt)
    engine.abort(engine.requests[0])
    assert [one.status for one in engine.requests] == []
    assert Status.is_finished(Status.FINISHED_ERROR)


@pytest.mark.parametrize("wrong", [{"policy": "hope"}, {"num_blocks": 1}, {"windows": ()}, {"num_ranks": 0}])
def test_a_shape_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need|use"):
        EngineShape(**wrong)


def test_a_suite_without_a_connector_says_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match="a subclass makes its connector here"):
        ConnectorSchedules()
    assert all(hasattr(ConnectorSchedules, f"do_{operation}") for operation in OPERATIONS)


def test_stand_ins_are_there_while_they_are_wanted() -> None:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    with vllm_stand_ins(is_forced=True):
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        assert KVConnectorBase_V1.__module__ == "kvbm.testing.fake_engine.stand_ins"
        with pytest.raises(ImportError):
            from vllm.distributed.kv_transfer.kv_connector.v1.base import Nothing  # noqa: F401
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    assert after == before
