"""The connector for vLLM: ``--kv-transfer-config '{"kv_connector": "KvbmConnector", ...}'`` names this module.

Everything but the connector can be imported where vLLM is not installed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KvbmConnector"]


def __getattr__(name: str) -> Any:
    if name != "KvbmConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvbm.engines.vllm.connector import KvbmConnector

    return KvbmConnector
