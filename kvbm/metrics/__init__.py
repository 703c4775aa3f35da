"""Prometheus metrics of managers (extra ``metrics``).

Reading the table of what there is, `METRICS`, needs no prometheus-client; `KvbmCollector` and `serve_metrics` do, and
say so.
"""

from kvbm.metrics.collector import KvbmCollector
from kvbm.metrics.reading import Reading, SlabReading
from kvbm.metrics.server import MetricsServer, serve_metrics
from kvbm.metrics.table import METRICS, Metric

__all__ = ["METRICS", "KvbmCollector", "Metric", "MetricsServer", "Reading", "SlabReading", "serve_metrics"]
