"""Shows what the bench of the GPU measured: two tables for a terminal, and a plot.

matplotlib (extra ``report``) is imported only when a plot is drawn.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvbm.bench.gpu import BARS, SIMULATED_NOTE, Figures
from kvbm.bench.gpu_site import DIRECTIONS, LAYOUTS, piece_name
from kvbm.bench.report import bench_table
from kvbm.errors import PluginError

_COLUMNS = ("copy", "piece", "blocks", "path", "GB/s", "of limit", "bar", "x torch")
_CAPTION = "of limit: against one large plain copy of pinned memory; x torch: times as fast as its index copy"


def tables_of(figures: Figures) -> list[Table]:
    """Give the copies as one table and everything else as another, what is empty left out.

    Parameters
    ----------
    figures : Figures
        Bars are shown for a GPU alone, green where they are reached.
    """
    copies = [row for row in figures.rows if "layout" in row]
    others = [row for row in figures.rows if "layout" not in row]
    bars = {} if figures.is_simulated else BARS
    notes = [SIMULATED_NOTE.upper()] if figures.is_simulated else []
    title = "\n".join([*notes, f"gpu: {figures.device}"])
    tables = []
    if copies:
        table = Table(title=escape(title), caption=_CAPTION, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name in _COLUMNS:
            justify: Literal["left", "right"] = "left" if name in ("copy", "path") else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        for row in copies:
            bar = bars.get(row["name"])
            color = "" if bar is None else "green" if bar.is_met(row) else "red"
            table.add_row(
                f"{row['direction']} {row['layout']}",
                piece_name(row["piece_nbytes"]),
                f"{row['num_blocks']:,}",
                row["path"],
                f"{row['median']:.3g}",
                f"{row['ratio']:.3f}",
                "-" if bar is None else f"[{color}]{bar}[/{color}]",
                "-" if row["torch"] is None else f"{row['median'] / row['torch']:.2f}",
            )
        tables.append(table)
    if others:
        caption = "reference: device copy, unchecked copy, bare copy and wait, product alone; above 1 is better"
        tables.append(bench_table("" if copies else title, caption, others, bars=bars))
    return tables


def need_matplotlib() -> None:
    """Refuse to go on where no plot can be drawn.

    Raises
    ------
    PluginError
        matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise PluginError(
            "--plot needs matplotlib, which is not installed: pip install 'kvbm-native[report]', or leave --plot out"
        )


def draw(figures: Figures, path: Path) -> None:
    """Draw speeds over the size of pieces into a PNG file: a panel for each direction and layout.

    Parameters
    ----------
    figures : Figures
    path : Path

    Raises
    ------
    OSError
        The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    copies = [row for row in figures.rows if "layout" in row]
    canvas = FigureCanvasAgg(Figure(figsize=(12, 7), layout="constrained"))
    axes = canvas.figure.subplots(len(DIRECTIONS), len(LAYOUTS), sharex=True, sharey=True, squeeze=False)
    for line, direction in zip(axes, DIRECTIONS, strict=True):
        for ax, layout in zip(line, LAYOUTS, strict=True):
            _draw_panel(ax, [row for row in copies if (row["direction"], row["layout"]) == (direction, layout)])
            ax.set_title(f"{direction} {layout}", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("contiguous piece, KiB")
    for line in axes:
        line[0].set_ylabel("GB/s")
    note = f"\n{SIMULATED_NOTE.upper()}" if figures.is_simulated else ""
    canvas.figure.suptitle(f"{figures.device}{note}", fontsize=9, color="red" if figures.is_simulated else "black")
    canvas.figure.savefig(path, format="png")


def _draw_panel(ax: Any, rows: list[dict[str, Any]]) -> None:
    for num_blocks in sorted({row["num_blocks"] for row in rows}):
        line = sorted((row["piece_nbytes"], row["median"]) for row in rows if row["num_blocks"] == num_blocks)
        ax.plot([x / 1024 for x, _ in line], [y for _, y in line], marker="o", markersize=3, label=f"{num_blocks:,}")
    if rows:
        ax.axhline(float(np.median([row["reference"] for row in rows])), color="black", linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.legend(title="blocks (dashed: limit)", fontsize=7, title_fontsize=7)
    ax.set_ylim(bottom=0)
    ax.grid(visible=True, alpha=0.3)
