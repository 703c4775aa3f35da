"""Which groups of layers vLLM's configuration lets the ranks share, and what a size means then."""

from __future__ import annotations

from typing import Any

from kvbm.engines.shared_host import HostShare
from kvbm.engines.vllm.settings import part_of
from kvbm.engines.vllm.sharing import share_of
from kvbm.testing.fake_engine import EngineShape
from kvbm.testing.fake_engine.shape import make_cache_config, make_vllm_config


def test_only_an_mla_group_of_an_undivided_context_on_one_machine_is_shared() -> None:
    shape = EngineShape(num_ranks=2, has_mla=True)

    def share(sections: Any = None, *, num_ranks: int = 2, has_gpu: bool = False, **changes: Any) -> HostShare | None:
        config = make_vllm_config(shape)
        spec = make_cache_config(shape).kv_cache_groups[0].kv_cache_spec
        for name, value in changes.items():
            target = {
                "use_mla": config.model_config,
                "num_kv_heads": spec,
                "calculate_kv_scales": config.cache_config,
            }.get(name, config.parallel_config)
            setattr(target, name, value)
        sections = {"host": {"size": 1}} if sections is None else sections
        return share_of(config, spec, group=0, rank=1, num_ranks=num_ranks, sections=sections, has_gpu=has_gpu)

    found = share()
    assert found is not None
    assert (found.rank, found.num_ranks, found.is_follower) == (1, 2, True)
    assert share() == found, "every rank makes the same name"
    assert share(data_parallel_rank=1) != found
    others: list[dict[str, Any]] = [
        {"num_ranks": 1}, {"has_gpu": True}, {"use_mla": False}, {"num_kv_heads": 2},
        {"distributed_executor_backend": "ray"}, {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"nnodes": 2},
        {"calculate_kv_scales": True}, {"sections": {}}, {"sections": {"host": {"size": 1, "allocator": "mine"}}},
    ]  # fmt: skip
    for change in others:
        assert share(**change) is None, change


def test_a_size_is_not_divided_among_ranks_that_share() -> None:
    sections = {"host": {"size": "8MiB"}, "disk": {"num_blocks": 5}}
    parts = [
        part_of(sections, group=0, num_groups=2, rank=0, num_ranks=2, is_shared=shared) for shared in (True, False)
    ]
    assert [part["host"]["size"] for part in parts] == [4 << 20, 2 << 20]
    assert [part["disk"]["num_blocks"] for part in parts] == [5, 5]
