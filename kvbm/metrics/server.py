"""Metrics over HTTP, for processes that serve none of their own."""

from __future__ import annotations

from types import TracebackType

from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.metrics.collector import KvbmCollector


class MetricsServer:
    """Serves metrics over HTTP until it is closed; made by `serve_metrics`.

    Attributes
    ----------
    collector : KvbmCollector
        Takes further managers.
    url : str
    """

    def __init__(self, collector: KvbmCollector, port: int, host: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self.collector = collector
        registry = CollectorRegistry()
        collector.register(registry)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            text = f"cannot serve metrics on {host}:{port}: {error}; give another port, or 0 for any that is free"
            raise ConfigError(text) from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop serving and free the port; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_metrics(*managers: BlockManager, port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Serve the metrics of managers over HTTP from a thread, apart from whatever else the process serves.

    Parameters
    ----------
    *managers : BlockManager
    port : int
        0 takes any that is free; see `MetricsServer.url`.
    host : str
        Address to listen on; nobody is asked for a password, so only this machine by default.

    Raises
    ------
    PluginError
        prometheus-client is not installed.
    ConfigError
        The port cannot be had, or two managers have the same ``worker_id``.
    """
    return MetricsServer(KvbmCollector(*managers), port, host)
