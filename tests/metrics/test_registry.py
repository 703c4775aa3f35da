"""Several managers, registries and the server: who is where, and what happens when one goes."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import pytest

import kvbm
from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.metrics import KvbmCollector, serve_metrics

MakeManager = Callable[..., kvbm.BlockManager]
Scrape = Callable[[KvbmCollector], Any]

WITHOUT_PROMETHEUS = """
import sys
sys.modules["prometheus_client"] = None  # as if it were not installed
import kvbm, kvbm.metrics
from kvbm.errors import KvbmError
assert len(kvbm.metrics.METRICS) > 10
with kvbm.BlockManager(num_layers=1, page_size=16, inner_dim=8, device_blocks=4) as manager:
    for call in (lambda: kvbm.metrics.KvbmCollector(manager), lambda: kvbm.metrics.serve_metrics(manager, port=0)):
        try:
            call()
        except ImportError as error:
            assert isinstance(error, KvbmError)
            print(error)
"""
IMPORTED = "import sys, kvbm; kvbm.BlockManager; print('prometheus_client' in sys.modules)"


def small(backend: Backend, worker_id: str, num_blocks: int = 4) -> kvbm.BlockManager:
    return kvbm.BlockManager(
        num_layers=1, page_size=16, inner_dim=8, device_blocks=num_blocks, worker_id=worker_id, backend=backend
    )


def test_managers_differ_in_their_worker_id(backend: Backend, scrape: Scrape) -> None:
    with small(backend, "a", 4) as first, small(backend, "b", 6) as second, small(backend, "b") as third:
        collector = KvbmCollector(first, second)
        samples = scrape(collector)
        assert samples.value("kvbm_blocks_free", tier="device", worker_id="a") == 4
        assert samples.value("kvbm_blocks_free", tier="device", worker_id="b") == 6
        with pytest.raises(ConfigError, match="a manager with worker_id 'b' is here already"):
            collector.add(third)
        with pytest.raises(ConfigError, match="this manager is here already"):
            collector.add(first)
        with pytest.raises(ConfigError, match="worker_id 'b' is here already"):
            KvbmCollector(first, second, third)
        collector.remove(second)
        collector.remove(second)
        collector.add(third)
        assert scrape(collector).value("kvbm_blocks_free", tier="device", worker_id="b") == 4


def test_second_collector_in_a_registry_is_refused(backend: Backend, prometheus: ModuleType) -> None:
    with small(backend, "a") as first, small(backend, "b") as second:
        registry = prometheus.CollectorRegistry()
        collector = KvbmCollector(first)
        collector.register(registry)
        for other in (collector, KvbmCollector(second)):
            with pytest.raises(ConfigError, match="has metrics of kvbm already"):
                other.register(registry)
        collector.add(second)
        assert registry.get_sample_value("kvbm_blocks_free", {"worker_id": "b", "tier": "device"}) == 4


def test_closed_manager_gives_its_last_values_until_it_is_gone(make_manager: MakeManager, scrape: Scrape) -> None:
    manager = make_manager()
    collector = KvbmCollector(manager)
    sequence = manager.sequence(range(48))
    manager.register_blocks(manager.allocate_blocks(3).complete(sequence.hashes)).release()
    manager.flush(60)
    before = scrape(collector)
    manager.close()
    after = scrape(collector)
    assert after.keys() >= before.keys()
    assert not after.lower_than(before)
    assert after.value("kvbm_offload_blocks_total", source="host", destination="disk") == 3


def test_collector_keeps_no_manager_alive(backend: Backend, scrape: Scrape) -> None:
    manager = small(backend, "a")
    collector = KvbmCollector(manager)
    assert scrape(collector).workers() == {"a"}
    manager.close()
    del manager
    gc.collect()
    assert scrape(collector) == {}
    with small(backend, "a", 6) as successor:
        collector.add(successor)
        assert scrape(collector).value("kvbm_blocks_free", tier="device", worker_id="a") == 6


def test_manager_that_cannot_be_read_spoils_no_scrape(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scrape: Scrape
) -> None:
    with small(backend, "good") as good, small(backend, "bad") as bad:
        collector = KvbmCollector(good, bad)
        monkeypatch.setattr(bad, "statistics", lambda: 1 / 0)
        with caplog.at_level(logging.WARNING, "kvbm.metrics"):
            assert scrape(collector).workers() == {"good"}
        assert "manager left out of a scrape worker_id=bad error=ZeroDivisionError" in caplog.text


def test_server_serves_both_formats_until_it_is_closed(backend: Backend, prometheus: ModuleType) -> None:
    with small(backend, "a") as manager:
        server = serve_metrics(manager, port=0)
        plain = urlopen(server.url, timeout=60).read().decode()
        assert 'kvbm_eviction_count{tier="device",worker_id="a"} 0.0' in plain
        request = Request(server.url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert urlopen(request, timeout=60).read().decode().endswith("# EOF\n")
        port = int(server.url.rsplit(":", 1)[1].partition("/")[0])
        with pytest.raises(ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}: .* give another port"):
            serve_metrics(manager, port=port)
        with pytest.raises(ConfigError, match="give another port"):
            serve_metrics(manager, port=70000)
        server.close()
        server.close()
        with pytest.raises(OSError, match="refused"):
            urlopen(server.url, timeout=60)


def run(code: str, folder: Path) -> list[str]:
    answer = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def test_everything_but_the_collector_works_without_prometheus(tmp_path: Path) -> None:
    text = "metrics need prometheus-client, which is not installed: pip install 'kvbm-native[metrics]'"
    assert run(WITHOUT_PROMETHEUS, tmp_path) == [text, text]


def test_manager_imports_no_prometheus(tmp_path: Path) -> None:
    assert run(IMPORTED, tmp_path) == ["False"]
