"""The connector for vLLM: ``--kv-transfer-config '{"kv_connector": "KvbmConnector", ...}'`` names this module."""

from kvbm.engines.vllm.connector import KvbmConnector

__all__ = ["KvbmConnector"]
