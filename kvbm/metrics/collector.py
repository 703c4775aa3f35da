"""The collector that gives managers' metrics to a Prometheus registry. The one module that builds its families.

Its lock guards the list of managers only. Work between scrapes is not slowed down: nothing is counted for it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvbm.errors import ConfigError, PluginError
from kvbm.manager import BlockManager
from kvbm.metrics.reading import Reading
from kvbm.metrics.table import METRICS, Metric, Rows

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

_log = logging.getLogger("kvbm.metrics")


class KvbmCollector:
    """Gives the metrics of managers to a Prometheus registry.

    Parameters
    ----------
    *managers : BlockManager
        Held weakly: metrics keep no manager alive. One that is closed gives its last values until it is removed or
        gone.

    Raises
    ------
    PluginError
        prometheus-client is not installed.
    ConfigError
        Two managers have the same ``worker_id``, which is the label that tells them apart.

    Notes
    -----
    A registry takes one such collector: further managers of the process go into that by `add`. A scrape never raises
    and waits for no transfer; a manager that cannot be read is left out and logged.

    Examples
    --------
    >>> import kvbm
    >>> from prometheus_client import CollectorRegistry
    >>> from kvbm.metrics import KvbmCollector
    >>> manager = kvbm.BlockManager(num_layers=1, page_size=16, inner_dim=8, device_blocks=4)
    >>> registry = CollectorRegistry()
    >>> KvbmCollector(manager).register(registry)
    >>> registry.get_sample_value("kvbm_blocks_free", {"worker_id": "0", "tier": "device"})
    4.0
    >>> manager.close()
    """

    def __init__(self, *managers: BlockManager) -> None:
        _need_prometheus()
        self._lock = threading.Lock()
        self._managers: dict[str, weakref.ref[BlockManager]] = {}  # by worker id
        for manager in managers:
            self.add(manager)

    def register(self, registry: CollectorRegistry | None = None) -> None:
        """Put this collector into a registry, by default prometheus-client's own.

        Raises
        ------
        ConfigError
            The registry has these metrics already.
        """
        from prometheus_client import REGISTRY

        try:
            (REGISTRY if registry is None else registry).register(self)
        except ValueError as error:
            text = "this registry has metrics of kvbm already: give the manager to the collector there, by its add"
            raise ConfigError(text) from error

    def add(self, manager: BlockManager) -> None:
        """Give the metrics of one more manager from now on.

        Raises
        ------
        ConfigError
            A manager with this ``worker_id`` is here.
        """
        worker_id = manager.config.runtime.worker_id
        with self._lock:
            known = self._managers.get(worker_id)
            if known is not None and known() is not None:
                who = "this manager" if known() is manager else f"a manager with worker_id {worker_id!r}"
                raise ConfigError(f"{who} is here already: give each its own worker_id, or remove the other first")
            self._managers[worker_id] = weakref.ref(manager)

    def remove(self, manager: BlockManager) -> None:
        """Give the metrics of this manager no more; nothing happens where it is not here."""
        with self._lock:
            self._managers = {worker: known for worker, known in self._managers.items() if known() is not manager}

    def describe(self) -> Iterator[Family]:
        """Give every family without samples; a registry asks for them when it takes the collector."""
        for metric in METRICS:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        """Read all managers and give every family with its samples; never raises."""
        rows = dict(self._read())
        for index, metric in enumerate(METRICS):
            family = _family(metric)
            for worker_id in rows:
                for labels, value in rows[worker_id][index]:
                    _add_sample(family, metric, (worker_id, *labels), value)
            yield family

    def _read(self) -> Iterator[tuple[str, Sequence[Rows]]]:
        """Read every manager that is still there: its worker id, and the rows of each metric of the table."""
        with self._lock:
            known = list(self._managers.items())
        for worker_id, reference in known:
            manager = reference()
            if manager is None:
                with self._lock:
                    if self._managers.get(worker_id) is reference:
                        del self._managers[worker_id]
                continue
            try:
                reading = Reading.of(manager)
                rows = [list(metric.read(reading)) for metric in METRICS]
            except Exception as error:
                _log.warning("manager left out of a scrape worker_id=%s error=%r", worker_id, error)
            else:
                yield worker_id, rows


def _need_prometheus() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        text = "metrics need prometheus-client, which is not installed: pip install 'kvbm-native[metrics]'"
        raise PluginError(text) from error


def _family(metric: Metric) -> Family:
    from prometheus_client import core

    kinds: dict[str, Any] = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "unknown": core.UnknownMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    family: Family = kinds[metric.kind](metric.name, metric.text, labels=("worker_id", *metric.labels))
    return family


def _add_sample(family: Any, metric: Metric, labels: tuple[str, ...], value: Any) -> None:
    if metric.kind == "histogram":
        family.add_metric(labels, buckets=value.cumulative(), sum_value=value.total)
    else:
        family.add_metric(labels, float(value))
