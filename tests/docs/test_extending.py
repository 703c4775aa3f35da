"""The parts on the page about extending pass the suites it shows, and are found by the entry points it shows."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import kvbm
from kvbm.plugins import plugin_names

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
POINTS = re.search(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]

parts = types.ModuleType("my_package")
exec(CODE, vars(parts))
globals().update({name: value for name, value in vars(parts).items() if name.startswith("Test")})  # for pytest


def test_page_shows_suites() -> None:
    assert {"TestDictStorage", "TestAligned", "TestNewestFirst", "TestShared", "TestHeadsOnly"} <= set(globals())
    assert "TestMyConnector" in globals()


@pytest.mark.usefixtures("cpu_device")  # whose memory the allocator gives
def test_parts_are_found_by_their_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = tmp_path / "my_package-1.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    text = re.sub(r'\[project\.entry-points\."([\w.]+)"\]', r"[\1]", POINTS).replace('"', "")
    (description / "entry_points.txt").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_package", parts)
    assert "aligned" in plugin_names("layout")

    config = kvbm.Config.from_dict(
        {
            "model": {"num_layers": 2, "inner_dim": 8},
            "device": {"num_blocks": 8, "layout": "aligned", "allocator": "shared", "eviction": "newest"},
            "host": {"num_blocks": 16, "layout": "aligned", "allocator": "shared", "eviction": "newest"},
            "offload": {"policy": "heads"},
        }
    )
    with kvbm.BlockManager(config) as manager:
        assert manager.layout.strides.block == 65536
        sequence = manager.sequence(range(64 * 8))
        manager.register_blocks(manager.allocate_blocks(8).complete(sequence.hashes)).release()
        manager.flush()
        assert manager.host.status().inactive == 1
        manager.allocate_blocks(2).release()
        assert (manager.device.lookup(sequence.hashes) >= 0).sum() == 6
