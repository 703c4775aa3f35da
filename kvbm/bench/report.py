"""Shows what a bench measured as a table, with the bar that each row has to reach beside it.

Bars hold for the native twin on one thread; they are goals, so missing one is shown and fails nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """What a row has to reach.

    Attributes
    ----------
    limit : float
        In the row's own unit where `field` is "median", a plain ratio where it is "ratio".
    field : {"median", "ratio"}
        Of a median less is better; of a ratio more is better.
    """

    limit: float
    field: str = "median"

    def is_met(self, row: dict[str, Any]) -> bool:
        """Tell whether a row of a bench reaches the bar."""
        value: float = row[self.field]
        return value >= self.limit if self.field == "ratio" else value <= self.limit

    def __str__(self) -> str:
        return f">= {self.limit:g}x" if self.field == "ratio" else f"<= {self.limit:g}"


BARS = {
    "life": Bar(130),
    "life_scattered": Bar(300),
    "pool_life": Bar(200),
    "match_release_128": Bar(6),
    "memory_10m": Bar(100),
    "create_10m": Bar(2),
    "blake2b": Bar(150),
    "copy_1m": Bar(1.5, "ratio"),
    "copy_64k": Bar(1.4, "ratio"),
    "copy_1m_checksum": Bar(1.35, "ratio"),
    "copy_64k_checksum": Bar(1.3, "ratio"),
    "onboard_64": Bar(60),
    "onboard_1m": Bar(0.95, "ratio"),
    "register_16": Bar(0.91, "ratio"),
    "register_paced": Bar(0.91, "ratio"),
    "hit_64k_host": Bar(0.333, "ratio"),
    "hit_64k_disk": Bar(0.333, "ratio"),
    "hit_1m_host": Bar(0.333, "ratio"),
    "hit_1m_disk": Bar(0.333, "ratio"),
    "write_64k": Bar(0.9, "ratio"),
    "read_64k": Bar(0.9, "ratio"),
    "write_1m": Bar(0.9, "ratio"),
    "read_1m": Bar(0.9, "ratio"),
    "write_4m": Bar(0.9, "ratio"),
    "read_4m": Bar(0.9, "ratio"),
    "restart_1m": Bar(2),
}


def bench_table(title: str, caption: str, rows: Sequence[dict[str, Any]], *, bars: Mapping[str, Bar] = BARS) -> Table:
    """Give the rows of a bench as a table for a terminal.

    Parameters
    ----------
    title, caption : str
        Shown as they are: brackets are no markup.
    rows : sequence of dict
        name, unit, median, spread ([p10, p90]), reference, ratio; the last two may be None.
    bars : dict of str to Bar
        By the row's name.

    Returns
    -------
    rich.table.Table
        A bar that is reached is green, another one red; a row without a bar shows a dash.
    """
    table = Table(title=escape(title), caption=escape(caption), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("name", "unit", "median", "p10 .. p90", "reference", "ratio", "bar"):
        justify: Literal["left", "right"] = "left" if column in ("name", "unit") else "right"
        table.add_column(column, justify=justify, no_wrap=column != "p10 .. p90")  # what is narrow wraps there
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["name"],
            row["unit"],
            _number(row["median"]),
            f"{_number(low)} .. {_number(high)}",
            _number(row["reference"]),
            _number(row["ratio"]),
            _bar(bars.get(row["name"]), row),
        )
    return table


def _bar(bar: Bar | None, row: dict[str, Any]) -> str:
    if bar is None:
        return "-"
    color = "green" if bar.is_met(row) else "red"
    return f"[{color}]{bar}[/{color}]"


def _number(value: float | None) -> str:
    """Give three significant digits; thousands in full."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
