"""``kvbm bench``: measure this machine, with the pure twin or memcpy in the same run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvbm.bench.machine import describe_machine
from kvbm.errors import ConfigError

_BENCHES = {
    "store": "reference: the pure twin on a tenth of the blocks; ratio: times faster",
    "hash": "reference: the pure twin; ratio: times faster",
    "copy": "reference: libc memcpy of the same blocks; ratio: ours / memcpy",
}


def bench(
    what: Annotated[str, typer.Argument(help="store, hash or copy.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file.")] = None,
) -> None:
    """Measure the store, the hashing of tokens, or copies between blocks."""
    if what not in _BENCHES:
        raise ConfigError(f"there is no bench {what!r}, use {', '.join(_BENCHES)}")
    with Console(stderr=True).status(f"measuring {what}"):
        rows = importlib.import_module(f"kvbm.bench.{what}").run()
    machine = describe_machine()
    title = f"{what}: {machine['processor']}, {machine['backend']} twin"
    table = Table(title=title, caption=_BENCHES[what])
    for column in ("name", "unit", "median", "p10 .. p90", "reference", "ratio"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            row["name"],
            row["unit"],
            _number(row["median"]),
            f"{_number(low)} .. {_number(high)}",
            _number(row["reference"]),
            _number(row["ratio"]),
        )
    Console().print(table)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {json_file} cannot be written: {error.strerror or error}") from error


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
