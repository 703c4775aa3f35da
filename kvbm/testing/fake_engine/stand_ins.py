"""Stand-ins for the few modules of vLLM that a connector imports: names to inherit from and to make, no engine.

They are in `sys.modules` while `vllm_stand_ins` is open, and only where no vLLM is installed: with one, a connector
meets the real base classes.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"


class KVConnectorRole(enum.Enum):
    """In which half a connector is."""

    SCHEDULER = 0
    WORKER = 1


class CacheHitSource(str, enum.Enum):
    """Where blocks came from."""

    DEVICE = "device"
    HOST = "host"
    P2P = "p2p"
    DISK = "disk"
    EXTERNAL_UNSPECIFIED = "external_unspecified"


class KVConnectorHandshakeMetadata:
    """What a worker tells the scheduler's half at start."""


class KVConnectorMetadata:
    """What the scheduler's half sends to the workers in a step."""


class KVConnectorWorkerMetadata:
    """What a worker sends back."""


class SupportsHMA:
    """Marks a connector that knows groups of layers."""


@dataclass
class KVConnectorTransferResults:
    """What a worker may report after a step."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class KVConnectorBase_V1:  # noqa: N801 - vLLM's name
    """The base of connectors: it keeps a step's metadata, everything else does nothing."""

    _cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED
    supports_divergent_local_hybrid_hits = False

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None
        self._vllm_config = vllm_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._kv_cache_manager: Any = None
        self._role = role

    @property
    def role(self) -> KVConnectorRole:
        """In which half this is."""
        return self._role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Keep a step's metadata."""
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        """Forget it."""
        self._connector_metadata = None

    def has_connector_metadata(self) -> bool:
        """Whether there is some."""
        return self._connector_metadata is not None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None, "bound before"
        return self._connector_metadata

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Give what `get_finished` does in one object."""
        sent, received = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(set(sent or ()), set(received or ()))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Give nothing."""
        return None, None

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Say that all tokens came from somewhere."""
        return {self._cache_hit_source: num_external_tokens} if num_external_tokens else {}

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Name all groups."""
        return tuple(self._kv_cache_config.prefix_cacheable_group_ids)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Keep the scheduler's cache manager."""
        self._kv_cache_manager = kv_cache_manager

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Hand the workers' metadata over by rank."""
        self.set_xfer_handshake_metadata({rank: one for (_, rank), one in metadata.items()})

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Do nothing."""


@dataclass
class KVConnectorStats:
    """Figures of a connector."""

    data: dict[str, Any] = field(default_factory=dict)


class KVConnectorPromMetrics:
    """Prometheus families of a connector."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        self._vllm_config = vllm_config
        self._metric_types = metric_types
        self._labelnames = labelnames
        self.per_engine_labelvalues = per_engine_labelvalues


class _Event:
    """A KV event: whatever fields it was made with."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class BlockStored(_Event):
    """Blocks are in a tier."""


class BlockRemoved(_Event):
    """Blocks have left a tier."""


class AllBlocksCleared(_Event):
    """Nothing is in a tier."""


_NAMES: dict[str, dict[str, Any]] = {
    "vllm.envs": {"VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": True},
    _BASE: {
        one.__name__: one
        for one in (
            KVConnectorBase_V1, KVConnectorRole, KVConnectorHandshakeMetadata, KVConnectorMetadata,
            KVConnectorWorkerMetadata, KVConnectorTransferResults, SupportsHMA,
        )
    },
    _METRICS: {
        "KVConnectorStats": KVConnectorStats, "KVConnectorPromMetrics": KVConnectorPromMetrics,
        "PromMetric": object, "PromMetricT": Any,
    },
    "vllm.v1.metrics.cache_hit_source": {"CacheHitSource": CacheHitSource},
    "vllm.distributed.kv_events": {
        "BlockStored": BlockStored, "BlockRemoved": BlockRemoved, "AllBlocksCleared": AllBlocksCleared,
        "KVCacheEvent": _Event, "MEDIUM_GPU": "GPU", "MEDIUM_CPU": "CPU", "MEDIUM_STORAGE": "STORAGE",
    },
}  # fmt: skip


def has_vllm() -> bool:
    """Tell whether a real vLLM is installed; a folder of this name is none."""
    spec = sys.modules["vllm"].__spec__ if "vllm" in sys.modules else importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


@contextmanager
def vllm_stand_ins(forget: Sequence[str] = (), *, is_forced: bool = False) -> Iterator[None]:
    """Let modules be imported that import vLLM's base classes for connectors, where no vLLM is installed.

    Parameters
    ----------
    forget : sequence of str
        Packages that meet the stand-ins: imported anew while this is open, and as they were afterwards.
    is_forced : bool
        Stand in also where a vLLM is installed.

    Notes
    -----
    `sys.modules` is changed for the whole process: open it around the imports and around what runs with them, in one
    thread. An adapter that asks for a name that is not here gets an ImportError, as of another version of vLLM.

    Examples
    --------
    >>> with vllm_stand_ins(is_forced=True):
    ...     from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    >>> KVConnectorRole.WORKER.name
    'WORKER'
    """
    if has_vllm() and not is_forced:
        yield
        return
    names = ("vllm", *forget)
    before = _take_out(names)
    try:
        sys.modules.update(_make_modules())
        yield
    finally:
        _take_out(names)
        sys.modules.update(before)


def _take_out(names: Iterable[str]) -> dict[str, ModuleType]:
    """Remove packages with all that is in them, and give what was there."""
    found = [key for key in sys.modules for name in names if key == name or key.startswith(f"{name}.")]
    return {key: sys.modules.pop(key) for key in dict.fromkeys(found)}


def _make_modules() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    for path, names in _NAMES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in modules:
                modules[name] = ModuleType(name, "A stand-in.")
                modules[name].__path__ = []  # a package, with nothing to be found in it
                if end > 1:
                    setattr(modules[".".join(parts[: end - 1])], parts[end - 1], modules[name])
        vars(modules[path]).update(names)
    return modules
