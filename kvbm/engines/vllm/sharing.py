"""Which groups of layers have one copy for all ranks: those whose blocks hold the same bytes on each of them.

Every rank decides that from the configuration alone, and all alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kvbm.engines.shared_host import HostShare
from kvbm.engines.shared_memory import name_of

_ONE = ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size", "nnodes")


def share_of(
    vllm_config: Any, spec: Any, *, group: int, rank: int, num_ranks: int, sections: Mapping[str, Any], has_gpu: bool
) -> HostShare | None:
    """Say where the ranks meet that share a group's host tier; None where each has its own.

    Parameters
    ----------
    vllm_config : VllmConfig
    spec : KVCacheSpec
        Of the group.
    group, rank, num_ranks : int
    sections : mapping
        Of our configuration.
    has_gpu : bool
        The group's tensors are on one.

    Notes
    -----
    With MLA every rank of a tensor-parallel engine computes the whole latent KV. Not so where a context is divided
    among ranks, and not surely so where each scales it by what it has seen. On a GPU each rank keeps its own copy:
    shared memory cannot be pinned yet.
    """
    parallel = vllm_config.parallel_config
    host = sections.get("host")
    is_shared = (
        num_ranks > 1
        and not has_gpu
        and getattr(vllm_config.model_config, "use_mla", False) is True
        and type(spec).__name__ == "MLAAttentionSpec"
        and getattr(spec, "num_kv_heads", 0) == 1
        and getattr(parallel, "distributed_executor_backend", None) == "mp"  # the others may use several machines
        and all(getattr(parallel, name, 1) == 1 for name in _ONE)
        and not getattr(vllm_config.cache_config, "calculate_kv_scales", False)
        and host is not None
        and host.get("allocator", "default") == "default"
        and hasattr(os, "memfd_create")
    )
    if not is_shared:
        return None
    engine_id = vllm_config.kv_transfer_config.engine_id
    return HostShare(name_of(engine_id, getattr(parallel, "data_parallel_rank", 0), group), rank, num_ranks)
