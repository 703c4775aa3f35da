"""How large a fake engine is, and the configuration objects that it hands to a connector: attributes as vLLM's have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """How large an engine is, and what it does where it may choose.

    Attributes
    ----------
    num_blocks : int
        Of the engine's memory; block 0 is the null block that no request gets.
    block_tokens : int
        Tokens of a block.
    windows : tuple of int
        One entry for each group of layers: tokens of its sliding window, 0 for full attention. The groups share their
        memory and their block ids, as vLLM's hybrid models do.
    num_layers : int
        Of each group.
    num_heads, head_words : int
        A token of a layer has so many heads of so many 16-bit words.
    padding_words : int
        Words between two blocks of a layer that belong to no block.
    num_ranks : int
        Workers, each with memory of its own.
    has_mla : bool
        Full attention has one head that every rank computes: its blocks hold the same bytes on all of them.
    budget_tokens : int
        That a step computes at most; a longer prompt is computed in chunks.
    max_running : int
        Requests that a step computes at most.
    has_prefix_cache : bool
        Whether the engine finds prefixes in its own memory.
    policy : {'recompute', 'fail'}
        ``kv_load_failure_policy``.
    num_asks : int
        How often it asks for one request's matched tokens in a row.
    """

    num_blocks: int = 16
    block_tokens: int = 4
    windows: tuple[int, ...] = (0,)
    num_layers: int = 2
    num_heads: int = 2
    head_words: int = 2
    padding_words: int = 3
    num_ranks: int = 1
    has_mla: bool = False
    budget_tokens: int = 16
    max_running: int = 4
    has_prefix_cache: bool = True
    policy: str = "recompute"
    num_asks: int = 2

    def __post_init__(self) -> None:
        if self.policy not in ("recompute", "fail"):
            raise ValueError(f"policy {self.policy!r}, use 'recompute' or 'fail'")
        for name in ("block_tokens", "num_layers", "num_heads", "head_words", "num_ranks", "budget_tokens", "num_asks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, need 1 or more")
        if self.num_blocks < 2 or not self.windows:
            raise ValueError(f"need 2 blocks and a group of layers, got {self.num_blocks} and {len(self.windows)}")

    @property
    def num_groups(self) -> int:
        """Groups of layers."""
        return len(self.windows)

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest request that the memory has room for."""
        return (self.num_blocks - 1) // self.num_groups * self.block_tokens

    def layer_name(self, group: int, layer: int) -> str:
        """Name a layer as vLLM does; the groups take turns."""
        return f"model.layers.{layer * self.num_groups + group}.self_attn.attn"

    def first_in_window(self, group: int, num_tokens: int) -> int:
        """Give the first token that computing the one behind `num_tokens` reads in a group."""
        window = self.windows[group]
        return max(0, num_tokens - window + 1) if window else 0


@dataclass
class FullAttentionSpec:
    """A group of layers that reads all tokens."""

    block_size: int


@dataclass
class MLAAttentionSpec:
    """A group of layers that reads all tokens, each rank the same."""

    block_size: int
    num_kv_heads: int = 1


@dataclass
class SlidingWindowSpec:
    """A group of layers that reads the last tokens."""

    block_size: int
    sliding_window: int


@dataclass
class KVTransferConfig:
    """vLLM's ``--kv-transfer-config``."""

    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    kv_load_failure_policy: str = "recompute"
    kv_connector: str = "Connector"
    kv_role: str = "kv_both"
    engine_id: str = "fake"
    is_kv_producer: bool = True
    is_kv_consumer: bool = True

    def get_from_extra_config(self, key: str, default: Any) -> Any:
        """Give a setting of the connector's own."""
        return self.kv_connector_extra_config.get(key, default)


def make_vllm_config(
    shape: EngineShape, *, rank: int = 0, extra: Mapping[str, Any] | None = None, engine_id: str = "fake"
) -> SimpleNamespace:
    """Make what stands in for a VllmConfig.

    Parameters
    ----------
    shape : EngineShape
    rank : int
        Of the worker; the scheduler's is 0.
    extra : mapping, optional
        ``kv_connector_extra_config``.
    engine_id : str
        The same in all ranks of an engine, and in no other engine of this machine.
    """
    cache = SimpleNamespace(
        block_size=shape.block_tokens,
        cache_dtype="auto",
        prefix_caching_hash_algo="sha256",
        enable_prefix_caching=shape.has_prefix_cache,
        num_gpu_blocks=shape.num_blocks,
    )
    model = SimpleNamespace(
        model="fake", served_model_name="fake", revision=None, dtype="float16", quantization=None,
        max_model_len=shape.most_tokens, use_mla=shape.has_mla,
    )  # fmt: skip
    parallel = SimpleNamespace(
        rank=rank, world_size=shape.num_ranks, tensor_parallel_size=shape.num_ranks, pipeline_parallel_size=1,
        data_parallel_rank=0, data_parallel_size=1, distributed_executor_backend="mp",
    )  # fmt: skip
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(dict(extra or {}), shape.policy, engine_id=engine_id),
        kv_events_config=None,
        cache_config=cache,
        model_config=model,
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=shape.budget_tokens, max_num_seqs=shape.max_running, async_scheduling=False
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        observability_config=SimpleNamespace(),
        instance_id="fake",
    )


def make_cache_config(shape: EngineShape) -> SimpleNamespace:
    """Make what stands in for a KVCacheConfig."""
    groups = []
    for group, window in enumerate(shape.windows):
        full = MLAAttentionSpec if shape.has_mla else FullAttentionSpec
        spec: Any = SlidingWindowSpec(shape.block_tokens, window) if window else full(shape.block_tokens)
        names = [shape.layer_name(group, layer) for layer in range(shape.num_layers)]
        groups.append(SimpleNamespace(layer_names=names, kv_cache_spec=spec, is_eagle_group=False))
    return SimpleNamespace(
        num_blocks=shape.num_blocks,
        kv_cache_groups=groups,
        kv_cache_tensors=[],
        prefix_cacheable_group_ids=tuple(range(shape.num_groups)),
    )
