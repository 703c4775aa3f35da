"""`KvbmConnector`: vLLM's connector interface over our two halves; vLLM makes one in its scheduler and in each worker.

Interface: ``KVConnectorBase_V1`` of vLLM 0.28 to 0.32. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from kvbm.engines.vllm.features import feature
from kvbm.engines.vllm.layout import wanted_layout
from kvbm.engines.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm.engines.vllm.scheduler import VllmScheduler
from kvbm.engines.vllm.stats import KvbmPromMetrics, KvbmStats
from kvbm.engines.vllm.worker import VllmWorker
from kvbm.types import Tier

TransferResults, HitSource = feature("named failures"), feature("hit sources")
_SOURCES = {} if HitSource is None else {Tier.HOST: HitSource.HOST, Tier.DISK: HitSource.DISK}


class KvbmConnector(KVConnectorBase_V1, SupportsHMA):
    """KV blocks below vLLM's own memory: in host memory, on disk, in object stores.

    Parameters
    ----------
    vllm_config : VllmConfig
        ``kv_connector_extra_config`` holds our settings; the smallest useful ones are ``{"host": "20GiB"}``.
    role : KVConnectorRole
    kv_cache_config : KVCacheConfig
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: VllmScheduler | None = None
        self._worker: VllmWorker | None = None
        self._by_layer = _loads_by_layer(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = VllmScheduler(vllm_config, kv_cache_config)
        else:
            parallel = vllm_config.parallel_config
            self._worker = VllmWorker(
                vllm_config,
                kv_cache_config,
                rank=parallel.rank % parallel.tensor_parallel_size,
                num_ranks=parallel.tensor_parallel_size,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what a cache saves."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether attention waits layer by layer, which a graph that is replayed would leave out."""
        return _loads_by_layer(extra_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Ask for all layers of a block together, where vLLM can have it so: a block is one copy then."""
        return wanted_layout(vllm_config)

    @classmethod
    def supports_sleep_mode(cls, vllm_config: Any) -> bool:
        """Yes: vLLM's memory may go and come; ours stays."""
        return True

    # -- statistics --------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KvbmStats | None:
        """Give what this half has counted since the last call."""
        half = self._worker if self._scheduler is None else self._scheduler
        data = None if half is None else half.take_counts()
        return None if data is None else KvbmStats(data=data)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats:
        """Make statistics of what came from another process."""
        return KvbmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvbmPromMetrics:
        """Register our metrics with vLLM's."""
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- in a worker -------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take vLLM's tensors over."""
        self._here().register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """Let go of vLLM's tensors, before it sleeps."""
        self._here().unregister()

    def restore_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take vLLM's tensors over anew, when it has woken."""
        self._here().restore(kv_caches)

    def get_handshake_metadata(self) -> KvbmHandshake:
        """Tell the scheduler's half of this worker's tiers."""
        return self._here().handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Begin the step: before blocks that others get are overwritten."""
        if isinstance(kv_connector_metadata, KvbmMetadata):
            self._here().begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads that the pass waits for, and the step itself where `handle_preemptions` was not called."""
        metadata = self._get_connector_metadata()
        if isinstance(metadata, KvbmMetadata):
            self._here().begin(metadata)
        self._here().start_loads(by_layer=self._by_layer)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Let the pass wait for a layer of what this step loads."""
        if self._by_layer:
            self._here().wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved whole, behind the pass."""

    def wait_for_save(self) -> None:
        """Begin to save what the pass has filled; vLLM keeps the blocks until that is reported."""
        self._here().after_forward()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Give the requests that were saved, and loaded, since the last call."""
        return self._here().take()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Give the same, with the requests that failed, where block ids of several groups cannot tell them."""
        sent, received = self._here().take()
        return TransferResults(
            finished_sending=sent or set(),
            finished_recving=received or set(),
            failed_recving=self._here().take_failed_requests(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Give the blocks of requests just reported that do not hold what they should."""
        return self._here().take_lost_slots()

    def build_connector_worker_meta(self) -> KvbmWorkerMetadata | None:
        """Give the report for the scheduler's half."""
        return self._here().take_report()

    def shutdown(self) -> None:
        """End threads, close files."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    # -- in the scheduler --------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Take over what the workers told of their tiers."""
        self._there().connect(metadata)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the tokens that can be loaded behind those that vLLM has."""
        return self._there().matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Begin to load."""
        self._there().allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KvbmMetadata:
        """Give the workers' orders for this step."""
        return self._there().orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take what the workers have done."""
        self._there().reported(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """End a request of a model with one group of layers."""
        return self._there().finished(request), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request."""
        return self._there().finished(request), None

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Divide the tokens that are loaded by the tier that they lie in."""
        return {
            _SOURCES.get(tier, HitSource.EXTERNAL_UNSPECIFIED): num_tokens
            for tier, num_tokens in self._there().hit_sources(request, num_external_tokens).items()
        }

    def take_events(self) -> list[Any]:
        """Give KV events of our tiers."""
        return self._there().take_events()

    def reset_cache(self) -> bool | None:
        """Forget every block below vLLM's own memory; False while requests load some."""
        return self._there().reset()

    def has_pending_push_work(self) -> bool:
        """Whether vLLM is to go on stepping: our jobs travel with its steps."""
        return self._there().has_work

    # -- private -----------------------------------------------------------------------------------------------

    def _here(self) -> VllmWorker:
        assert self._worker is not None, "called in a worker"
        return self._worker

    def _there(self) -> VllmScheduler:
        assert self._scheduler is not None, "called in the scheduler"
        return self._scheduler


def _loads_by_layer(extra_config: Mapping[str, Any]) -> bool:
    return extra_config.get("loads") == "sync" and bool(extra_config.get("by_layer"))
