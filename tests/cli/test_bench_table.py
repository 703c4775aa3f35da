"""The table of ``kvbm bench``: bars beside rows, readable on a narrow terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from kvbm._backend import load_backend
from kvbm.bench import copy, tiers
from kvbm.bench.report import BARS, Bar, bench_table
from kvbm.bench.rig import make_row


def row(name: str, median: float, ratio: float | None = 2.0, unit: str = "ns/block") -> dict[str, Any]:
    return {"name": name, "unit": unit, "median": median, "spread": [1.0, 2.0], "reference": None, "ratio": ratio}


def shown(*rows: dict[str, Any], title: str = "title", color: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=color, color_system="standard" if color else None).print(
        bench_table(title, "caption", rows)
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("bar", "median", "ratio", "is_met"),
    [
        (Bar(130), 130.0, 0.1, True),
        (Bar(130), 130.1, 9.0, False),
        (Bar(1.5, "ratio"), 0.1, 1.5, True),
        (Bar(1.5, "ratio"), 9.0, 1.49, False),
    ],
)
def test_bar_is_met_at_its_limit(bar: Bar, median: float, ratio: float, is_met: bool) -> None:
    assert bar.is_met(row("x", median, ratio)) is is_met


def test_bench_table_puts_the_bar_beside_the_row_in_its_color() -> None:
    text = shown(row("life", 120.0), row("pool_life", 999.0), row("other", 1.0), color=True)
    good, missed, other = (next(line for line in text.splitlines() if name in line) for name in ("life", "pool", "oth"))
    assert "\x1b[32m<= 130" in good
    assert "\x1b[31m<= 200" in missed
    assert other.rstrip().endswith("-")


def test_bench_table_fits_a_terminal_of_eighty_columns() -> None:
    rows = [row(name, 1234.5, unit="bytes/block") for name in BARS]
    text = shown(*rows, title="[bold]brackets")
    assert "[bold]brackets" in text
    for name, bar in BARS.items():
        assert any(name in line and str(bar) in line for line in text.splitlines())


def test_copy_rows_are_those_that_have_bars() -> None:
    names = {measured["name"] for measured in copy.run(nbytes=1 << 20, rounds=1)}
    assert names == {name for name in BARS if name.startswith("copy")}


def test_tiers_rows_are_those_that_have_bars_and_what_explains_them() -> None:
    extent = tiers.Extent(nbytes=64 << 20, bulk_nbytes=4 << 20, num_calls=30, rounds=1, round_s=0.01, num_hits=3)
    names = {measured["name"]: measured for measured in tiers.run(extent, backend=load_backend("pure"))}
    barred = {name for name in BARS if name.startswith(("onboard", "register", "hit"))}
    assert set(names) == barred | {"pump_64"}
    assert all(measured["median"] > 0 and measured["ratio"] > 0 for measured in names.values())


def test_a_ratio_above_one_is_better_than_the_reference() -> None:
    assert make_row("x", "us", [2.0], 4.0)["ratio"] == 2.0
    assert make_row("x", "GB/s", [2.0], 4.0, is_more_better=True)["ratio"] == 0.5
    assert make_row("x", "us", [1.0, 2.0, 3.0], None, median=9.0, more=1) == {
        "name": "x", "unit": "us", "median": 9.0, "spread": [1.2, 2.8], "reference": None, "ratio": None, "more": 1
    }  # fmt: skip
