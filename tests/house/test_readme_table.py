"""The table of the README is rendered from what ``kvbm bench --json`` writes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "readme_table.py"
REPORT = {
    "machine": {"processor": "AMD EPYC", "cores": 2, "cpu_features": ["sse2", "avx2", "avx512f"], "memlock_bytes": 1},
    "rows": [
        {
            "name": "life",
            "unit": "ns/block",
            "median": 123.456,
            "spread": [120.0, 131.2],
            "reference": 2100.0,
            "ratio": 17.01,
        },
        {"name": "memory", "unit": "bytes/block", "median": 52, "spread": None, "reference": None, "ratio": None},
    ],
}


def test_table_has_one_line_for_each_row() -> None:
    lines = runpy.run_path(str(SCRIPT))["render"]([("store", REPORT)]).splitlines()
    assert lines[2] == "| store | `life` | 123 | 120 to 131 | ns/block | 2,100 | 17 |"
    assert lines[3] == "| store | `memory` | 52 | - | bytes/block | - | - |"
    assert lines[-1] == "Machine: processor AMD EPYC, cores 2, cpu_features sse2 avx2 avx512f."


def test_row_that_could_mislead_has_its_note() -> None:
    row = {"name": "create_10m", "unit": "s", "median": 3e-05, "spread": [3e-05, 3e-05], "reference": None}
    script = runpy.run_path(str(SCRIPT))
    line = script["render"]([("store", {"machine": {}, "rows": [row]})]).splitlines()[2]
    assert line.startswith("| store | `create_10m` (mapped lazily, pages are touched at first use) | 3e-05 |")


def test_table_replaces_what_stands_between_the_marks() -> None:
    script = runpy.run_path(str(SCRIPT))
    text = f"before\n{script['BEGIN']}\nold\n{script['END']}\nafter\n"
    assert script["replace"](text, "new") == f"before\n{script['BEGIN']}\nnew\n{script['END']}\nafter\n"
    with pytest.raises(SystemExit, match=r"README\.md has no"):
        script["replace"]("no marks", "new")
