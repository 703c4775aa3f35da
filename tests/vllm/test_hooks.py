"""vLLM's own hooks: resets, KV events, sources of hits, statistics and Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_site import Engine, need_feature, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPT = prompt_of(77, 300)  # four whole blocks of 64


def reset_all(engine: Engine) -> None:
    """What a user does whose weights have changed; no step follows."""
    assert engine.llm.reset_prefix_cache(reset_connector=True)


def test_what_was_reset_is_found_neither_now_nor_after_a_restart(start: Start, tmp_path: Path) -> None:
    engine = start(disk=tmp_path)
    cold, _ = engine.generate([PROMPT])
    engine.settle()
    reset_all(engine)
    assert engine.generate([PROMPT]) == (cold, [0])
    engine.calm()
    reset_all(engine)
    engine = start(disk=tmp_path)
    assert engine.generate([PROMPT]) == (cold, [0]), "the engine ended before its workers were told"
    engine.settle()
    engine = start(disk=tmp_path)
    assert engine.generate([PROMPT]) == (cold, [256]), "only once"
    engine.calm()


def test_a_reset_right_behind_a_request_forgets_what_is_still_being_saved(start: Start, tmp_path: Path) -> None:
    engine = start(disk=tmp_path)
    cold, _ = engine.generate([PROMPT], 1)
    assert engine.half.has_work, "else this proves nothing"
    if not engine.llm.reset_prefix_cache(reset_connector=True):  # vLLM's blocks are held until they are saved
        engine.settle()
        reset_all(engine)
    assert engine.generate([PROMPT], 1) == (cold, [0])
    engine.calm()


def test_routers_hear_of_a_block_in_its_new_tier_before_it_leaves_the_old_one(start: Start, tmp_path: Path) -> None:
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

    extra = {"host": "1MiB", "disk": {"path": str(tmp_path), "size": "128MiB"}}  # host: 8 blocks
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = start(extra=extra, kv_events_config=config)
    events: list[Any] = []
    publisher = engine.vllm_scheduler.kv_event_publisher
    publisher.publish = lambda batch: events.extend(batch.events)
    for seed in range(6):
        engine.generate([prompt_of(seed, 300)])
    engine.settle()
    engine.generate([prompt_of(99, 10)])
    ours = [event for event in events if getattr(event, "medium", None) in ("CPU", "STORAGE")]
    by_engine = {name for event in events if getattr(event, "medium", "") == "GPU" for name in event.block_hashes}
    where: dict[Any, set[str]] = {}
    num_moved = 0
    for event in ours:
        assert event.group_idx == 0
        assert set(event.block_hashes) <= by_engine, "named as vLLM names them"
        for name in event.block_hashes:
            tiers = where.setdefault(name, set())
            if isinstance(event, BlockStored):
                tiers.add(event.medium)
            else:
                assert isinstance(event, BlockRemoved)
                tiers.remove(event.medium)
                num_moved += event.medium == "CPU" and "STORAGE" in tiers
                assert tiers or event.medium == "STORAGE", "taken back before it was announced below"
    assert num_moved > 0
    stored = [event for event in ours if isinstance(event, BlockStored) and event.medium == "CPU"]
    assert any(event.parent_block_hash in where for event in stored) or any(len(one.block_hashes) > 1 for one in stored)
    events.clear()
    reset_all(engine)
    engine.generate([prompt_of(99, 10)])
    assert any(isinstance(event, AllBlocksCleared) for event in events)
    engine.calm()


@pytest.mark.parametrize("are_numbers", [True, False], ids=["numbers", "bytes"])
def test_routers_hear_of_what_a_disk_holds_from_before_a_restart(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_numbers: bool
) -> None:
    from vllm.config import KVEventsConfig

    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", str(int(are_numbers)))
    events: list[Any] = []
    seen: list[set[Any]] = []
    for prompt in (PROMPT, prompt_of(99, 10), PROMPT):
        if len(seen) < 2:
            engine = start(
                disk=tmp_path, kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null")
            )
            engine.vllm_scheduler.kv_event_publisher.publish = lambda batch: events.extend(batch.events)
        engine.generate([prompt])
        engine.settle()
        engine.generate([prompt_of(99, 10)])
        seen.append({name for one in events if getattr(one, "medium", "") == "STORAGE" for name in one.block_hashes})
        events.clear()
        engine.calm()
    names = seen[0]
    assert len(names) == 4
    assert {type(name) for name in names} == {int if are_numbers else bytes}
    assert seen[1:] == ([names, set()] if are_numbers else [set(), names]), "bytes when a request has named them"


def test_hits_are_told_apart_by_tier(start: Start, tmp_path: Path) -> None:
    need_feature("hit sources")
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    engine = start(disk=tmp_path)
    engine.generate([PROMPT])
    connector = engine.vllm_scheduler.connector
    found: list[dict[Any, int]] = []
    ask = connector.get_external_cache_hit_sources
    connector.get_external_cache_hit_sources = lambda *given: found.append(ask(*given)) or found[-1]
    engine.forget()
    engine.generate([PROMPT])
    engine.forget()
    engine.forget_memory()
    engine.generate([PROMPT])
    assert found == [{CacheHitSource.HOST: 256}, {CacheHitSource.DISK: 256}]
    engine.calm()


def test_statistics_reach_prometheus_and_the_log(start: Start, tmp_path: Path) -> None:
    engine = start(disk=tmp_path)
    engine.half._counts._clock = iter(range(1_000_000)).__next__  # a second is over at every look
    engine.half._counts._due_at = 0
    engine.worker._counts._clock = iter(range(1_000_000)).__next__
    engine.worker._counts._due_at = 0
    engine.generate([PROMPT])
    engine.forget()
    engine.generate([PROMPT])
    engine.settle()
    engine.generate([prompt_of(99, 10)])
    labels = ("source", "destination", "tier")
    metrics = {
        (metric.name, *(value for name, value in sorted(metric.labels.items()) if name in labels)): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith("vllm:kvbm_") and hasattr(metric, "value")
    }
    assert metrics["vllm:kvbm_offload_blocks", "host", "device"] >= 4, "destination, source"
    assert metrics["vllm:kvbm_offload_blocks", "disk", "host"] >= 4
    assert metrics["vllm:kvbm_onboard_blocks", "device", "host"] == 4
    assert metrics["vllm:kvbm_disk_written_blocks", "disk"] >= 4, "counted in the worker"
    assert metrics["vllm:kvbm_blocks_capacity", "host"] == engine.pools[0].total_blocks
    engine.calm()
