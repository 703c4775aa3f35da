"""The layout of KV tensors to ask vLLM for: blocks outermost, where this version and this model can have them."""

from __future__ import annotations

from typing import Any

from kvbm.engines.vllm.features import feature

_BLOCK_OUTERMOST = "BLHNC"  # all layers of a block lie together: one copy a block


def wanted_layout(vllm_config: Any) -> str | None:
    """Name the layout of KV tensors that is copied fastest, where this vLLM offers it; None where it does not.

    Parameters
    ----------
    vllm_config : VllmConfig

    Notes
    -----
    On a CPU kernels know one layout. A model with state layers, or one whose blocks kernels cut up, cannot have its
    blocks outermost: vLLM would not start.
    """
    layouts = feature("layouts")
    if layouts is None:
        return None
    from vllm.platforms import current_platform

    model, cache = vllm_config.model_config, vllm_config.cache_config
    if _BLOCK_OUTERMOST not in layouts.__members__ or not current_platform.is_cuda():
        return None
    if model is None or model.is_hybrid or getattr(cache, "user_specified_block_size", False):
        return None
    return _BLOCK_OUTERMOST
