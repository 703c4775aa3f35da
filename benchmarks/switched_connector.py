"""Our connector with a switch: turned off, vLLM's calls go to one that does nothing, in the same engine and memory."""

from __future__ import annotations

from typing import Any

from idle_connector import IdleConnector

from kvbm.engines.vllm import KvbmConnector

_CALLS = (
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "handle_preemptions",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
    "take_events",
    "has_pending_push_work",
)


class SwitchedConnector(KvbmConnector):
    """As `KvbmConnector` while `is_on`, as `IdleConnector` while not; to be switched when nothing is under way."""

    is_on = True


def _switched(name: str) -> Any:
    ours, idle = getattr(KvbmConnector, name), getattr(IdleConnector, name)

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        return (ours if SwitchedConnector.is_on else idle)(self, *arguments, **more)

    return call


for _name in _CALLS:
    if hasattr(IdleConnector, _name):  # a vLLM without it does not call it
        setattr(SwitchedConnector, _name, _switched(_name))
