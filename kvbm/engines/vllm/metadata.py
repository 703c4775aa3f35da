"""What vLLM carries between the halves: our messages, wrapped as its classes want them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass
class KvbmMetadata(KVConnectorMetadata):
    """One step's orders, encoded, and whether the step computes anything."""

    orders: bytes
    has_pass: bool = True


@dataclass
class KvbmWorkerMetadata(KVConnectorWorkerMetadata):
    """Reports of one step, encoded, of all ranks that were put together so far."""

    reports: list[bytes] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Put two ranks' reports together."""
        assert isinstance(other, KvbmWorkerMetadata), "all workers have the same connector"
        return KvbmWorkerMetadata([*self.reports, *other.reports])


@dataclass
class KvbmHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells of its tiers: an encoded `ShardDescription` for each group of layers."""

    rank: int
    shards: list[bytes]
