"""Draws what a replay found, as SVG for the page; needs matplotlib.

Colours are those of Okabe and Ito, which people with any colour vision tell apart. In the SVG they become CSS
variables, so that the page decides how they look on light and on dark ground.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from kvbm.replay.report import ReplayReport
from kvbm.replay.reuse import ReuseCurve

INK, GRID = "#0a0b0c", "#0a0b0d"
TIER_COLORS = {"device": "#0072b2", "host": "#e69f00", "disk": "#009e73", "remote": "#cc79a7"}
VARIABLES = {INK: "--ink", GRID: "--grid", **{color: f"--{tier}" for tier, color in TIER_COLORS.items()}}

_MAX_WINDOWS = 80
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
Draw = Callable[[Any], None]


def draw_figures(report: ReplayReport, curve: ReuseCurve) -> list[tuple[str, str, str]]:
    """Draw every figure that there is data for.

    Parameters
    ----------
    report : ReplayReport
    curve : ReuseCurve
        Of the requests that the replay served.

    Returns
    -------
    list of (title, caption, SVG)
    """
    figures: list[tuple[str, str, Draw]] = []
    if report.blocks:
        figures += [
            (
                "Hit rate over time",
                "Leading cached blocks of the requests of each window, by the tier that they were found in. "
                "The dashed line is the rate of the whole run.",
                lambda axes: _hit_rate(axes, report),
            ),
            (
                "Occupancy by tier",
                "Blocks that hold something others can find. Dashed: what the tier has room for.",
                lambda axes: _occupancy(axes, report),
            ),
            (
                "Hit rate against capacity",
                "The line is what an LRU cache of each size hits on these requests, computed from their reuse "
                "distances. The marks are what this run found, down to each tier.",
                lambda axes: _capacity(axes, report, curve),
            ),
            (
                "Bytes by route",
                "What was written on misses, and what moved between tiers.",
                lambda axes: _routes(axes, report),
            ),
        ]
    if report.calls:
        figures.append(
            (
                "Time of the manager's calls",
                "Thin line: 1st to 99th percentile. Bar: 25th to 75th. Dot: median. Tick: the longest.",
                lambda axes: _latencies(axes, report),
            )
        )
    if report.warm_start is not None and report.warm_start.window_requests:
        figures.append(
            (
                "First requests after the start",
                "Blocks found in each tier, where the disk tier held something already; what the same requests would "
                "have found in empty tiers, from their reuse distances; and the first requests of the trace.",
                lambda axes: _warm_start(axes, report),
            )
        )
    return [(title, caption, _svg(title, draw)) for title, caption, draw in figures]


def _svg(title: str, draw: Draw) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(7.4, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()


def _hit_rate(axes: Any, report: ReplayReport) -> None:
    points = report.series.points
    step = -(-len(points) // _MAX_WINDOWS)
    chosen = points[step - 1 :: step]
    if chosen[-1] is not points[-1]:
        chosen = [*chosen, points[-1]]
    edges = np.array([0, *(point.requests for point in chosen)])
    blocks = np.diff([0, *(point.blocks for point in chosen)])
    base = np.zeros(len(blocks))
    for tier in report.capacity_by_tier:
        hits = np.diff([0, *(point.hits.get(tier, 0) for point in chosen)])
        top = base + np.divide(hits, blocks, out=np.zeros(len(blocks)), where=blocks > 0)
        axes.stairs(top, edges, baseline=base, fill=True, color=TIER_COLORS[tier], label=tier)
        base = top
    axes.axhline(report.hit_rate, color=INK, linestyle="--", linewidth=1.2, label=f"whole run {report.hit_rate:.1%}")
    axes.set(xlim=(0, edges[-1]), ylim=(0, min(1.0, max(0.05, 1.1 * float(base.max())))))
    axes.set(xlabel="requests so far", ylabel="blocks found")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(_thousands())
    _legend(axes)


def _occupancy(axes: Any, report: ReplayReport) -> None:
    requests = [point.requests for point in report.series.points]
    least = min(max(1, occupied) for point in report.series.points for occupied in point.occupied.values())
    for tier, capacity in report.capacity_by_tier.items():
        occupied = np.array([point.occupied[tier] for point in report.series.points], dtype=float)
        occupied[occupied == 0] = np.nan
        axes.axhline(capacity, color=TIER_COLORS[tier], linestyle="--", linewidth=1.2, alpha=0.8)
        axes.plot(requests, occupied, color=TIER_COLORS[tier], linewidth=2.2, label=f"{tier}, room for {capacity:,}")
    if len(report.capacity_by_tier) > 1:
        axes.set(yscale="log", ylim=(10 ** np.floor(np.log10(least)), 1.4 * max(report.capacity_by_tier.values())))
    else:
        axes.set_ylim(0, 1.1 * max(report.capacity_by_tier.values()))
    axes.set(xlim=(0, requests[-1]), xlabel="requests so far", ylabel="blocks")
    axes.yaxis.set_major_formatter(_thousands())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_thousands())
    _legend(axes)


def _capacity(axes: Any, report: ReplayReport, curve: ReuseCurve) -> None:
    rooms = report.capacity_by_tier
    low, high = max(1, min(curve.min_capacity, *rooms.values())), max(curve.num_unique, *rooms.values())
    capacities = np.unique(np.geomspace(low, 1.2 * high, 400).astype(np.int64))
    rates = curve.hit_rates(capacities)
    axes.plot(capacities, rates, color=INK, linewidth=1.8, label="LRU, from reuse distances")
    found = 0.0
    for tier, capacity in rooms.items():
        found += report.hit_rate_by_tier[tier]
        axes.axvline(capacity, color=TIER_COLORS[tier], linestyle="--", linewidth=1.2)
        axes.plot(
            capacity, found, "o", color=TIER_COLORS[tier], markersize=9, markeredgecolor=INK, zorder=3,
            label=f"down to {tier}, {capacity:,} blocks: {found:.1%}",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="capacity, blocks", ylabel="blocks found")
    axes.set(xlim=(low, 1.2 * high), ylim=(0, min(1.02, max(0.05, 1.15 * max(found, float(rates.max()))))))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(_thousands())
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes, num_columns=2)


def _routes(axes: Any, report: ReplayReport) -> None:
    top = next(iter(report.capacity_by_tier))
    bars = [(f"misses \N{RIGHTWARDS ARROW} {top}", report.written_bytes, "", top)]
    for route, counts in report.routes.items():
        source, _, destination = route.partition("->")
        name = f"{source} \N{RIGHTWARDS ARROW} {destination}"
        bars.append((name, counts["nbytes"], f", {counts['blocks']:,} blocks", destination))
    unit, divisor = ("GB", 1e9) if max(nbytes for _, nbytes, _, _ in bars) >= 1e9 else ("MB", 1e6)
    for place, (_, nbytes, text, tier) in enumerate(bars):
        axes.barh(place, nbytes / divisor, color=TIER_COLORS[tier], height=0.62)
        axes.annotate(
            f"{nbytes / divisor:,.2f} {unit}{text}", (nbytes / divisor, place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _, _, _ in bars])
    axes.set_ylim(max(len(bars), 5) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=f"{unit}, coloured by the tier written to")
    axes.set_xlim(0, 1.45 * max(1e-9, *(nbytes / divisor for _, nbytes, _, _ in bars)))


def _latencies(axes: Any, report: ReplayReport) -> None:
    calls = report.calls
    color = TIER_COLORS["device"]
    low, high = np.inf, 0.0
    for place, call in enumerate(calls):
        times = np.maximum(report.call_ns[call].values() / 1000, 0.1)
        p1, p25, p50, p75, p99 = np.percentile(times, [1, 25, 50, 75, 99])
        low, high = min(low, p1), max(high, times.max())
        axes.plot([p1, p99], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
        axes.barh(place, p75 - p25, left=p25, height=0.5, color=color)
        axes.plot(p50, place, "o", color=INK, markersize=6)
        axes.plot(times.max(), place, "|", color=INK, markersize=11)
        axes.annotate(
            f"p50 {_duration(p50)}, p99 {_duration(p99)}", (1.01, place), xycoords=("axes fraction", "data"),
            va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(calls)), calls)
    axes.set_ylim(len(calls) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xscale="log", xlim=(low / 1.6, high * 1.6), xlabel="time of one call")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _warm_start(axes: Any, report: ReplayReport) -> None:
    warm = report.warm_start
    assert warm is not None, "drawn only where there is one"
    bars = [
        (f"first {warm.window_requests:,} requests,\nwarm", warm.rates),
        ("the same,\nempty tiers", warm.empty_rates),
    ]
    if warm.cold_rates is not None:
        bars.append(("first of the trace,\ncold", warm.cold_rates))
    for place, (_, rates) in enumerate(bars):
        found = 0.0
        for tier in report.capacity_by_tier:
            rate = rates.get(tier, 0.0)
            label = tier if not place else None
            axes.barh(place, rate, left=found, height=0.62, color=TIER_COLORS[tier], label=label)
            found += rate
        axes.annotate(
            f"{found:.1%}, disk {rates.get('disk', 0.0):.1%}", (found, place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(max(len(bars), 4) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="blocks found", xlim=(0, 1.35 * max(0.05, *(sum(rates.values()) for _, rates in bars))))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)


def _legend(axes: Any, *, num_columns: int = 4) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=num_columns, fontsize=9, handlelength=1.6)


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}")


def _duration(microseconds: float) -> str:
    for limit, factor, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms")):
        if microseconds < limit:
            return f"{microseconds / factor:.3g} {unit}"
    return f"{microseconds / 1e6:.3g} s"
