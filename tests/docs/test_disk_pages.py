"""The pages for operators name settings, metrics and log lines that exist, and their figures are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvbm.config.sections import DiskConfig, ModelConfig, OffloadConfig, RuntimeConfig
from kvbm.metrics.table import METRICS
from kvbm.replay import ReplayReport

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["operations.md", "sizing.md", "design/disk.md"])
def test_settings_and_metrics_on_the_page_exist(page: str) -> None:
    sections = {
        kind.section: kind.__struct_fields__ for kind in (DiskConfig, ModelConfig, RuntimeConfig, OffloadConfig)
    }
    named = set(re.findall(r"`(disk|model|runtime|offload)\.([a-z_]+)", read(page)))
    assert not [(section, key) for section, key in named if key not in sections[section]]
    known = {metric.name + ("_total" if metric.kind == "counter" else "") for metric in METRICS}
    assert not set(re.findall(r"\b(kvbm_[a-z_]+)", read(page))) - known


def test_log_lines_of_the_disk_tier_are_written_somewhere() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kvbm").rglob("*.py"))
    lines = re.findall(r"^\| `kvbm\.[a-z.]+` \| [A-Z]+ \| (.*?) \| (.*?) \|$", read("logging.md"), re.MULTILINE)
    events = [(event, keys) for cell, keys in lines for event in re.findall(r"`((?:disk|tier) [a-z ]+)`", cell)]
    assert len(events) > 8
    for event, keys in events:
        pattern = re.sub(
            r"(index|disk) (write|sync|read) failed", r"\1 (\2|%s) failed", re.escape(event).replace(r"\ ", " ")
        )
        found = re.search(rf'"{pattern} ([^"]+)"', source)
        assert found, event
        written = re.findall(r"(\w+)=", found[0])
        assert re.findall(r"`(\w+)`", keys) == written or set(re.findall(r"`(\w+)`", keys)) <= set(written), event


def test_the_table_of_models_is_right() -> None:
    text = read("sizing.md")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    known: dict[str, Any] = {}
    exec(code, known)
    models = [known[name] for name in ("llama_8b", "llama_70b", "deepseek_v3")]
    rows = {
        "bytes of a token": [f"{nbytes:,}" for nbytes in models],
        "bytes of a block": [f"{16 * nbytes:,}" for nbytes in models],
        "tokens in a GiB": [f"{2**30 // nbytes:,}" for nbytes in models],
    }
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in text
    units = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
    seconds = {"new bytes a second": 1, "to reach back 1 minute": 60, "to reach back 10 minutes": 600}
    seconds |= {"to reach back 1 hour": 3600, "written to a disk in a day, if all is offloaded": 86400}
    for name, duration in seconds.items():
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)
        for cell, nbytes in zip(row.split("|"), models, strict=True):
            number, unit = cell.split()
            expected = known["size"](nbytes, tokens_per_s=2_000, seconds=duration) / units[unit]
            assert float(number) == pytest.approx(expected, rel=0.006), (name, cell)


def test_the_warning_on_the_page_is_the_one_that_a_report_gives() -> None:
    (shown,) = re.findall(r"^```text\n(.*?)^```$", read("sizing.md"), re.MULTILINE | re.DOTALL)
    assert ReplayReport(capacity_by_tier={"device": 500, "host": 600}).warnings == [" ".join(shown.split())]
