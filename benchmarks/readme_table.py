"""Render benchmarks/results/*.json as the table of the README.

Prints it; with ``--write`` it replaces what stands between the two marks in README.md. Reads what
``kvbm bench PART --json FILE`` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ("processor", "cores", "memory_bytes", "cpu_features", "system", "python", "numpy", "kvbm", "backend")
NOTES = {"create_10m": "mapped lazily, pages are touched at first use"}  # what a figure does not say by itself
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def number(value: Any) -> str:
    """Give a figure with three significant digits, a pair as its two ends, anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return (" to " if len(value) == 2 else " ").join(number(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def render(reports: list[tuple[str, dict[str, Any]]]) -> str:
    """Give the Markdown of all reports: (name, content of the JSON file) each."""
    lines = ["| part | row | median | 10 to 90 % | unit | compared with | ratio |", "|---|---|---:|---:|---|---:|---:|"]
    machines: dict[str, None] = {}
    for part, report in reports:
        machine = ", ".join(f"{key} {number(report['machine'][key])}" for key in MACHINE if key in report["machine"])
        machines[machine] = None
        for row in report["rows"]:
            figures = [number(row.get(key)) for key in ("median", "spread")]
            compared = [number(row.get(key)) for key in ("reference", "ratio")]
            name = f"`{row['name']}`" + (f" ({NOTES[row['name']]})" if row["name"] in NOTES else "")
            lines.append("| " + " | ".join([part, name, *figures, row["unit"], *compared]) + " |")
    lines += ["", *(f"Machine: {machine}." for machine in machines)]
    return "\n".join(lines)


def replace(text: str, table: str) -> str:
    """Put the table between the two marks of a README."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        sys.exit(f"README.md has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not files:
        sys.exit("no benchmarks/results/*.json: run nox -s bench first")
    table = render([(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files])
    if "--write" in sys.argv[1:]:
        readme = ROOT / "README.md"
        readme.write_text(replace(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
