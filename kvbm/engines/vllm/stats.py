"""Statistics by vLLM's own hooks: its log line, and its Prometheus endpoint.

There our metrics have the names of `kvbm.metrics` behind ``vllm:``, as all of vLLM's: it clears its registry by that.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbm.engines.counts import add, summary
from kvbm.metrics.table import METRICS

_PREFIX = "vllm:"


class KvbmStats(KVConnectorStats):
    """What has changed since the last statistics; see `kvbm.engines.counts`."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Forget all of it."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Put two together."""
        return KvbmStats(data=add(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """Give what a line of the log has room for."""
        return summary(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class KvbmPromMetrics(KVConnectorPromMetrics):
    """Our counters and gauges in vLLM's registry, each with vLLM's labels before ours.

    Parameters
    ----------
    vllm_config : VllmConfig
    metric_types : dict
        Classes of metrics, by those of prometheus-client.
    labelnames : list of str
    per_engine_labelvalues : dict of int to list
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        makers = {"counter": self._counter_cls, "gauge": self._gauge_cls}
        self._metrics = {
            metric.name: makers[metric.kind](
                name=_PREFIX + metric.name, documentation=metric.text, labelnames=[*labelnames, *metric.labels]
            )
            for metric in METRICS
            if metric.kind in makers
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what one engine's statistics say."""
        before = self.per_engine_labelvalues[engine_idx]
        for name, rows in transfer_stats_data.get("counters", {}).items():
            for labels, value in rows:
                self._metrics[name].labels(*before, *labels).inc(value)
        for name, rows in transfer_stats_data.get("gauges", {}).items():
            for labels, value in rows:
                self._metrics[name].labels(*before, *labels).set(value)
