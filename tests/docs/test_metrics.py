"""The page about metrics has the table of the code, and every reason for which blocks are dropped."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import kvbm

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_page_has_the_table_of_the_code() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "metrics_table.py"))
    assert script["with_table"](PAGE) == PAGE, "run python docs/metrics_table.py --write"


def test_page_names_every_reason_of_a_drop() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (Path(kvbm.__file__).parent / "planner").glob("*.py"))
    reasons = set(re.findall(r'drop(?:_queue)?\("(\w+)"', source)) | {"late", "failed", "corrupt"}
    assert len(reasons) >= 10
    assert set(re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE)) - {"kvbm"} >= reasons
    assert not [reason for reason in reasons if f"\n| `{reason}` |" not in PAGE]


def test_queries_on_the_page_ask_for_metrics_that_exist() -> None:
    table = PAGE.partition("<!-- metrics: begin -->")[2].partition("<!-- metrics: end -->")[0]
    known = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    named = {name.removesuffix("_bucket") for name in re.findall(r"\bkvbm_\w+", PAGE)}
    assert len(known) > 20
    assert not named - known - {"kvbm_native"}
