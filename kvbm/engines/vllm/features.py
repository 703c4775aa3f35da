"""What differs between the vLLMs that are supported: looked for by its name, never by a version."""

from __future__ import annotations

import importlib
from typing import Any

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_FEATURES = {  # module, name, and what becomes of a vLLM that lacks it
    "named failures": (_BASE, "KVConnectorTransferResults", "models with several groups of layers are refused"),
    "hit sources": ("vllm.v1.metrics.cache_hit_source", "CacheHitSource", "vLLM counts hits of all tiers as one"),
    "fixed names": ("vllm.v1.core.kv_cache_utils", "resolve_none_hash_seed", "PYTHONHASHSEED has to be set"),
    "layouts": ("vllm.v1.kv_cache_layout", "KVCacheLayout", "a block is one copy for each layer"),
}


def feature(name: str) -> Any:
    """Give what this vLLM has for a feature: a class or a function; None where it has nothing, or there is no vLLM.

    Parameters
    ----------
    name : {"named failures", "hit sources", "fixed names", "layouts"}
    """
    module, attribute, _ = _FEATURES[name]
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
