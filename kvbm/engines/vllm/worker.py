"""The connector in a worker: vLLM's KV tensors become shards, its steps become calls of the worker's core."""

from __future__ import annotations

import importlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

import kvbm
from kvbm._backend import default_backend
from kvbm.engines.counts import Counts, Data, read_shards
from kvbm.engines.shard import Shard
from kvbm.engines.shared_host import HostShare
from kvbm.engines.tensors import layers_of
from kvbm.engines.vllm.fingerprint import fingerprint_of, kernel_of
from kvbm.engines.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm.engines.vllm.settings import need_supported, of_replica, part_of, read_settings
from kvbm.engines.vllm.sharing import share_of
from kvbm.engines.worker import StepNews, WorkerCore

_log = logging.getLogger("kvbm.engines")
_CLOSE_S = 10.0
_IDLE_S = 0.002  # that a step without a pass waits for copies: vLLM would make the next one at once


class VllmWorker:
    """What the connector does in one worker.

    Parameters
    ----------
    vllm_config : VllmConfig
    kv_cache_config : KVCacheConfig
    rank, num_ranks : int
        Of the shard.

    Raises
    ------
    ConfigError
        See `need_supported`; or a setting is unknown.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *, rank: int, num_ranks: int) -> None:
        need_supported(vllm_config, kv_cache_config)
        self._config = vllm_config
        self._cache = kv_cache_config
        self._rank, self._num_ranks = rank, num_ranks
        sections, self._own = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._sections = of_replica(sections, vllm_config.parallel_config)
        self._shards: list[Shard] = []
        self._core: WorkerCore | None = None
        self._begun: KvbmMetadata | None = None  # whose orders were taken last
        self._news = StepNews()
        self._counts = Counts(lambda: read_shards(self._shards), clock=time.monotonic)
        self._places: dict[str, tuple[int, int]] = {}  # of a layer: its group, and which of the group it is
        self._has_gpu = False
        self._has_pass = True  # in this step
        self._zeroes_blocks = bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Take the engine's tensors over, by their strides, and open the tiers below."""
        backend = default_backend()
        if backend.name == "pure":
            folder = Path(kvbm.__file__).parent
            _log.warning("copies are slower than they could be, the pure twin runs from %s: %s", folder, backend.reason)
        num_blocks = getattr(self._cache, "num_blocks", None)
        for index, group in enumerate(self._cache.kv_cache_groups):
            layers, numbers = layers_of(group.layer_names, kv_caches, num_blocks)
            self._places.update((name, (index, number)) for name, number in numbers.items())
            has_gpu = any(layer.device is not None for layer in layers)
            self._has_gpu |= has_gpu
            share = self.share_of_group(index, has_gpu=has_gpu) if self._own.get("one_copy", True) else None
            kernel = kernel_of(self._config, group.layer_names, kv_caches, group.kv_cache_spec)
            self._shards.append(
                Shard(
                    layers,
                    part_of(
                        self._sections,
                        group=index,
                        num_groups=len(self._cache.kv_cache_groups),
                        rank=self._rank,
                        num_ranks=self._num_ranks,
                        is_shared=share is not None,
                    ),
                    fingerprint=f"{fingerprint_of(self._config, kernel)},group={index}",
                    backend=backend,
                    share=share,
                )
            )
        self._core = WorkerCore(
            [shard.executor for shard in self._shards],
            rank=self._rank,
            following=[index for index, shard in enumerate(self._shards) if shard.is_follower],
        )

    def share_of_group(self, index: int, *, has_gpu: bool) -> HostShare | None:
        """Say where the ranks meet that could share the tiers of a group; None where each needs its own."""
        return share_of(
            self._config,
            self._cache.kv_cache_groups[index].kv_cache_spec,
            group=index,
            rank=self._rank,
            num_ranks=self._num_ranks,
            sections=self._sections,
            has_gpu=has_gpu,
        )

    def unregister(self) -> None:
        """Let go of the engine's tensors, once nothing moves there; may be called again. The tiers below stay."""
        if self._core is not None:
            self._core.after_forward(self._stream())
            self._core.fence()
        for shard in self._shards:
            shard.detach()

    def restore(self, kv_caches: dict[str, Any]) -> None:
        """Take the engine's tensors, wherever they lie now; may be called again."""
        if not self._shards:
            self.register(kv_caches)
            return
        num_blocks = getattr(self._cache, "num_blocks", None)
        for group, shard in zip(self._cache.kv_cache_groups, self._shards, strict=True):
            layers, _ = layers_of(group.layer_names, kv_caches, num_blocks)
            shard.attach(layers)

    def handshake(self) -> KvbmHandshake:
        """Tell the scheduler's half of the tiers."""
        return KvbmHandshake(self._rank, [msgspec.msgpack.encode(shard.describe()) for shard in self._shards])

    def begin(self, metadata: KvbmMetadata) -> None:
        """Take a step's orders, once, however many of vLLM's calls bring them."""
        if self._core is not None and metadata is not self._begun:
            self._begun = metadata
            self._has_pass = metadata.has_pass
            # Blocks that vLLM is about to clear are filled after that: in `start_loads`.
            self._core.begin(metadata.orders, stream=self._stream(), holds_loads=self._zeroes_blocks)

    def start_loads(self, *, by_layer: bool = False) -> None:
        """Begin the loads that this step's pass reads, and those that were held; `by_layer` as for `WorkerCore`."""
        if self._core is not None and self._core.has_step_work:
            stream = self._stream()
            self._core.begin_loads(stream)
            self._core.begin_sync_loads(stream, by_layer=by_layer)

    def wait_for_layer(self, name: str) -> None:
        """Let the pass wait for a layer that it is about to read."""
        if self._core is not None and self._core.has_layers and name in self._places:
            group, layer = self._places[name]
            self._core.wait_for_layer(layer, group=group, stream=self._stream())

    def after_forward(self) -> None:
        """Begin to save what the pass has filled."""
        if self._core is not None and self._core.has_step_work:
            self._core.after_forward(self._stream())

    def take(self) -> tuple[set[str] | None, set[str] | None]:
        """Give the requests that were sent and received since the last call; the rest of the news is kept for later."""
        if self._core is None:
            return None, None
        if self._core.has_step_work:
            self._core.finish_sync_loads()  # what they lost belongs to this step
        if not self._has_pass:
            self._core.wait_for_results(_IDLE_S)
        self._has_pass = True
        self._news = self._core.take()
        return self._news.sent or None, self._news.received or None

    def take_failed_requests(self) -> set[str]:
        """Give the received requests that are to be computed from their start.

        A slot belongs to one group of layers, which vLLM cannot tell by its number: with several groups it takes the
        names of requests, and refuses numbers.
        """
        if len(self._cache.kv_cache_groups) == 1:
            return set()
        self._news.lost_slots = set()
        failed, self._news.failed = self._news.failed, set()
        return failed

    def take_lost_slots(self) -> set[int]:
        """Give the slots of received requests that do not hold what they should."""
        lost, self._news.lost_slots = self._news.lost_slots, set()
        return lost

    def take_report(self) -> KvbmWorkerMetadata | None:
        """Give the report for the scheduler's half."""
        report, self._news.report = self._news.report, b""
        return KvbmWorkerMetadata([report]) if report else None

    def take_counts(self) -> Data | None:
        """Give what was counted since the last call; None while it is too early."""
        return self._counts.take() if self._shards else None

    def close(self) -> None:
        """End threads, close files."""
        if self._core is not None and not self._core.close(_CLOSE_S):
            _log.warning("close: jobs still run num_jobs=%d", self._core.num_open)
            return  # they use the storages
        for shard in self._shards:
            shard.close(_CLOSE_S)
        self._core, self._shards = None, []

    def _stream(self) -> Any:
        """Give the stream on which vLLM computes, where it computes on a GPU."""
        if not self._has_gpu:
            return None
        return importlib.import_module("torch").cuda.current_stream()
