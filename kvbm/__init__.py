"""kvbm: the KV-cache block manager for LLM serving.

Blocks of tokens' keys and values, named by sequence hash, allocated, found again, evicted and moved between tiers.
Importing it loads no CUDA, torch or network library; ``KVBM_BACKEND`` picks the native or the pure twin on first use.
"""

from typing import Any

from kvbm import errors
from kvbm.blocks import Block, CompleteBlocks, ImmutableBlocks, MutableBlocks, WeakBlocks
from kvbm.events import EventSubscription, KvEvent, KvEventType
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.manager import BlockManager, Hit
from kvbm.pool import BlockPool, PoolStatus, ResetBlocksResponse
from kvbm.sequence import ContentSpan, TokenSequence
from kvbm.types import BlockState, SequenceHash, Tier


def __getattr__(name: str) -> Any:
    """Look up the version when it is asked for: importlib.metadata is slow to import."""
    if name != "__version__":
        raise AttributeError(f"module 'kvbm' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvbm-native")
    except PackageNotFoundError:
        return "0+source"  # run from a source tree


__all__ = [
    "Block",
    "BlockLayout",
    "BlockManager",
    "BlockPool",
    "BlockState",
    "CompleteBlocks",
    "ContentSpan",
    "EventSubscription",
    "Hit",
    "ImmutableBlocks",
    "KvEvent",
    "KvEventType",
    "MutableBlocks",
    "PoolStatus",
    "ResetBlocksResponse",
    "SequenceHash",
    "Tier",
    "TokenSequence",
    "Transfer",
    "WeakBlocks",
    "errors",
]
