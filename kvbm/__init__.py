"""kvbm: the KV-cache block manager for LLM serving.

Blocks of tokens' keys and values, named by sequence hash, allocated, found again, evicted and moved between tiers.
Importing it loads no CUDA, torch or network library; ``KVBM_BACKEND`` picks the native or the pure twin on first use.
What stands on the manager is imported when it is first asked for, so that a process that only names blocks stays light.
"""

from typing import TYPE_CHECKING, Any

from kvbm import errors
from kvbm.blocks import Block, CompleteBlocks, ImmutableBlocks, MutableBlocks, WeakBlocks
from kvbm.events import EventSubscription, KvEvent, KvEventType
from kvbm.jobs import Transfer
from kvbm.layout import BlockLayout
from kvbm.pool import BlockPool
from kvbm.sequence import ContentSpan, TokenSequence
from kvbm.types import BlockState, PoolStatus, ResetBlocksResponse, SequenceHash, Tier

if TYPE_CHECKING:
    from kvbm.config import Config
    from kvbm.manager import BlockManager
    from kvbm.planner import Hit

_LATER = {"BlockManager": "kvbm.manager", "Config": "kvbm.config", "Hit": "kvbm.planner"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        value = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value
    if name != "__version__":
        raise AttributeError(f"module 'kvbm' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version  # slow to import, seldom asked for

    try:
        return version("kvbm-native")
    except PackageNotFoundError:
        return "0+source"  # run from a source tree


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})


__all__ = [
    "Block",
    "BlockLayout",
    "BlockManager",
    "BlockPool",
    "BlockState",
    "CompleteBlocks",
    "Config",
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
