"""The connector in a worker: vLLM's KV tensors become shards, its steps become calls of the worker's core."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from kvbm._backend import default_backend
from kvbm.engines.shard import LayerMemory, Shard
from kvbm.engines.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm.engines.vllm.settings import fingerprint_of, in_folder, read_settings
from kvbm.engines.worker import StepNews, WorkerCore
from kvbm.errors import LayoutError

_log = logging.getLogger("kvbm.engines")
_CLOSE_S = 10.0


class VllmWorker:
    """What the connector does in one worker.

    Parameters
    ----------
    vllm_config : VllmConfig
    kv_cache_config : KVCacheConfig
    rank, num_ranks : int
        Of the shard.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *, rank: int, num_ranks: int) -> None:
        self._config = vllm_config
        self._cache = kv_cache_config
        self._rank, self._num_ranks = rank, num_ranks
        self._sections, _ = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._shards: list[Shard] = []
        self._core: WorkerCore | None = None
        self._begun: KvbmMetadata | None = None  # whose orders were taken last
        self._news = StepNews()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Take the engine's tensors over, by their strides, and open the tiers below."""
        backend = default_backend()
        for index, group in enumerate(self._cache.kv_cache_groups):
            names = [name for name in group.layer_names if name in kv_caches]
            layers = [memory_of(kv_caches[name], name) for name in names]
            kernel = type(group.kv_cache_spec).__name__
            self._shards.append(
                Shard(
                    layers,
                    in_folder(self._sections, index, self._rank, self._num_ranks),
                    fingerprint=f"{fingerprint_of(self._config, kernel)},group={index}",
                    backend=backend,
                )
            )
        self._core = WorkerCore([shard.executor for shard in self._shards], rank=self._rank)

    def handshake(self) -> KvbmHandshake:
        """Tell the scheduler's half of the tiers."""
        return KvbmHandshake(self._rank, [msgspec.msgpack.encode(shard.describe()) for shard in self._shards])

    def begin(self, metadata: KvbmMetadata) -> None:
        """Take a step's orders, once, however many of vLLM's calls bring them."""
        if self._core is not None and metadata is not self._begun:
            self._begun = metadata
            self._core.begin(metadata.orders)

    def after_forward(self) -> None:
        """Begin to save what the pass has filled."""
        if self._core is not None:
            self._core.after_forward()

    def take(self) -> tuple[set[str] | None, set[str] | None]:
        """Give the requests that were sent and received since the last call; the rest of the news is kept for later."""
        if self._core is None:
            return None, None
        self._core.after_forward()  # of a step without a pass
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

    def close(self) -> None:
        """End threads, close files."""
        if self._core is not None and not self._core.close(_CLOSE_S):
            _log.warning("close: jobs still run num_jobs=%d", self._core.num_open)
            return  # they use the storages
        for shard in self._shards:
            shard.close(_CLOSE_S)
        self._core, self._shards = None, []


def memory_of(tensor: Any, name: str) -> LayerMemory:
    """Describe a layer's tensor by its strides.

    Raises
    ------
    LayoutError
        It lies on another device than the CPU, or a block does not lie in one piece.
    """
    if tensor.device.type != "cpu":
        raise LayoutError(f"layer {name} lies on {tensor.device}: this version connects engines on the CPU")
    itemsize, strides, shape = tensor.element_size(), tensor.stride(), tensor.shape
    nbytes = itemsize
    for size, stride in sorted(zip(shape[1:], strides[1:], strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride * itemsize != nbytes:
            raise LayoutError(f"layer {name}: a block does not lie in one piece (shape {shape}, strides {strides})")
        nbytes *= size
    return LayerMemory(tensor.data_ptr(), shape[0], strides[0] * itemsize, nbytes, tensor)
