"""A reading takes what managers and storages show, and nothing that is private to them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tier_site import Site, Tiers, names

import kvbm.metrics
from kvbm._backend import Backend
from kvbm.metrics.reading import Reading


def test_metrics_read_no_private_name_of_others() -> None:
    found = [
        f"{path.name}: {node.attr}"
        for path in Path(kvbm.metrics.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert found == []


@pytest.fixture
def tiers(tmp_path: Path, backend: Backend) -> Tiers:
    return Site(tmp_path, backend)(device=8, disk=8)


def test_reading_has_pins_and_the_troubles_of_the_slab(tiers: Tiers) -> None:
    with tiers.manager as manager:
        hashes = names(3)
        tiers.put(hashes)
        assert manager.pin(hashes[:2], 60.0) == 2
        storage = manager.storage("disk")
        storage.slab.num_sync_failures += 2  # type: ignore[attr-defined]
        storage.slab.index.num_damaged += 5  # type: ignore[attr-defined]
        reading = Reading.of(manager)
        assert reading.pinned == {"device": 2, "disk": 0}
        assert manager.num_pinned("device") == 2
        assert reading.away == manager.away_tiers == {}
        assert reading.slab is not None
        assert (reading.slab.num_sync_failures, reading.slab.num_damaged) == (2, 5)
