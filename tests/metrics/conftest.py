"""Managers with small tiers, and what a scrape of them says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvbm
from kvbm._backend import Backend


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """What a Prometheus server would store: a number by name and labels."""

    def value(self, name: str, **labels: str) -> float:
        """Give one number, of the worker "0" where no other is named."""
        return self[name, frozenset({"worker_id": "0", **labels}.items())]

    def workers(self) -> set[str]:
        """Give the workers that there are numbers of."""
        return {dict(labels)["worker_id"] for _, labels in self}

    def lower_than(self, before: Samples) -> list[object]:
        """Name the counters that are lower than they were before, or gone."""
        ends = ("_total", "_bucket", "_count", "_sum")
        return [key for key, old in before.items() if key[0].endswith(ends) and self.get(key, -1.0) < old]


@pytest.fixture
def prometheus() -> ModuleType:
    """Give prometheus_client."""
    return pytest.importorskip("prometheus_client", reason="metrics need prometheus-client")


@pytest.fixture
def scrape(prometheus: ModuleType) -> Callable[[Any], Samples]:
    """Read a collector by way of the text that a Prometheus server gets."""
    from prometheus_client.parser import text_string_to_metric_families

    def read(collector: Any) -> Samples:
        registry = prometheus.CollectorRegistry()
        registry.register(collector)
        text = prometheus.generate_latest(registry).decode()
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        samples = Samples({(sample.name, frozenset(sample.labels.items())): sample.value for sample in found})
        assert len(samples) == len(found), "a sample stands twice in the text"
        return samples

    return read


@pytest.fixture
def make_manager(backend: Backend, tmp_path: Path) -> Iterator[Callable[..., kvbm.BlockManager]]:
    """Make managers over three tiers of 8, 16 and 64 blocks of 256 bytes; closed at the end."""
    made: list[kvbm.BlockManager] = []

    def make(**settings: Any) -> kvbm.BlockManager:
        tiers = {"device_blocks": 8, "host_blocks": 16, "disk_blocks": 64, "disk_path": tmp_path / f"disk{len(made)}"}
        shape = {"num_layers": 1, "page_size": 16, "inner_dim": 8, "outer_dim": 2, "dtype": "uint8", "model": "tiny"}
        manager = kvbm.BlockManager(**{**shape, **tiers, **settings}, backend=backend)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        manager.close()
