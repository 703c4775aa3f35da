"""The report of a replay as one page that needs nothing else: no script, no font, no request to anywhere.

matplotlib (extra ``report``) draws the figures; it is imported only when a page is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec

from kvbm.errors import PluginError
from kvbm.replay.report import ReplayReport
from kvbm.replay.reuse import reuse_curve
from kvbm.types import HashArray

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --grid: #d9dee3;
  --card: #f6f8fa; --bad: #b3261e; --device: #0072b2; --host: #e69f00; --disk: #009e73; --remote: #cc79a7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --soft: #9aa4ae; --grid: #343b43;
  --card: #1d2227; --bad: #ff8a80; --device: #56b4e9; --host: #e69f00; --disk: #2cc79a; --remote: #e3a6c9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .2rem; font-size: 1.1rem; }
p { margin: .2rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.bad { color: var(--bad); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem 1rem; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1.2rem; }
figure, .box { margin: 0; padding: 1rem; border: 1px solid var(--grid); border-radius: .5rem; }
figure { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 28rem; height: auto; margin-top: .6rem; }
.all { margin-top: 1.6rem; max-width: 44rem; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; font-weight: 600; font-size: 1.1rem; padding-bottom: .3rem; }
th, td { text-align: left; font-weight: 400; padding: .28rem .2rem; border-bottom: 1px solid var(--grid);
  vertical-align: top; overflow-wrap: anywhere; }
td { text-align: right; font-variant-numeric: tabular-nums; }
"""


def need_matplotlib() -> None:
    """Refuse to go on where matplotlib is not installed.

    Raises
    ------
    PluginError
        It is not.
    """
    if find_spec("matplotlib") is None:
        raise PluginError(
            "the report page needs matplotlib, which is not installed: pip install 'kvbm-native[report]', "
            "or leave --report out"
        )


def render_page(
    report: ReplayReport, requests: Sequence[HashArray], *, title: str, configuration: Mapping[str, str]
) -> str:
    """Make the page.

    Parameters
    ----------
    report : ReplayReport
    requests : sequence of (num_blocks, 2) uint64
        Block hashes of the requests that fit into the top tier, in order.
    title : str
    configuration : dict of str to str
        What was replayed, and on what.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    PluginError
        matplotlib is not installed.
    """
    need_matplotlib()
    from kvbm.replay.figures import draw_figures

    figures = "\n".join(
        f"<figure><h2>{escape(name)}</h2><figcaption>{escape(caption)}</figcaption>\n{_inline(svg, name)}</figure>"
        for name, caption, svg in draw_figures(report, reuse_curve(requests))
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">Replayed through the real block manager; every byte of every hit was compared.</p>
{_notes(report)}
</header>
<div class="cards">{_cards(report)}</div>
<div class="figures">
{figures}
{_warm_start(report)}<section class="box">{_table("Configuration", configuration.items())}</section>
</div>
<section class="all">{_table("All figures", report.rows())}</section>
</body>
</html>
"""


def _cards(report: ReplayReport) -> str:
    rates = report.hit_rate_by_tier
    cards = [
        (f"{report.hit_rate:.2%}", "hit rate", ""),
        *((f"{rate:.2%}", f"found in {tier}", "") for tier, rate in rates.items() if len(rates) > 1),
        (f"{report.requests:,}", "requests", ""),
        (f"{report.blocks:,}", "blocks", ""),
        *([(f"{report.warm_start.restored_blocks:,}", "blocks restored", "")] if report.warm_start else []),
        (f"{report.wrong_bytes:,}", "wrong bytes", "bad" if report.wrong_bytes else ""),
        (f"{report.seconds:,.1f} s", "time", ""),
    ]
    return "".join(
        f'<div class="card"><b class="{color}">{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what, color in cards
    )


def _notes(report: ReplayReport) -> str:
    notes = []
    if report.is_partial:
        notes.append("Interrupted: these are the figures so far.")
    if report.wrong_bytes:
        notes.append(f"{report.wrong_bytes:,} wrong bytes, first in {report.first_wrong}.")
    if report.held_blocks:
        notes.append(f"{report.held_blocks:,} blocks were still held when everything was over.")
    lines = [f'<p class="bad">{escape(note)}</p>' for note in notes]
    return "\n".join(lines + [f"<p>{escape(_sentence(warning))}</p>" for warning in report.warnings])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _warm_start(report: ReplayReport) -> str:
    if report.warm_start is None:
        return ""
    return f'<section class="box">{_table("Warm start", report.warm_start.rows())}</section>\n'


def _table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "\n".join(f'<tr><th scope="row">{escape(what)}</th><td>{escape(value)}</td></tr>' for what, value in rows)
    return f"<table><caption>{escape(caption)}</caption>\n{body}\n</table>"


def _inline(svg: str, name: str) -> str:
    """Make a drawing a part of the page: without its prologue, sized and coloured by the page."""
    from kvbm.replay.figures import VARIABLES

    tag, _, rest = svg[svg.index("<svg") :].partition(">")
    tag = re.sub(r' (width|height)="[^"]*"', "", tag).replace("<svg", f'<svg role="img" aria-label="{escape(name)}"')
    svg = f"{tag}>{re.sub('<g id=[^>]*>', '<g>', rest)}"
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("'DejaVu Sans'", "system-ui")
