"""Render kvbm.metrics.METRICS as the table of docs/metrics.md.

Prints it; with ``--write`` it replaces what stands between the two marks of the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvbm.metrics import METRICS

PAGE = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


def render() -> str:
    """Give the table as Markdown, a line a metric."""
    lines = ["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in ("worker_id", *metric.labels))
        lines.append(f"| `{metric.sample_name}` | {metric.kind} | {labels} | {metric.unit} | {metric.text} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Put the table between the two marks of the page."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        sys.exit(f"{PAGE.name} has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n\n{render()}\n\n{END}{tail}"


def main() -> None:
    """Print the table, or write the page."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(render() + "\n")


if __name__ == "__main__":
    main()
